"""A plotly figure for each frame of the analysis, drawn as in the report; needs the extra `plots`.

Each function has the arguments of the function of the same name in figures.py. The plotly template in use sets the
colours of text, grid and paper.
"""

from collections.abc import Callable
from functools import wraps
from html import escape
from typing import Any, ParamSpec

from gradstore import errors
from gradstore.analysis import figures
from gradstore.analysis.report.interactive import drawn
from gradstore.analysis.report.pieces import Figure

P = ParamSpec("P")

_OF_THE_PAGE = ("paper_bgcolor", "plot_bgcolor", "margin", "legend")
"""Layout entries that only suit the report's page, where titles are outside the figures."""


def _plotted(described: Callable[P, Figure]) -> Callable[P, Any]:
    """Wrap a function of figures.py to return a plotly figure."""

    @wraps(described)
    def plot(*args: P.args, **kwargs: P.kwargs) -> Any:
        with errors.needing("a figure", "gradstore[plots]"):
            import plotly.graph_objects as go
        figure = described(*args, **kwargs)
        parts = drawn(figure)
        layout = {name: value for name, value in parts["layout"].items() if name not in _OF_THE_PAGE}
        return go.Figure(parts["data"], layout).update_layout(title_text=escape(figure.title))

    return plot


alignment = _plotted(figures.alignment)
target_drift = _plotted(figures.target_drift)
ranking_drift = _plotted(figures.ranking_drift)
half_life = _plotted(figures.half_life)
counterfactual = _plotted(figures.counterfactual)
picks_over_time = _plotted(figures.picks_over_time)
turning = _plotted(figures.turning)
clusters = _plotted(figures.clusters)
suspicious = _plotted(figures.suspicious)
conflict = _plotted(figures.conflict)
layers = _plotted(figures.layers)
