"""Caveats at the top of the page, each as one plain sentence."""

import numpy as np

from gradstore.analysis import alignment, curricula, drift
from gradstore.analysis.report.findings import Findings
from gradstore.analysis.report.pieces import SURE, written
from gradstore.attachments import read_coverage
from gradstore.engine.searching.notices import notices
from gradstore.engine.searching.targets import target
from gradstore.errors import RequestError

MUCH = 0.25
"""Share of the pool above which something gets a sentence."""
UNRELIABLE = 0.7
SEEN = 0.95
"""Gradient coverage below which a ranking may differ from that of the full gradient."""
FEW_LIVE = 20
ENOUGH_STEPS = 5
"""Minimum measured steps for a drift warning based on a noise floor extrapolated to age 0."""


def caveats(found: Findings) -> list[str]:
    """Warnings, the most important first; empty if there are none."""
    lines = _coverage(found)
    lines += _states(found)
    lines += _benchmarks(found)
    lines += _notices(found)
    lines += _noise(found)
    lines += _age(found)
    lines += _hindsight(found)
    lines += _rounds(found)
    for name, about in found.about["collections"].items():
        if about["interrupted_writer"]:
            lines.append(f"Writing to {name} was interrupted; the same command goes on from there.")
    return lines


def _coverage(found: Findings) -> list[str]:
    kept = read_coverage(found.store.path)
    seen = 1.0 if kept is None else kept["parameters"] if kept["gradient"] is None else kept["gradient"]
    if kept is None or seen >= SEEN:
        return []
    of = "parameters that train" if kept["gradient"] is None else "squared gradient"
    names = ", ".join(part["name"] for part in kept["left_out"][:4])
    return [f"The sketches see {written(seen, 'percent')} of the {of}; left out: {names}."]


def _states(found: Findings) -> list[str]:
    if not found.benchmarks:
        return ["No benchmark in this store has a target, so nothing is ranked: collect rollouts of one."]
    table = alignment.states(found.alignments[found.main])
    lines = []
    silent = table[(table["state"] == "no_signal") & (table["share"] >= MUCH)]
    if len(silent):
        worst = silent.loc[silent["share"].idxmax()]
        often = f" (and at least {written(MUCH, 'percent')} at {len(silent)} of {len(found.steps)} steps)"
        more = often if len(silent) > 1 else ""
        lines.append(
            f"{written(worst['share'], 'percent')} of the problems had no signal at step {worst['step']}{more}: "
            "their rollouts were all rewarded alike, or their gradients cancel."
        )
    last = table[table["step"] == found.steps[-1]].set_index("state")  # empty if the view at that step is
    n_failed, unmeasured = int(last["n"].get("failed", 0)), float(last["share"].get("unmeasured", 0.0))
    if n_failed:
        lines.append(f"{n_failed} problems failed at step {found.steps[-1]}: their gradient is not a number.")
    if unmeasured >= MUCH:
        lines.append(f"{written(unmeasured, 'percent')} of the problems were not measured yet.")
    never = found.store.n_problems(found.pool) - len(found.store.deleted(found.pool))
    never -= len(found.store.view(found.pool))
    if never > 0:
        lines.append(f"{never} problems of {found.pool} have never been measured and appear nowhere on this page.")
    return lines


def _benchmarks(found: Findings) -> list[str]:
    lines = []
    for name in found.benchmarks:
        live = int(found.store.view(name).live.sum())
        if live < FEW_LIVE:
            lines.append(f"The target of {name} rests on {live} problems with a gradient; more would make it steadier.")
    return lines


def _notices(found: Findings) -> list[str]:
    """What a query of the main benchmark would say."""
    if not found.benchmarks:
        return []
    view = found.store.view(found.pool)
    scores = found.newest[found.main]["score"].to_numpy(float)
    best = float(np.nanmax(scores)) if np.isfinite(scores).any() else None
    said = notices(view, [target(found.store, found.main)], best)
    return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in said]


def _noise(found: Findings) -> list[str]:
    lines = []
    for name in found.benchmarks:
        frame = found.ranking_drift[name]
        if frame.empty:
            continue
        trust = float(frame["reliability"].iloc[-1])
        if not drift.tells_noise(frame):
            lines.append(
                f"How reliable the ranking against {name} is cannot be told here: probes, or more steps, would."
            )
        elif trust < UNRELIABLE:
            lines.append(
                f"The ranking against {name} has a reliability of {trust:.2f}: that is how well it would agree with "
                "one from new rollouts. Single ranks mean little."
            )
        last = frame[frame["against"] == "previous"].iloc[-1]
        sure = drift.tells_noise(frame) and (last["noise_from"] == "probes" or len(found.steps) >= ENOUGH_STEPS)
        if sure and last["spearman"] < last["noise_spearman"] - 0.1:
            lines.append(
                f"Between steps {last['other']} and {last['step']} the ranking against {name} moved more than noise "
                f"explains (Spearman {last['spearman']:.2f}, noise alone {last['noise_spearman']:.2f})."
            )
    return lines


def _age(found: Findings) -> list[str]:
    if not found.benchmarks or len(found.steps) < 2:
        return []
    ages = found.newest[found.main]["age"].to_numpy()
    old = float(np.mean(ages[np.isfinite(ages)] > 0)) if np.isfinite(ages).any() else 0.0
    if old < MUCH:
        return []
    return [
        f"{written(old, 'percent')} of the problems were last measured before step {found.steps[-1]}, "
        f"{np.nanmax(ages):.0f} steps ago at most."
    ]


def _hindsight(found: Findings) -> list[str]:
    """A sentence where the trained picks did worse than random ones."""
    if not found.benchmarks or not found.rounds:
        return []
    try:
        judged = found.judged
    except RequestError:  # for example rows of several bases; the section on selections says why
        return []
    mine = judged[judged["selector"] == curricula.TRAINED]
    worse = mine[mine["gained"] < mine["chance"] - SURE * mine["chance_error"]]
    if worse.empty:
        return []
    steps = ", ".join(str(step) for step in worse["step"])
    return [
        f"In hindsight the picks of the rounds at steps {steps} did worse than as many random ones would have: compare "
        "the selectors below before the next round."
    ]


def _rounds(found: Findings) -> list[str]:
    return [f"Round {one.number}: {text}" for one in found.rounds for text in one.about.get("warnings") or []]
