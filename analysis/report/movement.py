"""How targets and rankings moved over steps, against what noise alone would do, and through which layers."""

import math

import pandas as pd

from analysis import drift
from analysis.report.findings import Findings
from analysis.report.pieces import Column, Figure, Section, Series, Table

_TOO_GOOD = 0.995
_NOISE_WORDS = {
    "probes": "from the two halves of stored probes",
    "repeats": "extrapolated from problems measured at several steps, a rough guess where those are few",
    "given": "from the reliability given",
}


def drifting(found: Findings) -> Section:
    """Targets, rankings and how long a sketch stays good."""
    lead = (
        "How far the direction a benchmark asks for, and the ranking of the pool, moved between steps. The dashed "
        "line is the noise floor: the agreement that two measurements of an unchanged policy would show. Only what "
        "lies below it is drift."
    )
    if not found.benchmarks:
        return Section("drift", "Drift", missing="No benchmark has a target, so nothing can drift against it.")
    if len(found.steps) < 2:
        return Section("drift", "Drift", missing="Drift needs two steps; the store has one.")
    blocks: list[Figure | Table] = [figure for name in found.benchmarks if (figure := _target_figure(found, name))]
    for name in found.benchmarks:
        blocks += _ranking_figures(found, name)
    lives = _half_lives(found)
    if lives is not None:
        blocks.append(lives)
    if not blocks:
        return Section("drift", "Drift", missing="No benchmark was measured at two steps.")
    return Section("drift", "Drift", lead, blocks, paired=True)


def _target_figure(found: Findings, name: str) -> Figure | None:
    frame = drift.target_drift(found.store, name)
    pairs = frame[frame["step"] != frame["other"]]
    if pairs.empty:
        return None
    first = pairs[pairs["step"] == pairs["step"].min()]
    before = pairs[pairs["consecutive"]]
    series = [
        Series("to the step before", before["other"].tolist(), before["cosine"].tolist()),
        Series("to the first step", first["other"].tolist(), first["cosine"].tolist()),
        Series("noise floor", before["other"].tolist(), before["noise"].tolist(), dashed=True),
    ]
    return Figure(
        f"target-{name}",
        f"Target of {name}",
        f"Cosine between the target at a step and the target one measurement earlier, and that of the first step. "
        f"At step {before['other'].iloc[-1]} it is {before['cosine'].iloc[-1]:.2f} to the one before.",
        "lines",
        series,
        "Step",
        "Cosine",
        y_kind="signed",
        y_range=_agreement_range(series),
    )


def _ranking_figures(found: Findings, name: str) -> list[Figure]:
    frame = drift.ranking_drift(found.store, found.pool, name, metric=found.metric)
    if frame.empty:
        return []
    before, first = frame[frame["against"] == "previous"], frame[frame["against"] == "first"]
    steps, source = before["step"].tolist(), str(frame["noise_from"].iloc[0])
    k = int(before["k"].iloc[-1])
    figures = []
    for key, what, says in (
        ("spearman", "Spearman correlation", "Rank correlation over all problems with a gradient at both steps"),
        ("jaccard", f"Jaccard of the best {k}", f"Share of the union of the two best {k} that is in both"),
        ("rbo", "Rank-biased overlap", f"Overlap of the two rankings from the top down, about {k} deep"),
    ):
        if key != "spearman" and name != found.main:
            continue
        series = [
            Series("to the step before", steps, before[key].tolist()),
            Series("to the first step", first["step"].tolist(), first[key].tolist()),
        ]
        if tells_noise(frame):
            series.append(Series("noise floor", steps, before[f"noise_{key}"].tolist(), dashed=True))
            floor = f" Noise floor {_NOISE_WORDS.get(source, '')}."
        else:
            floor = " The store cannot tell the noise floor: it has no probes, and too few steps."
        figures.append(
            Figure(
                f"ranking-{key}-{name}",
                f"Ranking against {name}: {what}",
                f"{says}.{floor}",
                "lines",
                series,
                "Step",
                what,
                y_kind="signed",
                y_range=_agreement_range(series),
            )
        )
    return figures


def tells_noise(frame: pd.DataFrame) -> bool:
    """Whether the noise floor of a frame of `drift.ranking_drift` can be believed.

    Extrapolated from few steps it may end above full agreement, where it is cut to 1: then it says nothing.
    """
    trust = float(frame["reliability"].iloc[-1])
    return math.isfinite(trust) and (str(frame["noise_from"].iloc[-1]) != "repeats" or trust < _TOO_GOOD)


def _agreement_range(series: list[Series]) -> tuple[float, float]:
    """From 0, or the lowest value, to full agreement: the same scale at every figure of agreement."""
    lowest = min((y for one in series for y in one.y if math.isfinite(y)), default=0.0)
    return min(0.0, lowest) - 0.05, 1.05


def _half_lives(found: Findings) -> Table | None:
    rows = []
    for name in found.benchmarks:
        for by in (None, "source"):
            for line in drift.half_life(found.store, found.pool, name, by, found.metric).to_dict("records"):
                life = line["half_life"]
                longest = int(line["longest"])
                note = "no loss seen" if math.isinf(life) else "extrapolated" if life > longest else ""
                rows.append(
                    [
                        name,
                        "all sources" if line["group"] == "all" and by is None else line["group"],
                        life,
                        line["low"],
                        line["high"],
                        line["reliability"],
                        int(line["n_problems"]),
                        longest,
                        note,
                    ]
                )
    if not rows:
        return None
    columns = [
        Column("Benchmark", "id"),
        Column("Source"),
        Column("Half-life (steps)", "number"),
        Column("5 %", "number"),
        Column("95 %", "number"),
        Column("Agreement at age 0", "signed"),
        Column("Problems", "integer"),
        Column("Longest age (steps)", "integer"),
        Column("Note"),
    ]
    return Table(
        "half-lives",
        "How long a sketch stays good",
        columns,
        rows,
        says="Steps after which the scores of old sketches have lost half of their rank agreement with fresh ones. A "
        "half-life far beyond the longest age seen is a guess.",
    )
