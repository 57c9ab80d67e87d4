"""Section on drift: how targets and rankings moved over steps, compared with noise."""

import math
from dataclasses import replace

from gradstore.analysis import drift, figures
from gradstore.analysis.agreement import SIMULATED
from gradstore.analysis.report.findings import Findings
from gradstore.analysis.report.pieces import Figure, Section, Table, columns_of


def drifting(found: Findings) -> Section:
    """Section on the drift of targets and rankings, and on the half-life of sketches."""
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
    if not frame["consecutive"].any():
        return None
    return replace(figures.target_drift(frame), key=f"target-{name}", title=f"Target of {name}")


def _ranking_figures(found: Findings, name: str) -> list[Figure]:
    frame = found.ranking_drift[name]
    if frame.empty:
        return []
    described = []
    for measure in ("spearman", "jaccard", "rbo") if name == found.main else ("spearman",):
        one = figures.ranking_drift(frame, measure)
        says = one.says
        if frame["n"].max() > SIMULATED:
            says += f" The noise floor is that of {SIMULATED:,} problems drawn at random."
        described.append(
            replace(one, key=f"{one.key}-{name}", title=f"Ranking against {name}: {one.y_label}", says=says)
        )
    return described


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
    columns = columns_of(
        "Benchmark:id | Source | Half-life (steps):number | 5 %:number | 95 %:number | "
        "Agreement at age 0:signed | Problems:integer | Longest age (steps):integer | Note"
    )
    return Table(
        "half-lives",
        "How long a sketch stays good",
        columns,
        rows,
        says="Steps after which the scores of old sketches have lost half of their rank agreement with fresh ones. A "
        "half-life far beyond the longest age seen is a guess.",
    )
