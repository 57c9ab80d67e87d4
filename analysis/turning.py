"""Problems that turned from helpful to harmful, or the other way: a change of sign that noise does not explain.

Dimension letters: S steps, P problems.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats  # type: ignore[import-untyped]

from analysis.trajectory import steps_of, trajectory
from engine.searching.query import Metric
from gradstore import Store
from gradstore.errors import RequestError

COLUMNS = [
    "id", "source", "turned", "before", "after", "n_before", "n_after", "z_before", "z_after", "p_value", "q_value",
    "significant", "split", "noise",
]  # fmt: skip


def turning(
    store: Store,
    pool: str,
    benchmark: str,
    metric: Metric = "cosine",
    steps: Sequence[int] | None = None,
    *,
    split: int | None = None,
    noise: float | None = None,
    level: float = 0.1,
) -> pd.DataFrame:
    """Problems whose mean alignment has one sign before a step and the other after it, the surest first.

    Only scores of rows computed at their very step count: each from rollouts of its own. split: the first step of
    "after" (None: the middle one of the steps at which the pool was measured). noise: standard deviation of one
    measured score (None: estimated, `measurement_noise`). With n measurements a mean has z = mean sqrt(n) / noise; both
    means have to differ from 0 on their side, so that p = max(p_before, p_after), each one-sided (an
    intersection-union test, Berger 1982); q_value: Benjamini and Hochberg (1995) over the problems measured on both
    sides, in both directions. significant: q_value <= level.

    Columns: id, source, turned (`harmful`, `helpful`), before, after float64 (mean scores), n_before, n_after int64,
    z_before, z_after, p_value, q_value float64, significant bool, split int64, noise float64.
    Only problems that change sign have a row. RequestError where the pool was measured at fewer than two steps.
    """
    seen = trajectory(store, pool, benchmark, metric, steps_of(store, pool, steps).tolist())
    measured_SP = seen.measured.astype(np.float64)
    used = np.flatnonzero(np.isfinite(measured_SP).any(axis=1))
    if len(used) < 2:
        raise RequestError(f"collection {pool!r} was scored at {len(used)} steps: a change needs at least two")
    middle = int(seen.steps[used[len(used) // 2]]) if split is None else split
    early = seen.steps < middle
    sigma = measurement_noise(measured_SP) if noise is None else noise
    before_P, n_before_P = _means(measured_SP[early])
    after_P, n_after_P = _means(measured_SP[~early])
    both_P = (n_before_P > 0) & (n_after_P > 0)
    z_before_P = before_P * np.sqrt(n_before_P) / sigma
    z_after_P = after_P * np.sqrt(n_after_P) / sigma
    # Each direction is a hypothesis of its own: two for every problem measured on both sides.
    harmful_P = np.maximum(stats.norm.sf(z_before_P), stats.norm.cdf(z_after_P))
    helpful_P = np.maximum(stats.norm.cdf(z_before_P), stats.norm.sf(z_after_P))
    places = np.flatnonzero(both_P)
    q_values = np.ones(2 * len(places))
    if len(places):
        q_values = stats.false_discovery_control(np.concatenate([harmful_P[places], helpful_P[places]]), method="bh")
    frames = []
    for name, p_P, q in (
        ("harmful", harmful_P, q_values[: len(places)]),
        ("helpful", helpful_P, q_values[len(places) :]),
    ):
        sign = 1 if name == "harmful" else -1
        turned = (sign * before_P[places] > 0) & (sign * after_P[places] < 0)
        at = places[turned]
        frames.append(
            pd.DataFrame(
                {
                    "id": seen.ids[at],
                    "source": seen.sources[at],
                    "turned": name,
                    "before": before_P[at],
                    "after": after_P[at],
                    "n_before": n_before_P[at],
                    "n_after": n_after_P[at],
                    "z_before": z_before_P[at],
                    "z_after": z_after_P[at],
                    "p_value": p_P[at],
                    "q_value": q[turned],
                    "significant": q[turned] <= level,
                    "split": middle,
                    "noise": sigma,
                }
            )
        )
    whole = pd.concat(frames, ignore_index=True)
    return whole.sort_values(["p_value", "id"], ignore_index=True)[COLUMNS]


def measurement_noise(measured_SP: np.ndarray) -> float:
    """Standard deviation of one measured score, from differences of successive measurements of the same problem:
    1.4826 median |difference| / sqrt(2). Robust against the few that really change; drift makes it too large, which
    errs on the safe side. measured_SP: nan where not measured. nan where no problem was measured twice.
    """
    differences = [column[np.isfinite(column)] for column in measured_SP.T]
    steps = np.concatenate([np.abs(np.diff(values)) for values in differences] or [np.empty(0)])
    return float(1.4826 * np.median(steps) / np.sqrt(2)) if len(steps) else float("nan")


def _means(measured_SP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the measurements of each problem (nan without any), and how many."""
    n_P = np.isfinite(measured_SP).sum(axis=0)
    sums_P = np.nansum(measured_SP, axis=0)
    return np.divide(sums_P, n_P, out=np.full(len(n_P), np.nan), where=n_P > 0), n_P
