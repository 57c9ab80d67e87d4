"""Convert a figure to plotly's JSON: traces and a layout, without theme colours, which the caller adds."""

from html import escape
from typing import Any

from gradstore.analysis.report.colouring import PALETTE, Colours
from gradstore.analysis.report.pieces import Figure, Series

SEQUENTIAL = [[0.0, "#eaf1fb"], [0.5, "#7fa9e6"], [1.0, "#1d4f9f"]]
DIVERGING = [[0.0, "#b3446c"], [0.5, "#e9e9ec"], [1.0, "#2b74c9"]]
_FONT = 'system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif'
_WEBGL_FROM = 1000
_MOST_TICKS = 12


def drawn(figure: Figure, colours: Colours | None = None) -> dict[str, Any]:
    """{"data", "layout", "size"} for `Plotly.newPlot` or `plotly.graph_objects.Figure`; size: low, usual or tall.

    colours: those of the page; None: the figure stands alone.
    """
    layout: dict[str, Any] = {
        "font": {"family": _FONT, "size": 13},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 70, "r": 44, "t": 20, "b": 55},
        "xaxis": {"title": {"text": escape(figure.x_label), "standoff": 8}, "automargin": True},
        "yaxis": {"title": {"text": escape(figure.y_label), "standoff": 8}, "automargin": True, "zeroline": True},
        "legend": {
            "orientation": "h",
            "y": 1.02,
            "yanchor": "bottom",
            "x": 0,
            "bgcolor": "rgba(0,0,0,0)",
            "traceorder": "normal",
        },
        "modebar": {"orientation": "v", "bgcolor": "rgba(0,0,0,0)", "color": "#8a909c", "activecolor": "#3b78d8"},
        "colorway": list(PALETTE),
        "hovermode": "closest",
        "barmode": "stack" if figure.drawing == "stacked bars" else "group",
        "showlegend": len(figure.series) > 1 and figure.drawing != "heatmap",
    }
    ticks = sorted({x for series in figure.series for x in series.x}) if figure.drawing == "lines" else []
    if not figure.categories and 0 < len(ticks) <= _MOST_TICKS:
        layout["xaxis"] |= {"tickmode": "array", "tickvals": ticks}
    if figure.drawing in ("bars", "stacked bars") and len({x for s in figure.series for x in s.x}) <= 4:
        layout["bargap"] = 0.5
    layout["xaxis"]["zeroline"] = figure.drawing == "points"
    value_axis = "xaxis" if figure.horizontal else "yaxis"
    if figure.y_kind == "percent":
        layout[value_axis]["tickformat"] = ".0%"
    if figure.y_range is not None:
        layout[value_axis]["range"] = list(figure.y_range)
    if figure.categories:
        layout["yaxis" if figure.horizontal else "xaxis"]["type"] = "category"
    if figure.horizontal:
        layout["xaxis"]["title"], layout["yaxis"]["title"] = layout["yaxis"]["title"], layout["xaxis"]["title"]
        layout["yaxis"]["autorange"] = "reversed"
    if figure.drawing == "heatmap":
        layout["yaxis"] |= {"type": "category", "autorange": "reversed", "zeroline": False}
        return {"data": [_heatmap(figure)], "layout": layout, "size": _size(figure)}
    traces = [
        trace
        for series, colour in zip(figure.series, (colours or Colours()).series(figure), strict=True)
        for trace in _traces(figure, series, colour)
    ]
    return {"data": traces, "layout": layout, "size": _size(figure)}


def _traces(figure: Figure, series: Series, colour: str) -> list[dict[str, Any]]:
    name, x, y = escape(series.name), list(series.x), [_finite(value) for value in series.y]
    if figure.drawing == "points" and not series.dashed:
        many = figure.n_points >= _WEBGL_FROM
        size = 5 if many else 8
        sizes = [2 * size if large else size for large in series.large] if series.large else size
        return [
            {
                "type": "scattergl" if many else "scatter",
                "mode": "markers",
                "name": name,
                "x": x,
                "y": y,
                "text": [escape(text) for text in series.hover or []],
                "hovertemplate": "%{text}<extra>" + name + "</extra>",
                "marker": {"color": colour, "size": sizes, "opacity": 0.75},
            }
        ]
    if figure.drawing in ("bars", "stacked bars"):
        across = {"x": y, "y": x, "orientation": "h"} if figure.horizontal else {"x": x, "y": y}
        return [{"type": "bar", "name": name, **across, "marker": {"color": colour}, **_hover(figure, series, name)}]
    line: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines" if series.dashed else "lines+markers",
        "name": name,
        "x": x,
        "y": y,
        "line": {"color": colour, "width": 2, "dash": "dash" if series.dashed else "solid"},
        **_hover(figure, series, name),
    }
    if series.low is None or series.high is None:
        return [line]
    band = {"type": "scatter", "mode": "lines", "x": x, "showlegend": False, "hoverinfo": "skip", "line": {"width": 0}}
    return [
        {**band, "y": [_finite(value) for value in series.low]},
        {**band, "y": [_finite(value) for value in series.high], "fill": "tonexty", "fillcolor": _faint(colour)},
        line,
    ]


def _hover(figure: Figure, series: Series, name: str) -> dict[str, Any]:
    if series.hover is not None:
        text = [escape(text) for text in series.hover]
        return {"text": text, "textposition": "none", "hovertemplate": "%{text}<extra></extra>"}
    form = ":.0%" if figure.y_kind == "percent" else ":.3s" if figure.y_kind in ("integer", "seconds") else ":.3f"
    value, key = ("x", "y") if figure.horizontal else ("y", "x")
    label = escape(figure.x_label)
    return {"hovertemplate": f"{name}<br>{label} %{{{key}}}: %{{{value}{form}}}<extra></extra>"}


def _heatmap(figure: Figure) -> dict[str, Any]:
    values = [[_finite(value) for value in series.y] for series in figure.series]
    reach = max((abs(value) for row in values for value in row if value is not None), default=1.0) or 1.0
    low, high = figure.y_range or (-reach, reach)
    form = ".0%" if figure.y_kind == "percent" else ".3f"
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": [str(x) for x in figure.series[0].x] if figure.series else [],
        "y": [series.name for series in figure.series],
        "z": values,
        "zmin": low,
        "zmax": high,
        "colorscale": DIVERGING if low < 0 else SEQUENTIAL,
        "colorbar": {"thickness": 12, "outlinewidth": 0, "tickformat": form},
        "hovertemplate": f"%{{y}}<br>{escape(figure.x_label)} %{{x}}: %{{z:{form}}}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
    }
    if sum(map(len, values)) <= 100:
        trace |= {"texttemplate": f"%{{z:{form}}}"}
    return trace


def _size(figure: Figure) -> str:
    if figure.drawing == "points" or (figure.drawing == "heatmap" and len(figure.series) > 12):
        return "tall"
    if figure.horizontal and max((len(series.x) for series in figure.series), default=0) > 12:
        return "tall"
    return "low" if figure.drawing == "lines" and len(figure.series) <= 2 else "usual"


def _finite(value: Any) -> Any:
    """Replace nan and infinity by None, because plotly's JSON has no nan; null is a gap."""
    return None if value is None or value != value or value in (float("inf"), float("-inf")) else value


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"
