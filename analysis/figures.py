"""Convert each frame of the analysis to a figure, described by the plain values of report/pieces.py.

The report puts them on its page, with titles that use the store's names; `plots` shows them in plotly.
"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from gradstore.analysis import curricula
from gradstore.analysis.alignment import summary
from gradstore.analysis.clusters import NOISE
from gradstore.analysis.drift import tells_noise
from gradstore.analysis.report.pieces import Figure, Kind, Series, written
from gradstore.wording import first_words

_FLOORS = {
    "probes": "from the two halves of stored probes",
    "repeats": "extrapolated from problems measured at several steps, a rough guess where those are few",
    "given": "from the reliability given",
}
SELECTORS = {curricula.TRAINED: "trained on", curricula.BEST: "best in hindsight"}
"""Display names of special selectors in the frame of `curricula.counterfactual`."""
_MOST_GROUPS = 9


def alignment(frame: pd.DataFrame | Mapping[str, pd.DataFrame], ids: Sequence[str] | None = None) -> Figure:
    """Figure of `alignment.alignment` frames (one, or one per benchmark).

    ids: show a line for each of these problems of the one frame; None: each frame's pool median with its 5th to 95th
    percentile.
    """
    series = []
    if ids is not None and isinstance(frame, pd.DataFrame):
        for name in ids:
            rows = frame[frame["id"] == name]
            series.append(Series(str(name), rows["step"].tolist(), rows["score"].tolist()))
    else:
        for name, each in ({"median": frame} if isinstance(frame, pd.DataFrame) else frame).items():
            table = summary(each)
            band = table["low"].tolist(), table["high"].tolist()
            series.append(Series(name, table["step"].tolist(), table["median"].tolist(), *band))
    says = "Median of the problems with a gradient; the band spans the 5th to the 95th percentile of the problems."
    title, says = "Alignment with the benchmark", says if ids is None else "Each problem's score at each step."
    return Figure(
        "alignment", title, says, "lines", series, "Step", "Score", y_kind="signed",
        named="collection" if ids is None else "problem",
    )  # fmt: skip


def target_drift(frame: pd.DataFrame) -> Figure:
    """Figure of `drift.target_drift`: cosines with the previous and the first step, and the noise floor."""
    pairs = frame[frame["step"] != frame["other"]]
    first, before = pairs[pairs["step"] == pairs["step"].min()], pairs[pairs["consecutive"]]
    series = [
        Series("to the step before", before["other"].tolist(), before["cosine"].tolist()),
        Series("to the first step", first["other"].tolist(), first["cosine"].tolist()),
        Series("noise floor", before["other"].tolist(), before["noise"].tolist(), dashed=True),
    ]
    says = "Cosine between the target at a step and the target one measurement earlier, and that of the first step."
    if len(before):
        says += f" At step {before['other'].iloc[-1]} it is {before['cosine'].iloc[-1]:.2f} to the one before."
    span = _agreement_range(series)
    return Figure(
        "target", "Target", says, "lines", series, "Step", "Cosine", y_kind="signed", y_range=span,
        named="against",
    )  # fmt: skip


def ranking_drift(frame: pd.DataFrame, measure: str = "spearman", against: str = "previous") -> Figure:
    """Figure of `drift.ranking_drift`: `spearman`, `jaccard` or `rbo` with the previous and the first step.

    against: whose noise floor is drawn, that of pairs with the `previous` or the `first` step.
    """
    before, first = frame[frame["against"] == "previous"], frame[frame["against"] == "first"]
    series = [
        Series("to the step before", before["step"].tolist(), before[measure].tolist()),
        Series("to the first step", first["step"].tolist(), first[measure].tolist()),
    ]
    floor = " The store cannot tell the noise floor: it has no probes, and too few steps."
    if tells_noise(frame):
        rows = frame[frame["against"] == against]
        series.append(Series("noise floor", rows["step"].tolist(), rows[f"noise_{measure}"].tolist(), dashed=True))
        floor = f" Noise floor {_FLOORS.get(str(frame['noise_from'].iloc[0]), '')}."
    k = int(before["k"].iloc[-1]) if len(before) else 0
    what, says = {
        "spearman": ("Spearman correlation", "Rank correlation over all problems with a gradient at both steps"),
        "jaccard": (f"Jaccard of the best {k}", f"Share of the union of the two best {k} that is in both"),
        "rbo": ("Rank-biased overlap", f"Overlap of the two rankings from the top down, about {k} deep"),
    }[measure]
    span = _agreement_range(series)
    return Figure(
        f"ranking-{measure}", f"Ranking: {what}", f"{says}.{floor}", "lines", series, "Step", what,
        y_kind="signed", y_range=span, named="against",
    )  # fmt: skip


def half_life(agreement: pd.DataFrame, fitted: pd.DataFrame) -> Figure:
    """Figure of `drift.staleness` and `drift.half_life`: rank agreement by age, with the fitted curves."""
    series = []
    for row in fitted.to_dict("records"):
        pairs = agreement[agreement["group"] == row["group"]]
        hover = [
            f"step {line.stale_step} at step {line.step}: {line.spearman:.2f}, {line.n} problems"
            for line in pairs.itertuples()
        ]
        series.append(Series(str(row["group"]), pairs["age"].tolist(), pairs["spearman"].tolist(), hover=hover))
        ages = [row["longest"] * place / 49 for place in range(50)]
        curve = [row["reliability"] * 2 ** (-age / row["half_life"]) for age in ages]
        series.append(Series(f"{row['group']}: half-life {row['half_life']:.3g} steps", ages, curve, dashed=True))
    says = "Each point is a pair of steps: the rank correlation of the earlier rows with the later ones."
    return Figure(
        "half-life", "Stale rows against fresh ones", says, "points", series, "Age (steps)", "Spearman correlation",
        with_table=False,
    )  # fmt: skip


def counterfactual(frame: pd.DataFrame, value: str = "gained", words: Mapping[str, str] | None = None) -> Figure:
    """Figure of `curricula.counterfactual`: `gained`, `regret`, `alignment` or `overlap` by step.

    words: selector -> display name, if not the selector's name.
    """
    what = {
        "gained": "Alignment gained",
        "regret": "Regret",
        "alignment": "Alignment when picked",
        "overlap": "Overlap with what was trained on",
    }[value]
    called = {**SELECTORS, **(words or {})}
    series = [
        Series(called.get(name, name), rows["step"].tolist(), rows[value].tolist(), dashed=name == curricula.BEST)
        for name, rows in frame.groupby("selector", sort=False)
        if rows[value].notna().any()
    ]
    kind: Kind = "percent" if value == "overlap" else "signed"
    says = "Means over each selector's picks; the dashed line is the most that any choice of as many could have had."
    title = f"{what} by each selector"
    return Figure(value, title, says, "lines", series, "Step", what, y_kind=kind, named="selector")


def picks_over_time(frame: pd.DataFrame, value: str = "share", by: str = "group") -> Figure:
    """Figure of `composition.picks_over_time`: `share` or `lift` of the most picked groups, by the rounds' steps.

    by: kind of the groups (`source`, `tag`, `difficulty`, `cluster`); decides the title and the order.
    """
    totals = frame.groupby("group")["n"].sum().sort_values(ascending=False)
    kept = [str(name) for name in totals.index[:_MOST_GROUPS]]
    steps = sorted(set(frame["step"]))
    x, series = [str(step) for step in steps], []
    for name in sorted(kept) if by == "difficulty" else kept:
        y = frame[frame["group"] == name].groupby("step")[value].mean().tolist()
        series.append(Series("no gradient now" if name == "unknown" else name or "(none)", x, y))
    title = f"What was picked, by {'pass rate' if by == 'difficulty' else by}"
    if value == "lift":
        says = "Share of each round's picks over the share of its candidates."
        return Figure(f"lift-by-{by}", title, says, "lines", series, "Step", "Lift", categories=True, named=by)
    rest = frame[~frame["group"].isin(kept)]
    if len(rest):
        of_round = rest.groupby(["step", "round"])["share"].sum()  # a step may have several rounds
        series.append(Series("other", x, of_round.groupby("step").mean().tolist()))
    note = " A problem counts under each of its tags." if by == "tag" else ""
    most = frame.loc[frame["n"].idxmax()]
    says = (
        f"Share of each round's picks.{note} At step {most['step']}, {100 * most['share']:.0f} % of the picks were "
        f"{most['group'] or '(none)'}, which is {100 * most['candidate_share']:.0f} % of the candidates."
    )
    whole = frame.groupby("round")["share"].sum().max() < 1 + 1e-9  # tags may overlap
    return Figure(
        f"picks-by-{by}", title, says, "stacked bars", series, "Step", "Share of the picks",
        y_kind="percent", y_range=(0, 1) if whole and by != "tag" else None, categories=True,
        named=by,
    )  # fmt: skip


def turning(frame: pd.DataFrame) -> Figure:
    """Figure of `turning.turning`: mean alignment before and after, one point per problem that changed sign."""
    series = []
    for certain, rows in frame.groupby("significant"):
        hover = [
            f"{line.id}: {written(line.before, 'signed')}, then {written(line.after, 'signed')}"
            for line in rows.itertuples()
        ]
        name = "beyond noise" if certain else "within noise"
        series.append(Series(name, rows["before"].tolist(), rows["after"].tolist(), hover=hover))
    x, y = "Mean alignment before", "Mean alignment after"
    says = "Each point is a problem whose mean alignment has one sign before the split and the other after it."
    return Figure("turning", "Problems that changed sign", says, "points", series, x, y, with_table=False)


def clusters(frame: pd.DataFrame, texts: Mapping[str, str] | None = None) -> Figure:
    """Figure of `clusters.clusters`: the map, one point per problem, representatives larger.

    texts: id -> additional hover text.
    """
    series = []
    for number, members in frame.groupby("cluster"):
        hover = [
            f"{line.id} · {line.source} · pass rate {100 * line.pass_rate:.0f} %"
            + (f" · {first_words(texts[line.id], 90)}" if texts else "")
            for line in members.itertuples()
        ]
        x, y = (members[axis].round(4).tolist() for axis in ("x", "y"))
        series.append(Series(cluster_name(number), x, y, hover=hover, large=members["representative"].tolist()))
    says = (
        "Each point is a problem; near points have gradients that point the same way, as far as two principal "
        "components can show. Point at one to read it; the large ones are the most typical of their cluster."
    )
    x_label, y_label = "First principal component", "Second principal component"
    return Figure(
        "map", "Map of the gradients", says, "points", series, x_label, y_label, with_table=False,
        named="cluster",
    )  # fmt: skip


def cluster_name(number: int) -> str:
    """Name of a cluster in figures and tables."""
    return "no cluster" if number == NOISE else f"cluster {number}"


def suspicious(frame: pd.DataFrame, first: int = 50) -> Figure:
    """Figure of `suspicion.suspicious`: alignment and pass rate of all problems, with the first ones marked."""
    known = "score" if frame["score"].notna().any() else "own"
    series = []
    for name, rows in (("the rest", frame.iloc[first:]), (f"the {min(first, len(frame))} first", frame.iloc[:first])):
        hover = [
            f"{line.rank}. {line.id} · {line.source}" + (f" · {line.why}" if line.why else "")
            for line in rows.itertuples()
        ]
        series.append(Series(name, rows["pass_rate"].tolist(), rows[known].tolist(), hover=hover))
    what = "Cosine with the benchmark" if known == "score" else "Pull along the own source"
    says = "Each point is a problem with a gradient."
    return Figure("suspicious", "Suspicious rewards", says, "points", series, "Pass rate", what, with_table=False)


def conflict(frame: pd.DataFrame, value: str = "cosine") -> Figure:
    """Figure of `conflict.conflict`: `cosine`, `correlation` or `rank_correlation` of each pair, by step.

    A frame of a single step gives a heatmap of all pairs.
    """
    what = {
        "cosine": "Cosine between the targets",
        "correlation": "Correlation of the scores",
        "rank_correlation": "Rank correlation of the scores",
    }[value]
    says = "Blue: the benchmarks want the same; red: what helps one harms the other."
    if frame["step"].nunique() > 1:
        says = "Above 0 the benchmarks want the same; below it what helps one harms the other."
        lines = [
            Series(f"{a} and {b}", rows["step"].tolist(), rows[value].tolist())
            for (a, b), rows in frame.groupby(["a", "b"], sort=False)
        ]
        return Figure(f"conflict-{value}s", what, says, "lines", lines, "Step", what, y_kind="signed")
    of = {frozenset(pair): each for *pair, each in frame[["a", "b", value]].itertuples(index=False)}
    names = list(dict.fromkeys([*frame["a"], *frame["b"]]))
    rows = [Series(a, names, [of.get(frozenset((a, b)), 1.0 if a == b else math.nan) for b in names]) for a in names]
    return Figure(
        f"conflict-{value}s", what, says, "heatmap", rows, "Benchmark", "Benchmark",
        y_range=(-1.0, 1.0), categories=True, y_kind="signed",
    )  # fmt: skip


def layers(frame: pd.DataFrame, value: str = "share") -> Figure:
    """Figure of `layers.layers`: `share`, `term` or `energy` of each layer, by step."""
    what, says = {
        "share": ("Share of the score", "Mean absolute term of the score in each layer, as a share of all layers."),
        "term": ("Mean term of the score", "What each layer adds to the mean score, with its sign."),
        "energy": ("Share of the gradient", "Mean share of the squared length of the gradients in each layer."),
    }[value]
    table = frame.pivot(index=["position", "layer"], columns="step", values=value).sort_index()
    x = [str(step) for step in table.columns]
    series = [Series(name, x, row.tolist()) for (_, name), row in zip(table.index, table.to_numpy(), strict=True)]
    kind: Kind = "signed" if value == "term" else "percent"
    span = None if value == "term" else (0.0, float(frame[value].max()))
    return Figure(
        f"layers-{value}", f"{what} by layer", says, "heatmap", series, "Step", "Layer",
        y_kind=kind, y_range=span, categories=True,
    )  # fmt: skip


def _agreement_range(series: Sequence[Series]) -> tuple[float, float]:
    """Axis range from 0 (or the lowest value) to full agreement, the same in all agreement figures."""
    lowest = min((y for one in series for y in one.y if math.isfinite(y)), default=0.0)
    return min(0.0, lowest) - 0.05, 1.05
