"""Drift of targets and rankings over steps, with noise floors; staleness.py has the half-life of sketches.

Dimension letters: S steps, P problems, D sketch dimensions.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from gradstore import State, Store
from gradstore.analysis.agreement import (
    LEAST_RANKED,
    calibrated,
    centred_ranks,
    chance,
    jaccard_of_orders,
    order,
    overlap_of_orders,
    pearson,
)
from gradstore.analysis.noise import RankReliability, measurement_noise, rank_reliability
from gradstore.analysis.staleness import half_life, staleness
from gradstore.analysis.trajectory import Trajectory, measured_steps, steps_of, target_at, trajectory
from gradstore.engine.searching.query import Metric

__all__ = ["half_life", "ranking_drift", "staleness", "target_drift", "tells_noise"]

_BLOCK = 512
"""Number of problems whose gradients are in memory at once."""
_TOO_GOOD = 0.995
"""An extrapolated reliability above this may have been clipped to 1."""


def target_drift(store: Store, benchmark: str, steps: Sequence[int] | None = None) -> pd.DataFrame:
    """Cosine between the benchmark's targets at each pair of steps, and its noise floor; one row per pair.

    Columns: step, other int64 (step <= other), cosine float64, noise float64 (cosine expected for other rollouts of the
    benchmark and an unchanged policy; nan if fewer than three problems were measured at both of two successive steps),
    length float64 (|t| at `other`), n_live int64 (at `other`), consecutive bool. Steps without a live problem are left
    out. Formula of `noise`: docs/analysis.md.
    """
    found = []
    for step in steps_of(store, benchmark, steps).tolist():
        wanted = target_at(store, benchmark, step)
        if wanted is not None:
            found.append((step, wanted.vector.astype(np.float64), wanted.n_live))
    energies = _noise_energies(store, benchmark, [step for step, _, _ in found])
    rows = []
    for j, (other, other_D, n_live) in enumerate(found):
        for i, (step, vector_D, _) in enumerate(found[: j + 1]):
            length, length_before = float(np.linalg.norm(other_D)), float(np.linalg.norm(vector_D))
            unchanged = (length**2 + length_before**2 - energies[i] - energies[j]) / (2 * length * length_before)
            cosine = float(vector_D @ other_D / (length_before * length))
            noise = float(np.clip(unchanged, 0, 1)) if i < j else 1.0
            rows.append((step, other, cosine, noise, length, n_live, i == j - 1))
    return pd.DataFrame(rows, columns=["step", "other", "cosine", "noise", "length", "n_live", "consecutive"])


def ranking_drift(
    store: Store,
    pool: str,
    benchmark: str,
    k: int | None = None,
    metric: Metric = "cosine",
    steps: Sequence[int] | None = None,
    *,
    reliability: float | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Agreement of the pool's ranking at each step with the previous step's and the first step's.

    Only problems live at both steps are compared. k: size of the compared top-k sets (None: a tenth of the common
    problems). reliability: rank reliability of a score; None: estimated from the store (`noise.rank_reliability`).

    Columns: step, other int64 (other < step), against (`previous` or `first`), n int64 (common problems), k int64,
    spearman, jaccard, rbo float64, refreshed float64 (share measured again in between), noise_spearman, noise_jaccard,
    noise_rbo float64 (noise floors of the three; nan if unknown), reliability float64, noise_from (`probes`, `repeats`,
    `given`, `none`).
    """
    seen = trajectory(store, pool, benchmark, metric, steps)
    ranked = np.flatnonzero(np.isfinite(seen.scores_SP).any(axis=1)).tolist()
    if reliability is None:
        trust = rank_reliability(store, pool, benchmark)
    else:
        trust = RankReliability(reliability, "given", 0)
    noise_P = _score_noise(store, pool, benchmark, metric, seen, trust.value, seed)
    ranks = _Ranks(seen.scores_SP)
    rows: dict[str, list[tuple]] = {"previous": [], "first": []}
    for a, b in pairwise(ranked):
        for other, against in ((a, "previous"), (ranked[0], "first")):
            if other == a and against == "first":  # the same pair as the one before
                rows[against].append((*rows["previous"][-1][:2], against, *rows["previous"][-1][3:]))
                continue
            both_P = np.isfinite(seen.scores_SP[other]) & np.isfinite(seen.scores_SP[b])
            n = int(both_P.sum())
            best = min(n, k or max(1, n // 10))
            anew_P = seen.row_steps_SP[other, both_P] != seen.row_steps_SP[b, both_P]
            floor = chance(seen.scores_SP[other, both_P].astype(np.float64), noise_P[both_P], anew_P, best, seed=seed)
            (order_x, ranks_x), (order_y, ranks_y) = ranks.of(other, both_P, n), ranks.of(b, both_P, n)
            agreed = (
                pearson(ranks_x, ranks_y) if n >= LEAST_RANKED else float("nan"),
                jaccard_of_orders(order_x, order_y, best),
                overlap_of_orders(order_x, order_y, best),
            )
            refreshed = float(anew_P.mean()) if n else 0.0
            steps_ab = int(seen.steps[b]), int(seen.steps[other])
            rows[against].append((*steps_ab, against, n, best, *agreed, refreshed, *floor, trust.value, trust.source))
        ranks.keep(ranked[0], b)
    columns = ["step", "other", "against", "n", "k", "spearman", "jaccard", "rbo", "refreshed"]
    columns += ["noise_spearman", "noise_jaccard", "noise_rbo", "reliability", "noise_from"]
    return pd.DataFrame([*rows["previous"], *rows["first"]], columns=columns)


class _Ranks:
    """Order and centred ranks of the scores at a step, kept while all its scores are compared."""

    def __init__(self, scores_SP: np.ndarray) -> None:
        self._scores_SP = scores_SP
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def of(self, step: int, among_P: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(order, centred ranks) of the n scores at the places among_P, bool [P]."""
        scores_P = self._scores_SP[step]
        every = n == np.count_nonzero(np.isfinite(scores_P))
        if every and step in self._kept:
            return self._kept[step]
        found = order(scores_P[among_P]), centred_ranks(scores_P[among_P])
        if every:
            self._kept[step] = found
        return found

    def keep(self, *steps: int) -> None:
        """Forget all other steps."""
        self._kept = {step: found for step, found in self._kept.items() if step in steps}


def tells_noise(frame: pd.DataFrame) -> bool:
    """Whether the noise floor of a `ranking_drift` frame is reliable.

    An extrapolation from few steps may exceed full agreement and is then clipped to 1, which carries no information.
    """
    trust = float(frame["reliability"].iloc[-1])
    return math.isfinite(trust) and (str(frame["noise_from"].iloc[-1]) != "repeats" or trust < _TOO_GOOD)


def _score_noise(
    store: Store, pool: str, benchmark: str, metric: Metric, seen: Trajectory, reliability: float, seed: int
) -> np.ndarray:
    """Standard deviation of each problem's score over draws of its rollouts, float64 [P]; nan if unknown.

    Repeated measurements give the proportions between problems. The reliability gives the common scale, at the step
    with the most scores.
    """
    repeats = trajectory(store, pool, benchmark, metric, measured_steps(store, pool))
    proportions_P = measurement_noise(repeats.measured.astype(np.float64))
    if not (np.isfinite(proportions_P).all() and proportions_P.any()):
        proportions_P = np.ones(len(seen.ids))
    known_SP = np.isfinite(seen.scores_SP)
    most = int(known_SP.sum(axis=1).argmax())
    there_P = known_SP[most]
    noise_P = proportions_P.copy()
    found_P = calibrated(
        seen.scores_SP[most, there_P].astype(np.float64), proportions_P[there_P], reliability, seed=seed
    )
    noise_P *= found_P[0] / proportions_P[there_P][0] if len(found_P) else np.nan
    return noise_P


def _noise_energies(store: Store, benchmark: str, steps: Sequence[int]) -> np.ndarray:
    """Noise energy E|t - E t|^2 of the target t at each step, over draws of the rollouts: float64 [steps].

    It comes from successive steps. With e_v the change of problem v's gradient, sum |e_v - mean e|^2 / (n (m - 1)) over
    the m problems measured again is the noise of both targets together; a change common to all problems is drift. A
    step's energy is half the mean of its one or two differences.
    """
    differences = np.full(len(steps) + 1, np.nan)  # [i + 1]: between steps i and i + 1
    for i, (step, other) in enumerate(pairwise(steps)):
        before, after = store.view(benchmark, step), store.view(benchmark, other)
        at = after.positions(before.ids.tolist(), strict=False)
        here = np.flatnonzero((at >= 0) & (before.states != State.FAILED))
        there = at[here]
        anew = (after.steps[there] != before.steps[here]) & (after.states[there] != State.FAILED)
        here, there = here[anew], there[anew]
        m, n = len(here), int((after.states != State.FAILED).sum())
        if m < 3:
            continue
        total_D, squares = np.zeros(after.dim), 0.0
        for start in range(0, m, _BLOCK):
            old, new = here[start : start + _BLOCK], there[start : start + _BLOCK]
            change_PD = after.rows(new) * after.norms[new, None].astype(np.float64)
            change_PD -= before.rows(old) * before.norms[old, None].astype(np.float64)
            total_D += change_PD.sum(axis=0)
            squares += float((change_PD**2).sum())
        differences[i + 1] = (squares - float(total_D @ total_D) / m) / ((m - 1) * n)
    sides = np.stack([differences[:-1], differences[1:]])
    known = np.isfinite(sides)
    return np.divide(
        np.where(known, sides, 0).sum(axis=0),
        2 * known.sum(axis=0),
        where=known.any(axis=0),
        out=np.full(len(steps), np.nan),
    )
