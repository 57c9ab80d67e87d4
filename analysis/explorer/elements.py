"""The explorer's building blocks: accessible tables, figures and controls, usable by keyboard."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, quote

from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html

from gradstore.analysis.report.colouring import Colours
from gradstore.analysis.report.interactive import drawn
from gradstore.analysis.report.pieces import RIGHT, Column, Figure, digits_of, written

_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["sendChartToCloud", "sendDataToCloud", "lasso2d", "select2d", "autoScale2d"],
}
"""plotly configuration without the buttons that send a figure elsewhere."""
NEWEST = "newest"
"""Value of the step control for the newest rows."""
_INK = {"light": ("#1b1f27", "#e4e7ed", "#ffffff"), "dark": ("#e8ebf1", "#2c3340", "#1a1e26")}


def table(
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[Any]],
    shown: str = "aside",
    *,
    empty: str = "Nothing to show.",
    sorts: Mapping[str, str] | None = None,
    order: str = "",
) -> Any:
    """An HTML table; a cell may be a component instead of a value.

    empty: said where there is no row. sorts: column -> key of its button, {"sort": key}; order: the key that the rows
    are sorted by, with a minus if the largest come first.
    """
    heads = [_head(column, (sorts or {}).get(column.name), order) for column in columns]
    digits = [digits_of([row[j] for row in rows], column.kind) for j, column in enumerate(columns)]
    lines = [
        html.Tr([_cell(*parts) for parts in zip(row, columns, digits, strict=True)], className="data", role="row")
        for row in rows
    ] or [html.Tr([html.Td(empty, colSpan=len(columns))])]
    whole = html.Table(
        [html.Caption(title, className=shown), html.Thead(html.Tr(heads)), html.Tbody(lines)], role="table"
    )
    return html.Div(whole, className="scroll", tabIndex=0, role="region", **{"aria-label": title})


def _head(column: Column, key: str | None, order: str) -> Any:
    side = "right" if column.kind in RIGHT else ""
    if key is None:
        return html.Th(column.name, scope="col", className=side)
    sorted_by = (
        {"aria-sort": "descending" if order.startswith("-") else "ascending"} if order.lstrip("-") == key else {}
    )
    return html.Th(html.Button(column.name, id={"sort": key}, type="button"), scope="col", className=side, **sorted_by)


def _cell(value: Any, column: Column, digits: int | None) -> Any:
    about: dict[str, Any] = {"data-name": column.name, "role": "cell"}
    if hasattr(value, "to_plotly_json"):
        return html.Td(value, className="id" if column.kind == "id" else "", **about)
    names = ["right"] if column.kind in RIGHT else ["id"] if column.kind == "id" else []
    text = written(value, column.kind, digits)
    if column.kind == "signed" and text.strip("+\u22120.–"):
        names.append("up" if value > 0 else "down")
    if not names and len(text) > 60:
        return html.Td(html.Span(text, className="clip", title=text[:400]), className="long", **about)
    if not names and len(text) <= 20:
        names.append("short")
    return html.Td(text, className=" ".join(names).strip(), **about)


def problem_link(problem_id: str) -> Any:
    """A link to the view of one problem."""
    return dcc.Link(problem_id, href=f"/problem?id={quote(problem_id, safe='')}")


def figure(described: Figure, theme: str, colours: Colours | None = None) -> Any:
    """A figure with its caption, in the colours of the theme. colours: those of names in all views."""
    parts = drawn(described, colours)
    ink, grid, card = _INK["dark" if theme == "dark" else "light"]
    layout = parts["layout"]
    layout["font"] = {**layout["font"], "color": ink}
    layout["hoverlabel"] = {"bgcolor": card, "font": {"color": ink}, "align": "left"}
    for axis in ("xaxis", "yaxis"):
        layout[axis] = {**layout[axis], "gridcolor": grid, "zerolinecolor": ink, "linecolor": grid}
    heights = {"low": 260, "usual": 320, "tall": 460}
    shown = {"data": parts["data"], "layout": {**layout, "height": heights[parts["size"]]}}
    graph = dcc.Graph(figure=shown, config=_CONFIG, id={"figure": described.key})
    image = html.Div(graph, role="img", **{"aria-label": f"{described.title}. {described.says}"})
    return html.Figure([html.H3(described.title), image, html.Figcaption(described.says)])


def labelled(label: str, control: Any, wide: bool = False) -> Any:
    """A control with its label above it."""
    name = f"{control.id}-label"
    return html.Div([html.Label(label, id=name, htmlFor=control.id), control], className="wide" if wide else "")


def choice(name: str, values: Sequence[str] | Mapping[str, str], chosen: Any, **more: Any) -> Any:
    """A dropdown for one or several values (or value -> label); values that it does not have are left out."""
    labels = values if isinstance(values, Mapping) else {value: value or "(none)" for value in values}
    options = [{"label": label, "value": value} for value, label in labels.items()]
    if isinstance(chosen, list):
        chosen = [value for value in chosen if value in labels]
    return dcc.Dropdown(id=name, options=options, value=chosen, clearable=bool(more.get("multi")), **more)


def step_choice(name: str, steps: Sequence[int], chosen: str = NEWEST) -> Any:
    """A dropdown of steps, the newest first."""
    return choice(name, {NEWEST: "newest", **{str(step): f"step {step}" for step in reversed(steps)}}, chosen)


def step_of(value: str | None) -> int | None:
    """The step for a control's value; None: the newest rows."""
    return None if value in (None, NEWEST) else int(str(value))


class Asked:
    """What the address of a view asks for, after its question mark."""

    def __init__(self, search: str) -> None:
        self._values = parse_qs(search.lstrip("?"), keep_blank_values=True)

    def one(self, name: str, default: str, allowed: Iterable[str] | None = None) -> str:
        """The value of a name; the default if it is absent or not allowed."""
        value = self._values.get(name, [default])[0]
        return value if allowed is None or value in allowed else default

    def many(self, name: str) -> list[str]:
        """All values of a name."""
        return self._values.get(name, [])


def steps_allowed(steps: Sequence[int]) -> list[str]:
    """The values of a step control."""
    return [NEWEST, *map(str, steps)]


def plain_state(view: str, path: str, plain: Mapping[str, Any], names: Mapping[str, str] | None = None) -> Any:
    """The state of a view that needs no words in the address: control -> value.

    names: control -> its name in the address, if not its id.
    """
    return dcc.Store(id=f"{view}-plain", data={"path": path, "plain": dict(plain), "names": dict(names or {})})


def keep_in_address(app: Dash, view: str, inputs: Sequence[tuple[str, str]]) -> None:
    """Write a view's controls, (id, property), into the address as they change, and into the link to the view."""
    app.clientside_callback(
        ClientsideFunction("explorer", "remember"),
        Output(f"to-{view}", "href"),
        *(Input(name, what) for name, what in inputs),
        State(f"{view}-plain", "data"),
    )


def note(text: str) -> Any:
    """A line of text in place of missing content."""
    return html.P(text, className="missing")


def pages(n_rows: int, page: int, size: int) -> tuple[int, str, bool, bool]:
    """(valid page number, line of text about it, whether it is the first page, whether it is the last)."""
    last = max(0, (n_rows - 1) // size)
    page = min(max(page, 0), last)
    first = page * size
    end = min(first + size, n_rows)
    shown = [written(number, "integer") for number in (first + 1, end, n_rows)]
    return page, "{}–{} of {}".format(*shown) if n_rows else "0", page == 0, page == last
