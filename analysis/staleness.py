"""Staleness of rows: rank agreement with fresh rows by age, and a fitted half-life (docs/analysis.md).

Only problems measured at both steps count, so no row is compared with itself.

Dimension letters: S steps, P problems.
"""

from collections.abc import Hashable, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]
from scipy.stats import t as student  # type: ignore[import-untyped]

from gradstore import Store
from gradstore.analysis.agreement import spearman
from gradstore.analysis.trajectory import measured_steps, target_at
from gradstore.engine.searching.query import Metric, query_vectors, score_rows
from gradstore.errors import RequestError

LEAST_PROBLEMS = 10
"""Minimum number of common problems for a rank agreement."""
MOST_PAIRED = 24
"""Maximum steps of the pool that are paired, unless steps are given."""
_BLOCKS = 10
"""Number of problem blocks for a half-life's interval."""


def staleness(
    store: Store,
    pool: str,
    benchmark: str,
    by: str | None = None,
    metric: Metric = "cosine",
    steps: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Rank agreement of stale with fresh rows, one row per pair of steps (and group).

    Rows computed at `stale_step` and rows of the same problems computed at `step` are both scored against the target at
    `step`. The difference is the loss from not rolling out again. by: None, or `source`. steps: None: those of the
    pool, at most 24 (`measured_steps`). Picked problems are measured more often, so they count more often here.
    Columns: group (`all`, or the source), stale_step, step, age int64, n int64 (problems), spearman float64.
    """
    pairs, _ = _paired_once(store, pool, benchmark, metric, steps)
    labels, group_N = _groups(store, pool, by)
    rows = []
    for stale_step, step, places_P, stale_P, fresh_P in pairs:
        for group, label in enumerate(labels):
            of_P = group_N[places_P] == group
            if of_P.sum() >= LEAST_PROBLEMS:
                rho = spearman(stale_P[of_P], fresh_P[of_P])
                rows.append((label, stale_step, step, step - stale_step, int(of_P.sum()), rho))
    return pd.DataFrame(rows, columns=["group", "stale_step", "step", "age", "n", "spearman"])


def half_life(
    store: Store,
    pool: str,
    benchmark: str,
    by: str | None = None,
    metric: Metric = "cosine",
    steps: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Half-life of rows in training steps: the age at which rank agreement with fresh rows is halved.

    Fits spearman = reliability 2^(-age / half_life) to the frame of `staleness`; the arguments are the same. Columns:
    group (`all`, or the source), half_life float64 (steps; inf: no loss seen), low, high float64 (90 % interval over
    ten blocks of problems; nan if there are too few), reliability float64 (agreement at age 0, limited by the noise of
    two measurements), n_problems, n_pairs int64, longest int64 (longest age seen; a longer half-life is an
    extrapolation). Groups with fewer than two ages are left out.
    """
    pairs, lives = _paired_once(store, pool, benchmark, metric, steps)
    if by not in lives:
        lives[by] = _lives(pairs, *_groups(store, pool, by))
    return lives[by].copy()


def _lives(pairs: "list[Pair]", labels: list[str], group_N: np.ndarray) -> pd.DataFrame:
    block_of = np.random.default_rng(0).permutation(len(group_N)) % _BLOCKS
    rows = []
    for group, label in enumerate(labels):
        ages, rhos, weights, is_member_N = [], [], [], np.zeros(len(group_N), bool)
        blocks: list[list[tuple[int, float, int]]] = [[] for _ in range(_BLOCKS)]
        for stale_step, step, places_P, stale_P, fresh_P in pairs:
            of_P = group_N[places_P] == group
            if of_P.sum() < LEAST_PROBLEMS:
                continue
            x_P, y_P, block_P = stale_P[of_P], fresh_P[of_P], block_of[places_P[of_P]]
            ages.append(step - stale_step)
            rhos.append(spearman(x_P, y_P))
            weights.append(len(x_P))
            is_member_N[places_P[of_P]] = True
            for number, block in enumerate(blocks):
                inside_P = block_P == number
                if inside_P.sum() >= LEAST_PROBLEMS:
                    rho = spearman(x_P[inside_P], y_P[inside_P])
                    block.append((step - stale_step, rho, int(inside_P.sum())))
        if len(set(ages)) < 2:
            continue
        rate, start = decay(np.array(ages), np.array(rhos), np.array(weights))
        low, high = _interval(rate, [np.array(block) for block in blocks if len({age for age, _, _ in block}) > 1])
        rows.append((label, _life(rate), low, high, start, int(is_member_N.sum()), len(ages), max(ages)))
    columns = ["group", "half_life", "low", "high", "reliability", "n_problems", "n_pairs", "longest"]
    return pd.DataFrame(rows, columns=columns)


def decay(ages: np.ndarray, rhos: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Fit (rate, start) of rho = start 2^(-rate age) by weighted least squares, rate >= 0 and start in [0, 1].

    For a given rate, the best start has a closed form. The rate is searched on a grid over six decades, then refined.
    """
    kept = np.isfinite(rhos)
    ages, rhos, weights = ages[kept].astype(float), rhos[kept], weights[kept].astype(float)
    if not len(ages):
        return float("nan"), float("nan")

    def start_of(rate: float) -> float:
        curve = np.exp2(-rate * ages)
        return float(np.clip((weights * curve) @ rhos / ((weights * curve) @ curve), 0, 1))

    def loss(rate: float) -> float:
        return float(weights @ (rhos - start_of(rate) * np.exp2(-rate * ages)) ** 2)

    grid = np.concatenate([[0.0], np.geomspace(1e-4, 1e2, 121) / max(ages.max(), 1)])
    best = int(np.argmin([loss(rate) for rate in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    refined = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6 * high}).x
    rate = min((0.0 if best == 0 else float(grid[best]), float(refined)), key=loss)
    return rate, start_of(rate)


Pair = tuple[int, int, np.ndarray, np.ndarray, np.ndarray]
"""Stale step, step, problem numbers, stale scores, fresh scores."""
Lives = dict[str | None, pd.DataFrame]
"""What `half_life` found, by its argument `by`."""
_last: WeakKeyDictionary[Store, tuple[Hashable, list[Pair], Lives]] = WeakKeyDictionary()
"""The pairs of each open store that were asked for last, and their half-lives, with what they depend on."""


def _paired_once(
    store: Store, pool: str, benchmark: str, metric: Metric, steps: Sequence[int] | None
) -> tuple[list[Pair], Lives]:
    """Each pair of steps with common problems, and a place for their half-lives; kept for the next call."""
    chosen = measured_steps(store, pool, steps, MOST_PAIRED)
    key = pool, benchmark, metric, tuple(chosen), store.commit(pool), store.commit(benchmark)
    if store not in _last or _last[store][0] != key:
        _last[store] = key, _paired(store, pool, benchmark, metric, chosen), {}
    return _last[store][1:]


def _paired(store: Store, pool: str, benchmark: str, metric: Metric, chosen: Sequence[int]) -> list[Pair]:
    found = {step: target_at(store, benchmark, step) for step in chosen}
    targets = {step: one for step, one in found.items() if one is not None}
    fresh: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    pairs = []
    for step in reversed(targets):  # newest first, so that the fresh scores of all later steps are known
        view = store.view(pool, step)
        positions = np.flatnonzero(view.live & (view.steps == step))
        if not len(positions):
            continue
        wanted = [step, *(later for later in fresh)]
        queries_QD = np.concatenate([query_vectors(view, [targets[later]], metric) for later in wanted])
        scores_QP = score_rows(view, queries_QD, metric, positions)[:, positions]
        rows_P = view.problem_numbers[positions]
        for later, stale_P in zip(wanted[1:], scores_QP[1:], strict=True):
            common, at_stale, at_fresh = np.intersect1d(rows_P, fresh[later][0], return_indices=True)
            if len(common):
                pairs.append((step, later, common, stale_P[at_stale], fresh[later][1][at_fresh]))
        fresh[step] = (rows_P, scores_QP[0])
    return sorted(pairs, key=lambda pair: pair[:2])


def _groups(store: Store, pool: str, by: str | None) -> tuple[list[str], np.ndarray]:
    """Names of the groups, sorted, and the group of every problem by its number, int64; None: one group for all."""
    if by is None:
        return ["all"], np.zeros(store.n_problems(pool), np.int64)
    if by != "source":
        raise RequestError(f"half-lives by {by!r}: expected None or 'source'")
    sources = store.problems(pool, columns=["source"])["source"].combine_chunks().dictionary_encode()
    names = sources.dictionary.to_pylist()
    order = sorted(range(len(names)), key=names.__getitem__)
    rank = np.empty(len(names), np.int64)
    rank[order] = np.arange(len(names))
    return [names[place] for place in order], rank[sources.indices.to_numpy()]


def _life(rate: float) -> float:
    return float("inf") if rate <= 0 else 1 / rate


def _interval(rate: float, blocks: list[np.ndarray]) -> tuple[float, float]:
    """90 % interval of the half-life, with the rate's standard error from the blocks' rates."""
    rates = np.array([decay(*block.T)[0] for block in blocks])
    if len(rates) < 3:
        return float("nan"), float("nan")
    error = float(student.ppf(0.95, len(rates) - 1) * rates.std(ddof=1) / np.sqrt(len(rates)))
    return _life(rate + error), _life(rate - error)
