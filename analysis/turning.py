"""Problems that turned from helpful to harmful, or back: changes of sign, tested against noise.

Dimension letters: S steps, P problems.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import special, stats  # type: ignore[import-untyped]

from gradstore import Store
from gradstore.analysis.noise import moderated
from gradstore.analysis.trajectory import measured_steps, trajectory
from gradstore.engine.searching.query import Metric
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
    """Problems whose mean alignment changes sign at a step, one row each, the most certain first.

    Only scores of rows computed at exactly their step count, so each comes from its own rollouts. steps: None: those of
    the pool (`measured_steps`). split: the first step of "after" (None: the middle of the measured steps). noise:
    standard deviation of one measured score, the same for all problems (None: per problem, `noise.moderated`). Both
    means must differ from 0: p = max(p_before, p_after), each one-sided (an intersection-union test, Berger 1982).
    q_value: Benjamini and Hochberg (1995) over the problems measured on both sides, in both directions. significant:
    q_value <= level.

    Columns: id, source, turned (`harmful`, `helpful`), before, after float64 (mean scores), n_before, n_after int64,
    z_before, z_after float64 (the means as normal deviates), p_value, q_value float64, significant bool, split int64,
    noise float64 (standard deviation of one measurement, as used). Only problems that change sign have a row.
    RequestError if the pool was measured at fewer than two steps.
    """
    seen = trajectory(store, pool, benchmark, metric, measured_steps(store, pool, steps))
    measured_SP = seen.measured.astype(np.float64)
    used = np.flatnonzero(np.isfinite(measured_SP).any(axis=1))
    if len(used) < 2:
        raise RequestError(f"collection {pool!r} was scored at {len(used)} steps: a change needs at least two")
    middle = int(seen.steps[used[len(used) // 2]]) if split is None else split
    early = seen.steps < middle
    before_P, n_before_P, squares_before_P = _halves(measured_SP[early])
    after_P, n_after_P, squares_after_P = _halves(measured_SP[~early])
    both = np.flatnonzero((n_before_P > 0) & (n_after_P > 0))
    freedom_P = np.maximum(n_before_P - 1, 0) + np.maximum(n_after_P - 1, 0)
    if noise is None:
        sigma_P, freedom_P = moderated((squares_before_P + squares_after_P)[both], freedom_P[both])
    else:
        sigma_P, freedom_P = np.full(len(both), noise), np.full(len(both), np.inf)
    z_before_P = _deviates(before_P[both], n_before_P[both], sigma_P, freedom_P)
    z_after_P = _deviates(after_P[both], n_after_P[both], sigma_P, freedom_P)
    # Each direction is a separate hypothesis: two for every problem measured on both sides.
    p_values = {
        "harmful": np.maximum(stats.norm.sf(z_before_P), stats.norm.cdf(z_after_P)),
        "helpful": np.maximum(stats.norm.cdf(z_before_P), stats.norm.sf(z_after_P)),
    }
    known = np.isfinite(z_before_P) & np.isfinite(z_after_P)
    corrected = np.full(2 * len(both), np.nan)
    if known.any():
        twice = np.tile(known, 2)
        corrected[twice] = stats.false_discovery_control(np.concatenate(list(p_values.values()))[twice], method="bh")
    rises, falls = before_P[both] < 0, before_P[both] > 0
    masks = {"harmful": falls & (after_P[both] < 0), "helpful": rises & (after_P[both] > 0)}
    parts = []
    for which, (name, turned_P) in enumerate(masks.items()):
        here = np.flatnonzero(turned_P)
        at, q_values = both[here], corrected[which * len(both) + here]
        parts.append(
            pd.DataFrame(
                {
                    "id": seen.ids[at],
                    "source": seen.sources[at],
                    "turned": name,
                    "before": before_P[at],
                    "after": after_P[at],
                    "n_before": n_before_P[at],
                    "n_after": n_after_P[at],
                    "z_before": z_before_P[here],
                    "z_after": z_after_P[here],
                    "p_value": p_values[name][here],
                    "q_value": q_values,
                    "significant": q_values <= level,
                    "split": middle,
                    "noise": sigma_P[here],
                },
                columns=COLUMNS,
            )
        )
    return pd.concat(parts, ignore_index=True).sort_values(["p_value", "id"], ignore_index=True)


def _halves(measured_SP: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean of each problem's measurements, nan without any; their number; sum of squared deviations): [P] each."""
    n_P = np.isfinite(measured_SP).sum(axis=0)
    means_P = np.divide(np.nansum(measured_SP, axis=0), n_P, out=np.full(len(n_P), np.nan), where=n_P > 0)
    return means_P, n_P, np.nansum((measured_SP - means_P) ** 2, axis=0)


def _deviates(means_P: np.ndarray, n_P: np.ndarray, sigma_P: np.ndarray, freedom_P: np.ndarray) -> np.ndarray:
    """Normal deviates with the tail probabilities of t = mean sqrt(n) / sigma."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t_P = means_P * np.sqrt(n_P) / sigma_P
    tails_P = np.where(np.isfinite(freedom_P), stats.t.logsf(np.abs(t_P), np.maximum(freedom_P, 1e-9)), np.nan)
    normal_P = np.where(np.isfinite(freedom_P), -special.ndtri_exp(tails_P), np.abs(t_P))
    return np.sign(t_P) * normal_P
