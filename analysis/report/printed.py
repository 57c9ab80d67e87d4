"""Figures for print: SVG or PNG with matplotlib, without a browser or a screen."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.analysis.report.colouring import Colours
from gradstore.analysis.report.pieces import Figure
from gradstore.durable import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("svg", "png")
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7ed",
    "legend.frameon": False,
    "svg.hashsalt": "gradstore",
    "svg.fonttype": "none",
}


def print_figures(figures: list[Figure], folder: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Write every figure as KEY.svg and KEY.png (200 dots per inch) to the folder; returns the paths."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    folder.mkdir(parents=True, exist_ok=True)
    written, colours = [], Colours(figures)
    with matplotlib.rc_context(_STYLE):
        for figure in figures:
            rows = max((len(series.x) for series in figure.series), default=1) if figure.horizontal else 0
            rows = max(rows, len(figure.series) if figure.drawing == "heatmap" else 0)
            canvas = Canvas(figsize=(6.4, max(3.4, 0.22 * rows + 1.2)), layout="constrained")
            axes = canvas.subplots()
            _draw(canvas, axes, figure, colours.series(figure))
            for form in formats:
                path = folder / f"{figure.key}.{form}"
                with whole_file(path) as unfinished:
                    canvas.savefig(unfinished, format=form, dpi=200, metadata={"Date": None} if form == "svg" else None)
                written.append(path)
    return written


def _draw(canvas: Any, axes: "Axes", figure: Figure, colours: list[str]) -> None:
    if figure.drawing == "heatmap":
        _heatmap(canvas, axes, figure)
    elif figure.drawing in ("bars", "stacked bars"):
        _bars(axes, figure, colours)
    else:
        _lines_or_points(axes, figure, colours)
    x_label, y_label = (figure.y_label, figure.x_label) if figure.horizontal else (figure.x_label, figure.y_label)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(figure.title, loc="left", fontsize=10)
    value_axis = axes.xaxis if figure.horizontal else axes.yaxis
    if figure.y_kind == "percent" and figure.drawing != "heatmap":
        from matplotlib.ticker import PercentFormatter

        value_axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if figure.y_range is not None and figure.drawing != "heatmap":
        (axes.set_xlim if figure.horizontal else axes.set_ylim)(figure.y_range)
    if len(figure.series) > 1 and figure.drawing != "heatmap":
        axes.legend(ncols=2, fontsize=8)


def _lines_or_points(axes: "Axes", figure: Figure, colours: list[str]) -> None:
    for series, colour in zip(figure.series, colours, strict=True):
        x = [str(value) for value in series.x] if figure.categories else series.x
        y = np.array(series.y, float)
        if figure.drawing == "points" and not series.dashed:
            size = 6 if series.large is None else np.where(series.large, 24, 6)
            axes.scatter(x, y, s=size, color=colour, alpha=0.7, label=series.name, rasterized=True, linewidths=0)
            continue
        style = "--" if series.dashed else "-"
        axes.plot(x, y, style, marker="" if series.dashed else "o", ms=3, color=colour, label=series.name)
        if series.low is not None and series.high is not None:
            low, high = np.array(series.low, float), np.array(series.high, float)
            axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)


def _bars(axes: "Axes", figure: Figure, colours: list[str]) -> None:
    names = list(dict.fromkeys(str(x) for series in figure.series for x in series.x))
    places, base = np.arange(len(names)), np.zeros(len(names))
    thick = 0.8 if figure.drawing == "stacked bars" else 0.8 / max(1, len(figure.series))
    for number, (series, colour) in enumerate(zip(figure.series, colours, strict=True)):
        values_of = {str(x): y for x, y in zip(series.x, series.y, strict=True)}
        values = np.nan_to_num(np.array([values_of.get(name) for name in names], float))
        stacked = figure.drawing == "stacked bars"
        at = places if stacked else places - 0.4 + thick * (number + 0.5)
        draw, side = (axes.barh, "left") if figure.horizontal else (axes.bar, "bottom")
        start: Any = base if stacked else 0
        draw(at, values, thick, **{side: start}, color=colour, label=series.name)
        base = base + values if stacked else base
    if figure.horizontal:
        axes.set_yticks(places, names)
        axes.invert_yaxis()
    else:
        axes.set_xticks(places, names)


def _heatmap(canvas: Any, axes: "Axes", figure: Figure) -> None:
    values = np.array([list(series.y) for series in figure.series], float)
    reach = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    low, high = figure.y_range or (-reach, reach)
    image = axes.imshow(values, aspect="auto", cmap="RdBu" if low < 0 else "Blues", vmin=low, vmax=high)
    axes.grid(False)
    axes.set_xticks(range(values.shape[1]), [str(x) for x in figure.series[0].x])
    axes.set_yticks(range(values.shape[0]), [series.name for series in figure.series])
    if values.size <= 100:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                text = f"{100 * value:.0f} %" if figure.y_kind == "percent" else f"{value:.2f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=8)
    canvas.colorbar(image, ax=axes, shrink=0.9)
