"""Parts of a page as plain values: figures, tables and sections, independent of how they are drawn.

A figure is described once: its axes, its series and its caption. The page draws it with plotly, print output uses
matplotlib, and Markdown and screen readers get its numbers as a table, all from the same values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Context
from typing import Any, Literal, cast

from gradstore.wording import fixed, size

Kind = Literal["text", "id", "integer", "number", "signed", "percent", "seconds", "bytes"]
"""Number format of a column or an axis (`written`)."""

RIGHT = {"integer", "number", "signed", "percent", "seconds", "bytes"}
"""Kinds whose columns are right-aligned."""
SURE = 2.0
"""Standard errors beyond which a value is told from 0."""
Drawing = Literal["lines", "bars", "stacked bars", "points", "heatmap"]


@dataclass(frozen=True, slots=True)
class Series:
    """One line, one colour of bars, one group of points, or one row of a heatmap."""

    name: str
    x: Sequence[Any]
    y: Sequence[Any]
    low: Sequence[float] | None = None
    """Lower edge of a band around the line; same length as y."""
    high: Sequence[float] | None = None
    hover: Sequence[str] | None = None
    """Hover text of each point, instead of its coordinates."""
    dashed: bool = False
    """Whether it is a reference, such as a noise floor; in a point figure, the curve fitted to the previous series."""
    large: Sequence[bool] | None = None
    """Whether each point is drawn larger."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure. In a heatmap each series is a row: `y` holds its values and `name` labels it."""

    key: str
    """Name of the figure's page element and its file."""
    title: str
    says: str
    """Caption; also the text for screen readers."""
    drawing: Drawing
    series: Sequence[Series]
    x_label: str
    y_label: str
    y_kind: Kind = "number"
    y_range: tuple[float, float] | None = None
    categories: bool = False
    """Whether x holds names, or steps drawn at equal distances, instead of numbers."""
    horizontal: bool = False
    """Whether bars are horizontal; for names too long to fit under a bar."""
    with_table: bool = True
    """Whether a table of the numbers is available with the figure; False for thousands of points."""
    named: str = ""
    """What the series are: source, cluster, collection, ... Names of one kind have the same colours on a whole page."""

    @property
    def n_points(self) -> int:
        return sum(len(series.x) for series in self.series)

    def table(self) -> "Table":
        """The figure's numbers, one row per x value, one column per series."""
        xs: dict[Any, None] = {}
        for series in self.series:
            xs.update(dict.fromkeys(series.x))
        order = list(xs) if self.categories else sorted(xs)
        lookup = [dict(zip(series.x, series.y, strict=True)) for series in self.series]
        x_kind: Kind = "text" if any(isinstance(x, str) for x in order) else "integer" if _whole(order) else "number"
        columns = [Column(self.x_label, x_kind), *(Column(series.name, self.y_kind) for series in self.series)]
        rows = [[x, *(values.get(x) for values in lookup)] for x in order]
        return Table(f"{self.key}-numbers", f"{self.title}: the numbers", columns, rows)

    @property
    def is_one_point(self) -> bool:
        """Whether it would be a line chart of single points."""
        return self.drawing == "lines" and len({x for series in self.series for x in series.x}) == 1

    def as_table(self) -> "Table":
        """The figure as a table with one row per series, for lines of a single point."""
        banded = any(series.low is not None for series in self.series)
        columns = [Column(""), Column(self.y_label, self.y_kind)]
        columns += [Column("5 %", self.y_kind), Column("95 %", self.y_kind)] if banded else []
        rows = []
        for series in self.series:
            ends = [edge[0] if edge is not None and len(edge) else None for edge in (series.low, series.high)]
            rows.append([series.name, series.y[0] if len(series.y) else None, *(ends if banded else [])])
        return Table(self.key, self.title, columns, rows, says=self.says)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    name: str
    kind: Kind = "text"


def columns_of(header: str) -> list[Column]:
    """Columns from a text such as "Problem:id | Pass rate:percent | Why": name and kind, or the name of a text."""
    pairs = [text.rpartition(":") for text in header.split(" | ")]
    return [Column(name, cast(Kind, kind)) if name else Column(kind) for name, _, kind in pairs]


@dataclass(frozen=True, slots=True)
class Table:
    """A table; long ones are shown in pages."""

    key: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    details: Sequence[dict[str, Any]] | None = None
    """Expandable details of each row: {"text": ..., "facts": [[name, value], ...], "rollouts": [...]}."""
    says: str = ""
    errors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Column -> standard error of each row's value; a value within two of them is shown in grey. nan: unknown."""

    def digits(self) -> list[int | None]:
        """Decimals of each column, for `written`: one precision per column."""
        return [digits_of([row[j] for row in self.rows], column.kind) for j, column in enumerate(self.columns)]

    def within_noise(self, row: int) -> list[int]:
        """Columns whose value in a row is not told from 0."""
        found = []
        for j, column in enumerate(self.columns):
            value, error = self.rows[row][j], self.errors[column.name][row] if column.name in self.errors else None
            if value is not None and error is not None and abs(value) < SURE * error:
                found.append(j)
        return found


@dataclass(frozen=True, slots=True)
class Result:
    """One answer at the top of the page."""

    title: str
    says: str
    sign: Literal["up", "down", "flat"] = "flat"
    """Whether it is good, bad, or neither."""
    more: str = ""
    """Key of the section that shows more."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page under one heading."""

    key: str
    title: str
    lead: str = ""
    """One or two sentences on how to read it."""
    blocks: Sequence[Figure | Table] = ()
    missing: str = ""
    """Reason why the section is empty, in one line; "" if it is not."""
    paired: bool = False
    """Whether figures are shown in pairs side by side, if there is room."""
    folded: bool = False
    """Whether only the heading is shown until somebody opens it."""


@dataclass(frozen=True, slots=True)
class Page:
    """The whole report."""

    title: str
    subtitle: str
    tiles: Sequence[tuple[str, str]]
    """(name, value) of the key numbers at the top."""
    warnings: Sequence[str]
    sections: Sequence[Section] = field(default_factory=list)
    made: str = ""
    """Date, and version that made the page."""
    results: Sequence[Result] = ()
    """What the page found, the first thing to read."""

    @property
    def figures(self) -> list[Figure]:
        return [block for section in self.sections for block in section.blocks if isinstance(block, Figure)]


def digits_of(values: Sequence[Any], kind: Kind) -> int | None:
    """Decimals for all values of a column, from the largest: three significant digits. None: each value by itself.

    -1: in powers of ten, for a column of very large or very small numbers.
    """
    sizes = [abs(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    largest = max(sizes, default=0.0)
    if kind == "percent":
        return int(any(0 < 100 * size < 9.95 and round(100 * size, 6) % 1 for size in sizes))
    if kind == "seconds":
        return None if largest >= 7200 else int(largest < 120)
    if kind not in ("number", "signed") or largest == 0:
        return None
    return -1 if not 1e-6 <= largest < 1e6 else min(max(0, 2 - math.floor(math.log10(largest))), 7)


def written(value: Any, kind: Kind, digits: int | None = None) -> str:
    """Format a value for display; an en dash if it is missing. page.js formats numbers the same way.

    digits: decimals, from `digits_of`; None: as many as the value itself needs.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if digits is not None and kind in ("number", "signed", "percent", "seconds"):
        return _with_digits(value, kind, digits)
    match kind:
        case "integer":
            return f"{int(value):,}".replace(",", "\u202f").replace("-", "\u2212")
        case "percent":
            return f"{fixed(100 * value, 0 if 100 * value >= 9.95 or value == 0 else 1)}\u202f%"
        case "number":
            return _number(value)
        case "signed":
            return ("+" if value > 0 else "") + _number(value)
        case "seconds":
            return _seconds(value)
        case "bytes":
            return size(value).replace(" ", "\u202f")
    return str(value)


def _with_digits(value: float, kind: Kind, digits: int) -> str:
    if kind == "percent":
        return f"{fixed(100 * value, digits)}\u202f%".replace("-", "\u2212")
    if kind == "seconds":
        return f"{fixed(value, digits)}\u202fs"
    text = _in_powers(value) if digits < 0 else fixed(value, digits)
    if not text.strip("-0."):  # it rounds to zero, which has no sign
        return text.lstrip("-")
    return ("+" if kind == "signed" and value > 0 else "") + text.replace("-", "\u2212")


def _in_powers(value: float) -> str:
    """Two digits and a power of ten, halves rounded away from zero as JavaScript does."""
    if value == 0:
        return "0"
    return f"{float(Context(prec=2, rounding=ROUND_HALF_UP).create_decimal_from_float(float(value))):.1e}"


def _number(value: float) -> str:
    large = abs(value)
    if large == 0:
        return "0"
    if large < 1e-5 or large >= 1e4:
        return f"{value:.1e}".replace("-", "\u2212")
    return fixed(value, 3 if large >= 1e-3 else 5).replace("-", "\u2212")


def _seconds(value: float) -> str:
    if value < 120:
        return f"{fixed(value, 1)}\u202fs" if value >= 0.1 else f"{fixed(1000 * value, 0)}\u202fms"
    return f"{fixed(value / 60, 0)}\u202fmin" if value < 7200 else f"{fixed(value / 3600, 1)}\u202fh"


def _whole(values: Sequence[Any]) -> bool:
    return all(float(value).is_integer() for value in values)
