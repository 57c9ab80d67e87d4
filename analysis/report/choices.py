"""Sections on selections, round by round: the picks, what other selectors would have picked, and costs."""

from dataclasses import replace

import numpy as np
import pandas as pd

from gradstore.analysis import curricula, figures
from gradstore.analysis.report.findings import Findings, mean_or_nan
from gradstore.analysis.report.pieces import Figure, Section, Series, Table, columns_of, written
from gradstore.rounds import Round

_SHOWN = ("cosine", "accgreedy", "rand", curricula.TRAINED, curricula.BEST)


def selections(found: Findings) -> Section:
    """Section on every recorded round and on counterfactual curricula."""
    if not found.rounds:
        missing = "No selection round is recorded in this store; `gradstore train` and the round driver record them."
        return Section("selections", "Selections", missing=missing)
    blocks: list[Figure | Table] = [_rounds(found)]
    if found.benchmarks:
        frame, judged = found.counterfactual, found.judged
        if not judged.empty:
            blocks.append(_gained(found, judged))
        if not frame.empty:
            blocks.append(_compared(found, frame, judged))
    lead = (
        "What each round took from its candidates, and what other selectors would have taken at the same moment. In "
        "hindsight a pick is judged by the first measurement after its round, from other rollouts than it was picked "
        "by."
    )
    return Section("selections", "Selections", lead, blocks)


def _rounds(found: Findings) -> Table:
    rows = []
    before: set[str] = set()
    for one in found.rounds:
        picked = found.picked[one.number]
        table = one.table
        chosen = table["picked"].to_numpy() >= 0
        scores, rates = table["score"].to_numpy(), table["pass_rate"].to_numpy()
        no_signal = sum(state == "no_signal" for state in table["state"].to_pylist())
        rows.append(
            [
                one.number,
                one.step,
                str(one.about.get("selector", "–")),
                len(table),
                _seen(one),
                int(np.sum(table["rolled_out"].to_numpy(zero_copy_only=False))),
                len(picked),
                no_signal / max(1, len(table)),
                mean_or_nan(scores[chosen]),
                mean_or_nan(scores[~chosen]),
                mean_or_nan(rates[chosen]),
                len(picked & before) / max(1, len(picked)) if before else float("nan"),
            ]
        )
        before = picked
    columns = columns_of(
        "Round:integer | Step:integer | Selector | Candidates:integer | Pool seen:percent | Rolled out:integer | "
        "Picked:integer | No signal:percent | Score, picked:signed | Score, left:signed | "
        "Pass rate, picked:percent | Picked before:percent"
    )
    says = (
        "Pool seen: share of the pool's problems that were candidates up to then. Picked before: share of the picks "
        "that the round before had taken too."
    )
    return Table("rounds", "Rounds", columns, rows, says=says)


def _seen(one: Round) -> float:
    """Share of the pool that was a candidate up to the round; nan where its record does not say."""
    pool = one.about.get("pool")
    return pool["seen"] / pool["problems"] if pool else float("nan")


def _gained(found: Findings, frame: pd.DataFrame) -> Figure:
    used = {str(one.about.get("selector")) for one in found.rounds}
    shown = [name for name in _SHOWN if used != {name}]  # it would repeat the line of the trained picks
    frame = pd.concat([frame[frame["selector"] == name] for name in shown])
    says = (
        f"Mean {found.metric} of the picks with {found.main}, judged in hindsight. The dashed line is the most that "
        "any choice of as many problems could have had. Rounds after which nothing was measured again are left out."
    )
    described = figures.counterfactual(frame, words={curricula.TRAINED: f"trained on ({', '.join(sorted(used))})"})
    return replace(described, says=says, y_label="Mean alignment of the picks")


def _compared(found: Findings, frame: pd.DataFrame, judged: pd.DataFrame) -> Table:
    rows, errors = [], []
    for name in dict.fromkeys(frame["selector"]):
        mine, later = frame[frame["selector"] == name], judged[judged["selector"] == name]
        rows.append(
            [
                figures.SELECTORS.get(name, name),
                float(mine["n"].mean()),
                mean_or_nan(mine["overlap"]),
                mean_or_nan(mine["alignment"]),
                mean_or_nan(later["gained"]),
                mean_or_nan(later["gained"] - later["chance"]),
                mean_or_nan(later["regret"]),
                mean_or_nan(later["judged_later"]),
                next((note for note in mine["note"] if note), ""),
            ]
        )
        errors.append(error_of_mean(later["chance_error"]))
    columns = columns_of(
        "Selector | Picks:integer | Overlap with trained on:percent | Alignment when picked:signed | "
        "Alignment in hindsight:signed | Better than chance:signed | Regret:number | Judged later:percent | Note"
    )
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    says = (
        "Means over the rounds, from hindsight on over those after which something was measured again. Better than "
        "chance: than as many problems drawn at random from the same candidates, grey where such a draw could be as "
        "good (two standard deviations). Regret: what "
        "the best choice in hindsight would have gained more. Judged later: share of the picks that were measured "
        "again afterwards; the others are judged by the measurement they were picked by."
    )
    noise = {"Better than chance": errors}
    return Table("selectors", f"Selectors against {found.main}", columns, rows, says=says, errors=noise)


def error_of_mean(errors: pd.Series) -> float:
    """Standard error of the mean of values with these separate errors; nan if there are none."""
    return float(np.sqrt((errors**2).sum()) / len(errors)) if len(errors) else float("nan")


def costs(found: Findings) -> Section:
    """Section on the seconds of each stage, round by round."""
    timed = [one for one in found.rounds if one.about.get("costs")]
    if not timed:
        return Section("costs", "Costs", missing="No round recorded what its stages cost.")
    stages: dict[str, float] = {}
    for one in timed:
        for stage, seconds in one.about["costs"].items():
            stages[stage] = stages.get(stage, 0.0) + float(seconds)
    order = sorted(stages, key=lambda stage: -stages[stage])
    x = [str(one.step) for one in timed]
    series = [Series(stage, x, [float(one.about["costs"].get(stage, 0.0)) for one in timed]) for stage in order]
    total = sum(stages.values())
    says = (
        f"Wall time of each stage of each round. {order[0].capitalize()} took "
        f"{100 * stages[order[0]] / max(total, 1e-12):.0f} % of the time."
    )
    figure = Figure(
        "costs-by-round",
        "Where the time went",
        says,
        "stacked bars",
        series,
        "Step",
        "Seconds",
        y_kind="seconds",
        categories=True,
        named="stage",
    )
    rollouts = [one.about.get("rollouts") for one in timed]
    rows = [[stage, stages[stage], stages[stage] / max(total, 1e-12)] for stage in order]
    rows.append(["all stages", total, 1.0])
    columns = columns_of("Stage | Time:seconds | Share:percent")
    known = [int(count) for count in rollouts if count is not None]
    lead = f"{len(timed)} rounds" + (f" with {written(sum(known), 'integer')} rollouts in all." if known else ".")
    return Section("costs", "Costs", lead, [figure, Table("stages", "Stages", columns, rows)])
