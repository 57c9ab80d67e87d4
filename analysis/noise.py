"""Reliability of a pool's scores, estimated from the halves of stored probes, or else from repeated rows.

A score is an estimate from a few rollouts. Its rank reliability is the Spearman correlation between two separate sets
of rollouts of the same problems under the same policy. Rankings that agree at least this well show no drift.

Dimension letters: P problems, G rollouts.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize, special  # type: ignore[import-untyped]

from gradstore import Store
from gradstore.analysis.agreement import spearman
from gradstore.analysis.staleness import LEAST_PROBLEMS, half_life
from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.probing.statistics import dot_and_error
from gradstore.engine.rollouts.group import differ

_HALVES = ("id", "step", "even", "odd", "dot", "standard_error", "p_value", "t", "n")


@dataclass(frozen=True, slots=True)
class RankReliability:
    """Spearman correlation of two separate measurements, and the data it was estimated from."""

    value: float
    """nan if the store does not allow an estimate."""
    source: str
    """`probes` (halves of the rollouts), `repeats` (rows of several steps, extrapolated to age 0), `given`, `none`."""
    n_problems: int


def rank_reliability(store: Store, pool: str, benchmark: str, step: int | None = None) -> RankReliability:
    """Estimate the rank reliability from probes along the benchmark at the nearest step, else from repeated rows.

    Probes: Spearman between the dots of even and odd rollouts, corrected to all rollouts by Spearman-Brown. Repeats:
    intercept of rank agreement over age (`staleness.half_life`); this needs problems measured at three or more steps.
    """
    table = half_dots(store, pool, benchmark, step)
    if len(table) >= LEAST_PROBLEMS:
        r = spearman(table["even"].to_numpy(), table["odd"].to_numpy())
        return RankReliability(2 * r / (1 + r) if r > -1 else float("nan"), "probes", len(table))
    fitted = half_life(store, pool, benchmark)
    if len(fitted) and np.isfinite(fitted["reliability"].iloc[0]):
        row = fitted.iloc[0]
        return RankReliability(float(row["reliability"]), "repeats", int(row["n_problems"]))
    return RankReliability(float("nan"), "none", 0)


def measurement_noise(measured_SP: np.ndarray) -> np.ndarray:
    """Standard deviation of one measured score per problem, float64 [P], from successive measurements.

    measured_SP: nan where not measured. The variance is half the squared differences of successive measurements,
    moderated over the pool; it includes the drift in between. nan if no problem was measured twice.
    """
    squares_P, freedom_P = np.zeros(measured_SP.shape[1]), np.zeros(measured_SP.shape[1], np.int64)
    last_P = np.full(measured_SP.shape[1], np.nan)
    for now_P in measured_SP:
        change_P = now_P - last_P
        twice = np.isfinite(change_P)
        squares_P[twice] += change_P[twice] ** 2 / 2
        freedom_P += twice
        last_P = np.where(np.isfinite(now_P), now_P, last_P)
    return moderated(squares_P, freedom_P)[0]


def moderated(squares_P: np.ndarray, freedom_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moderated (standard deviation of one measurement, degrees of freedom) per problem: float64 [P] each.

    squares_P: sum of squared deviations from the problem's means, with freedom_P degrees of freedom (0: none). Noise
    differs between problems, but few measurements of one problem estimate it poorly. So variances are assumed to follow
    a scaled inverse chi-square distribution with d0 degrees of freedom around s0^2, fitted to the pool by the moments
    of log variances, and are shrunk: s^2 = (d0 s0^2 + squares) / (d0 + freedom) (Smyth 2004, sections 3 and 6.2). nan
    if no problem was measured twice on a side.
    """
    repeated = freedom_P > 0
    if not repeated.any():
        return np.full(len(squares_P), np.nan), np.zeros(len(squares_P))
    d = freedom_P[repeated].astype(np.float64)
    variances = squares_P[repeated] / d
    variances = np.maximum(variances, 1e-5 * np.median(variances))
    if not variances.all():
        return np.zeros(len(squares_P)), np.full(len(squares_P), np.inf)
    e = np.log(variances) - special.digamma(d / 2) + np.log(d / 2)
    spread = float(e.var(ddof=1) - special.polygamma(1, d / 2).mean()) if len(e) > 1 else 0.0
    if spread > 1e-6:
        d0 = 2 * optimize.brentq(lambda x: special.polygamma(1, x) - spread, 1e-6, 1e7)
        s0 = float(np.exp(e.mean() + special.digamma(d0 / 2) - np.log(d0 / 2)))
        shrunk_P = (d0 * s0 + squares_P) / (d0 + freedom_P)
        return np.sqrt(shrunk_P), d0 + freedom_P
    # The variances differ no more than by chance: use one for all.
    return np.full(len(squares_P), np.sqrt(squares_P.sum() / freedom_P.sum())), np.full(len(squares_P), np.inf)


def half_dots(store: Store, pool: str, benchmark: str, step: int | None = None) -> pd.DataFrame:
    """Probe dots of the even and the odd rollouts along the benchmark, one row per probed problem with a signal.

    step: the nearest step with probes is used; None: the newest. A half without signal is 0. Columns: id, step int64,
    even, odd, dot, standard_error, p_value, t float64, n int64 (rollouts). Empty if there are no probes.
    """
    batch, at = stored_probes(store, pool, benchmark, step)
    if batch is None:
        return pd.DataFrame({name: [] for name in _HALVES})
    live = np.flatnonzero(batch.live)
    halves = [
        (
            _half(batch.rewards[i][0::2], batch.derivatives[i][0::2], batch.lengths[i][0::2], batch.settings),
            _half(batch.rewards[i][1::2], batch.derivatives[i][1::2], batch.lengths[i][1::2], batch.settings),
        )
        for i in live
    ]
    even_odd = np.array(halves).reshape(len(live), 2)
    return pd.DataFrame(
        {
            "id": [batch.ids[i] for i in live],
            "step": np.full(len(live), at, np.int64),
            "even": even_odd[:, 0],
            "odd": even_odd[:, 1],
            "dot": batch.dots[live],
            "standard_error": batch.standard_errors[live],
            "p_value": batch.p_values[live],
            "t": batch.t[live],
            "n": [len(batch.rewards[i]) for i in live],
        }
    )


def stored_probes(
    store: Store, pool: str, benchmark: str, step: int | None = None
) -> tuple[ProbeBatch | None, int | None]:
    """(probes of the pool along the benchmark at the step nearest to `step`, that step); None: the newest step."""
    steps = np.unique(store.probes(pool).table(target=benchmark)["step"].to_numpy())
    if not len(steps):
        return None, None
    nearest = int(steps[-1] if step is None else steps[np.argmin(np.abs(steps - step))])
    return ProbeBatch.load(store, pool, step=nearest, target=benchmark), nearest


def _half(rewards_G: np.ndarray, derivatives_G: np.ndarray, lengths_G: np.ndarray, settings: Objective) -> float:
    if not differ(rewards_G):
        return 0.0
    return dot_and_error(rewards_G, derivatives_G, lengths_G, settings)[0]
