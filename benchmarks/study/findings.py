"""The study's questions, answered in sentences with the deciding figures."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.study.methods import BUDGETED
from benchmarks.study.statistics import Estimate, difference, final_accuracy, of, overhead, selection_rollouts

PROBES = ("lcb", "fdr", "shrunk", "snr")
UNRELIABLE = ("wrong_truths", "coin_flips")

Rows = Sequence[dict[str, Any]]


def findings(rows: Rows, arms: Sequence[str]) -> list[str]:
    """One line per question, for questions whose runs are finished."""
    methods = {row["method"] for row in rows}
    found = _ladder(rows, arms, "oracle", "random", "An oracle that knows the useful problems beats random picks")
    for other in ("random", "accgreedy"):
        found += _ladder(rows, arms, "gradalign", other, f"`gradalign` beats `{other}`")
    probes = [name for name in PROBES if name in methods]
    unreliable = [arm for arm in arms if arm in UNRELIABLE]
    if probes and unreliable:
        best = max(probes, key=lambda name: float(np.mean([_final(rows, arm, name) for arm in unreliable])))
        found += _ladder(
            rows,
            unreliable,
            best,
            "gradalign",
            f"The best probe selector under unreliable rewards, `{best}`, beats `gradalign`",
        )
    for name in sorted(methods):
        if name.startswith(BUDGETED):
            found += _budget(rows, arms, name)
    return found


def _ladder(rows: Rows, arms: Sequence[str], one: str, other: str, claim: str) -> list[str]:
    """Compare two methods: arms where one is above the other, where their intervals do not overlap, and where the
    interval of the seed-by-seed difference is above 0."""
    above, apart, surely, told = [], [], [], []
    for arm in arms:
        ours, theirs = of(rows, arm, one), of(rows, arm, other)
        if not (ours and theirs):
            continue
        a, b = final_accuracy(ours), final_accuracy(theirs)
        above += [arm] if a.mean > b.mean else []
        apart += [arm] if a.above(b) else []
        gain = difference(ours, theirs)
        surely += [arm] if gain.low > 0 else []
        told.append(f"{arm} {a.mean:.3f} against {b.mean:.3f} ({signed(gain)})")
    if not told:
        return []
    return [
        f"{claim}: above in {len(above)} of {len(told)} arms, intervals apart in {len(apart)}, that of the difference "
        f"seed by seed above 0 in {len(surely)}. {'; '.join(told)}."
    ]


def _budget(rows: Rows, arms: Sequence[str], name: str) -> list[str]:
    told, no_worse, n = [], 0, 0
    for arm in arms:
        ours, theirs = of(rows, arm, name), of(rows, arm, "gradalign")
        if not (ours and theirs):
            continue
        n += 1
        gain = difference(ours, theirs)
        no_worse += gain.mean >= 0
        cost = np.mean([selection_rollouts(r) for r in ours]) / np.mean([selection_rollouts(r) for r in theirs])
        told.append(f"{arm} {signed(gain)} at {100 * cost:.1f} % of the rollouts")
    if not told:
        return []
    own = [row for row in rows if row["method"] == name]
    return [
        f"`{name}` is at least as good as `gradalign` in {no_worse} of {n} arms: {'; '.join(told)}. "
        f"Its selection without rollouts takes {100 * float(np.median([overhead(row) for row in own])):.0f} % of the "
        "training seconds."
    ]


def _final(rows: Rows, arm: str, name: str) -> float:
    own = of(rows, arm, name)
    return final_accuracy(own).mean if own else -np.inf


def signed(value: Estimate) -> str:
    """A seed-by-seed difference and its interval as text."""
    interval = "" if np.isnan(value.half) else f" [{value.low:+.3f}, {value.high:+.3f}]"
    return f"{value.mean:+.3f}{interval}"
