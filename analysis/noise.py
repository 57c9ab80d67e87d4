"""How reliable a pool's scores are: from the halves of stored probes where there are any, else from repeated rows.

A score is an estimate from a few rollouts. Its rank reliability is the Spearman that two separate sets of rollouts of
the same problems at the same policy would show; nothing that agrees less than that has to have drifted.

Dimension letters: P problems, G rollouts.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.agreement import spearman
from engine.gradients.objectives import Objective
from engine.probing.batch import ProbeBatch
from engine.probing.statistics import dot_and_error
from gradstore import Store

LEAST_PROBLEMS = 10
"""Fewer problems in common say nothing about reliability."""


_HALVES = ("id", "step", "even", "odd", "dot", "standard_error", "p_value", "t", "n")


@dataclass(frozen=True, slots=True)
class RankReliability:
    """Spearman of two separate measurements, and where the figure is from."""

    value: float
    """nan where the store cannot tell."""
    source: str
    """`probes` (halves of the rollouts), `repeats` (rows of several steps, extrapolated to age 0), `given`, `none`."""
    n_problems: int


def rank_reliability(store: Store, pool: str, benchmark: str, step: int | None = None) -> RankReliability:
    """From probes along the benchmark at the step (the nearest that has some), else from repeated rows.

    Probes: Spearman of the dots of even and odd rollouts, carried to all of them by Spearman-Brown. Repeats: the
    intercept of rank agreement over age (`drift.half_life`), which needs problems measured at three steps or more.
    """
    table = half_dots(store, pool, benchmark, step)
    if len(table) >= LEAST_PROBLEMS:
        r = spearman(table["even"].to_numpy(), table["odd"].to_numpy())
        return RankReliability(2 * r / (1 + r) if r > -1 else float("nan"), "probes", len(table))
    from analysis.drift import half_life

    fitted = half_life(store, pool, benchmark)
    if len(fitted) and np.isfinite(fitted["reliability"].iloc[0]):
        row = fitted.iloc[0]
        return RankReliability(float(row["reliability"]), "repeats", int(row["n_problems"]))
    return RankReliability(float("nan"), "none", 0)


def half_dots(store: Store, pool: str, benchmark: str, step: int | None = None) -> pd.DataFrame:
    """The dots of the even and of the odd rollouts of every probed problem with a signal, along the benchmark.

    step: the step of the probes; the nearest that has some is taken, the newest for None. A half without signal has
    measured nothing and is 0. Columns: id, step int64, even, odd, dot, standard_error, p_value, t float64, n int64
    (rollouts). Empty where there are no probes.
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
    """Probes of the pool along the benchmark at the step nearest to the one asked (None: the newest), and that step."""
    steps = np.unique(store.probes(pool, target=benchmark)["step"].to_numpy())
    if not len(steps):
        return None, None
    nearest = int(steps[-1] if step is None else steps[np.argmin(np.abs(steps - step))])
    return ProbeBatch.load(store, pool, step=nearest, target=benchmark), nearest


def _half(rewards_G: np.ndarray, derivatives_G: np.ndarray, lengths_G: np.ndarray, settings: Objective) -> float:
    if len(rewards_G) < 2 or rewards_G.max() == rewards_G.min():
        return 0.0
    return dot_and_error(rewards_G, derivatives_G, lengths_G, settings)[0]
