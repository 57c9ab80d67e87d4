"""The explorer's building blocks: accessible tables, figures and controls, usable by keyboard."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from dash import dcc, html

from gradstore.analysis.report.interactive import drawn
from gradstore.analysis.report.pieces import RIGHT, Column, Figure, written

_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["sendChartToCloud", "sendDataToCloud", "lasso2d", "select2d", "autoScale2d"],
}
"""plotly configuration without the buttons that send a figure elsewhere."""
PERSISTENT: dict[str, Any] = {"persistence": True, "persistence_type": "session"}
"""Settings of a control whose value survives when the user leaves the view."""
NEWEST = "newest"
"""Value of the step control for the newest rows."""
_INK = {"light": ("#1b1f27", "#e4e7ed", "#ffffff"), "dark": ("#e8ebf1", "#2c3340", "#1a1e26")}


def table(title: str, columns: Sequence[Column], rows: Sequence[Sequence[Any]], shown: str = "aside") -> Any:
    """An HTML table; a cell may be a component instead of a value."""
    heads = [html.Th(column.name, scope="col", className="right" if column.kind in RIGHT else "") for column in columns]
    lines = [html.Tr([_cell(value, column) for value, column in zip(row, columns, strict=True)]) for row in rows] or [
        html.Tr([html.Td("Nothing to show.", colSpan=len(columns))])
    ]
    whole = html.Table([html.Caption(title, className=shown), html.Thead(html.Tr(heads)), html.Tbody(lines)])
    return html.Div(whole, className="scroll", tabIndex=0, role="region", **{"aria-label": title})


def _cell(value: Any, column: Column) -> Any:
    if hasattr(value, "to_plotly_json"):
        return html.Td(value, className="id" if column.kind == "id" else "")
    names = ["right"] if column.kind in RIGHT else ["id"] if column.kind == "id" else []
    if column.kind == "signed" and isinstance(value, int | float):
        names.append("up" if value > 0 else "down" if value < 0 else "")
    text = written(value, column.kind)
    if not names and len(text) > 60:
        return html.Td(html.Span(text, className="clip", title=text[:400]), className="long")
    if not names and len(text) <= 20:
        names.append("short")
    return html.Td(text, className=" ".join(names).strip())


def problem_link(problem_id: str) -> Any:
    """A link to the view of one problem."""
    return dcc.Link(problem_id, href=f"/problem?id={quote(problem_id, safe='')}")


def figure(described: Figure, theme: str) -> Any:
    """A figure with its caption, in the colours of the theme."""
    parts = drawn(described)
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
    """A dropdown for one or several values (or value -> label); the choice persists when the user leaves the view."""
    labels = values if isinstance(values, Mapping) else {value: value or "(none)" for value in values}
    options = [{"label": label, "value": value} for value, label in labels.items()]
    return dcc.Dropdown(id=name, options=options, value=chosen, clearable=bool(more.get("multi")), **PERSISTENT, **more)


def step_choice(name: str, steps: Sequence[int], chosen: str = NEWEST) -> Any:
    """A dropdown of steps, the newest first."""
    return choice(name, {NEWEST: "newest", **{str(step): f"step {step}" for step in reversed(steps)}}, chosen)


def step_of(value: str | None) -> int | None:
    """The step for a control's value; None: the newest rows."""
    return None if value in (None, NEWEST) else int(str(value))


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
