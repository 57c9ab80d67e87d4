"""A plotly figure for each frame of the analysis; needs the extra `report`. Frames in, figures out.

Figures carry titles, axis titles with units, and hover texts; colours are those of the template in use.
"""

from typing import Any

import numpy as np
import pandas as pd

from gradstore.errors import RequestError


def alignment(frame: pd.DataFrame, ids: list[str] | None = None) -> Any:
    """The frame of `alignment.alignment`: lines of some problems, or the pool's median and 5th to 95th percentile."""
    from analysis.alignment import summary

    go = _plotly()
    figure = go.Figure()
    if ids is not None:
        for name in ids:
            rows = frame[frame["id"] == name]
            figure.add_scatter(x=rows["step"], y=rows["score"], mode="lines+markers", name=str(name))
    else:
        table = summary(frame)
        figure.add_scatter(x=table["step"], y=table["high"], mode="lines", line_width=0, showlegend=False, name="95 %")
        figure.add_scatter(
            x=table["step"], y=table["low"], mode="lines", line_width=0, fill="tonexty", name="5 % to 95 % of the pool"
        )
        figure.add_scatter(x=table["step"], y=table["median"], mode="lines+markers", name="median")
    figure.add_hline(y=0, line_dash="dot")
    return _titled(figure, "Alignment with the benchmark", "step", "score")


def target_drift(frame: pd.DataFrame) -> Any:
    """The frame of `drift.target_drift`: cosines between all pairs of steps."""
    go = _plotly()
    square = frame.pivot(index="other", columns="step", values="cosine")
    square = square.combine_first(square.T)
    labels = [str(step) for step in square.columns]
    heat = go.Heatmap(
        z=square.to_numpy(),
        x=labels,
        y=labels,
        zmin=-1,
        zmax=1,
        colorscale="RdBu",
        hovertemplate="step %{x} against %{y}: cosine %{z:.3f}<extra></extra>",
    )
    return _titled(go.Figure(heat), "Cosine between targets", "step", "step")


def ranking_drift(frame: pd.DataFrame, measure: str = "spearman", against: str = "previous") -> Any:
    """The frame of `drift.ranking_drift`: `spearman`, `jaccard` or `rbo`, with what noise alone would leave."""
    go = _plotly()
    rows = frame[frame["against"] == against]
    figure = go.Figure()
    figure.add_scatter(x=rows["step"], y=rows[measure], mode="lines+markers", name=f"{measure} with the {against} step")
    figure.add_scatter(
        x=rows["step"], y=rows[f"noise_{measure}"], mode="lines", line_dash="dash", name="noise alone would leave"
    )
    return _titled(figure, "Drift of the ranking", "step", measure)


def half_life(agreement: pd.DataFrame, fitted: pd.DataFrame) -> Any:
    """The frames of `drift.staleness` and `drift.half_life`: rank agreement by age with the fitted curves."""
    go = _plotly()
    figure = go.Figure()
    for row in fitted.itertuples():
        points = agreement[agreement["group"] == row.group]
        figure.add_scatter(x=points["age"], y=points["spearman"], mode="markers", name=str(row.group))
        ages = np.linspace(0, row.longest, 50)
        curve = row.reliability * np.exp2(-ages / row.half_life)
        figure.add_scatter(x=ages, y=curve, mode="lines", name=f"{row.group}: half-life {row.half_life:.3g} steps")
    return _titled(figure, "Stale rows against fresh ones", "age in steps", "Spearman")


def counterfactual(frame: pd.DataFrame, value: str = "gained") -> Any:
    """The frame of `curricula.counterfactual`: `gained`, `regret`, `alignment` or `overlap` by step."""
    go = _plotly()
    figure = go.Figure()
    for name, rows in frame.groupby("selector", sort=False):
        figure.add_scatter(x=rows["step"], y=rows[value], mode="lines+markers", name=str(name))
    return _titled(figure, "What each selector would have picked", "step", value)


def picks_over_time(frame: pd.DataFrame, value: str = "share") -> Any:
    """The frame of `composition.picks_over_time`: `share` or `lift` of each group by round."""
    go = _plotly()
    figure = go.Figure()
    for name, rows in frame.groupby("group", sort=False):
        if value == "share":
            figure.add_bar(x=rows["round"], y=rows[value], name=str(name))
        else:
            figure.add_scatter(x=rows["round"], y=rows[value], mode="lines+markers", name=str(name))
    figure.update_layout(barmode="stack")
    return _titled(figure, "What the picks are made of", "round", value)


def turning(frame: pd.DataFrame) -> Any:
    """The frame of `turning.turning`: mean alignment before and after, one point a problem that changed sign."""
    go = _plotly()
    figure = go.Figure()
    for certain, rows in frame.groupby("significant"):
        figure.add_scatter(
            x=rows["before"],
            y=rows["after"],
            mode="markers",
            text=rows["id"],
            opacity=1.0 if certain else 0.35,
            name="beyond noise" if certain else "within noise",
        )
    figure.add_hline(y=0, line_dash="dot")
    figure.add_vline(x=0, line_dash="dot")
    return _titled(figure, "Problems that changed sign", "alignment before", "alignment after")


def clusters(frame: pd.DataFrame) -> Any:
    """The frame of `clusters.clusters`: the map, one point a problem, representatives larger."""
    go = _plotly()
    figure = go.Figure()
    for number, rows in frame.groupby("cluster"):
        figure.add_scattergl(
            x=rows["x"],
            y=rows["y"],
            mode="markers",
            text=rows["id"] + " (" + rows["source"] + ")",
            marker_size=np.where(rows["representative"], 12, 5),
            name="outliers" if number < 0 else f"cluster {number} ({len(rows)})",
        )
    return _titled(figure, "Map of the gradients", "", "")


def suspicious(frame: pd.DataFrame, first: int = 50) -> Any:
    """The frame of `suspicion.suspicious`: alignment and pass rate of all problems, the first ones marked."""
    go = _plotly()
    figure = go.Figure()
    for name, rows in (("the rest", frame.iloc[first:]), (f"the {min(first, len(frame))} first", frame.iloc[:first])):
        known = "score" if frame["score"].notna().any() else "own"
        figure.add_scattergl(x=rows["pass_rate"], y=rows[known], mode="markers", text=rows["id"], name=name)
    return _titled(figure, "Suspicious rewards", "pass rate", "alignment")


def conflict(frame: pd.DataFrame, value: str = "cosine") -> Any:
    """The frame of `conflict.conflict`: `cosine`, `correlation` or `rank_correlation` of each pair, by step."""
    go = _plotly()
    figure = go.Figure()
    for (a, b), rows in frame.groupby(["a", "b"], sort=False):
        if len(rows) > 1:
            figure.add_scatter(x=rows["step"], y=rows[value], mode="lines+markers", name=f"{a} and {b}")
        else:
            figure.add_bar(x=[f"{a} and {b}"], y=rows[value], name=f"{a} and {b}")
    return _titled(figure, "Benchmarks against each other", "step" if frame["step"].nunique() > 1 else "", value)


def layers(frame: pd.DataFrame, value: str = "share") -> Any:
    """The frame of `layers.layers`: `share`, `term` or `energy` of each layer by step."""
    go = _plotly()
    table = frame.pivot(index="layer", columns="step", values=value)
    table = table.loc[frame.drop_duplicates("layer").sort_values("position")["layer"]]
    heat = go.Heatmap(
        z=table.to_numpy(),
        x=[str(step) for step in table.columns],
        y=table.index.tolist(),
        hovertemplate="%{y} at step %{x}: %{z:.3g}<extra></extra>",
    )
    return _titled(go.Figure(heat), f"{value.capitalize()} of each layer", "step", "layer")


def _plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise RequestError("figures need plotly: pip install 'gradstore[report]'") from None
    return go


def _titled(figure: Any, title: str, x: str, y: str) -> Any:
    return figure.update_layout(title=title, xaxis_title=x, yaxis_title=y)
