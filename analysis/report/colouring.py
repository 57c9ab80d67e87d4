"""One colour for each name on a page: a source, a cluster, a collection looks the same in every figure.

No two names share a colour. Grey is for what is none of them: noise floors, "other", problems without a gradient.
"""

import colorsys
from collections.abc import Iterable

from gradstore.analysis.report.pieces import Figure, Series

PALETTE = ("#3b78d8", "#d9822b", "#2c9f74", "#c2477f", "#8266cf", "#9c7a1f", "#2b97b0", "#c75146", "#6b8f2a", "#8c5a3c")
"""Colours of medium lightness, visible on white and on black; report.js lightens their darker shades on black."""
GREY = "#8a909c"
NO_GROUP = ("other", "no gradient now", "no cluster")
_FIRST = ("source", "selector", "collection", "cluster", "tag", "against")
"""Kinds of names that take their colours first."""
_FIXED = {
    ("state", "has a gradient"): "#4f7cac", ("state", "no signal"): "#b3bac6", ("state", "failed"): "#a33b3b",
    ("state", "not measured"): "#d5d9e0",
}  # fmt: skip
_BANDS = ("#e7dcf7", "#d6c4f0", "#c4abe8", "#b293e0", "#a07bd7", "#8e62cd", "#7b4bc0")
"""From problems that are never solved to those that always are: an order, so shades of one colour."""


class Colours:
    """The colours of one page, given in the order in which names are first asked for."""

    def __init__(self, figures: Iterable[Figure] = ()) -> None:
        self._of: dict[tuple[str, str], str] = dict(_FIXED)
        self._n = 0
        order = sorted(figures, key=lambda one: _FIRST.index(one.named) if one.named in _FIRST else len(_FIRST))
        for figure in order:
            self.series(figure)

    def learn(self, named: str, names: Iterable[str]) -> None:
        """Give colours to names of one kind, in this order."""
        for name in names:
            if (named, name) not in self._of:
                self._of[named, name] = self._next()

    def series(self, figure: Figure) -> list[str]:
        """Colour of each series of a figure. In a point figure, a dashed series is a fit to the previous series."""
        found: list[str] = []
        for series in figure.series:
            if figure.drawing == "points" and series.dashed and found:
                found.append(found[-1])
            elif figure.drawing != "heatmap":
                found.append(self._one(figure, series))
        return found

    def _one(self, figure: Figure, series: Series) -> str:
        if (series.dashed and figure.drawing != "points") or series.name in NO_GROUP:
            return GREY
        key = (figure.named or figure.key, series.name)
        if key not in self._of:
            self._of[key] = self._band(figure, series) if figure.named == "difficulty" else self._next()
        return self._of[key]

    def _next(self) -> str:
        self._n += 1
        return _nth(self._n - 1)

    @staticmethod
    def _band(figure: Figure, series: Series) -> str:
        names = [one.name for one in figure.series if one.name not in NO_GROUP]
        return _BANDS[round(names.index(series.name) * (len(_BANDS) - 1) / max(1, len(names) - 1))]


def _nth(n: int) -> str:
    """The palette, then lighter and darker shades of it, then hues at the golden angle."""
    if n < 3 * len(PALETTE):
        shade, place = divmod(n, len(PALETTE))
        return _mixed(PALETTE[place], *((0, 0), (255, 0.4), (0, 0.35))[shade])
    red, green, blue = colorsys.hls_to_rgb(n * 0.618033988749895 % 1, 0.42 + 0.03 * (n % 7), 0.5)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _mixed(colour: str, towards: int, share: float) -> str:
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round((1 - share) * part + share * towards):02x}" for part in parts)
