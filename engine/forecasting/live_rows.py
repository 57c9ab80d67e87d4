"""Live rows of a round's candidates, grouped by step, with their cosines to a direction.

Dimension letters: N rows, D sketch dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradstore import Store
from gradstore.engine.forecasting.pass_rates import effective, slack
from gradstore.engine.searching.query import score_rows
from gradstore.engine.selecting.membership import places

_STEPS_BACK = 32
"""Newest steps of which every row is read; before them, only each problem's newest row."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Live rows of one step."""

    step: int
    places: np.ndarray
    """Index of each row's problem among the candidates, int64 [N]."""
    cosines: np.ndarray
    """Cosine of each row with the direction, float64 [N]."""
    norms: np.ndarray
    """Gradient norms, float64 [N]."""
    slack: np.ndarray
    """p (1 - p), float64 [N]; nan where unknown."""
    counts: np.ndarray
    """Rollouts, float64 [N]."""
    rollouts: np.ndarray
    """Effective rollouts (`effective` in pass_rates.py), float64 [N]."""


def live_rows(store: Store, pool: str, ids: Sequence[str], unit_D: np.ndarray, now: int) -> list[Rows]:
    """All live rows of the newest _STEPS_BACK steps, and each problem's newest row before them; oldest first."""
    steps = [step for step in store.steps(pool) if step <= now]
    recent = steps[-_STEPS_BACK:]
    moments = [] if len(steps) == len(recent) else [steps[-_STEPS_BACK - 1]]
    found = []
    for step in [*moments, *recent]:
        view = store.view(pool, step)
        chosen = np.flatnonzero(view.live & ((view.steps == step) | (step in moments)))
        place_N = places(view.ids_at(chosen), list(ids)) if len(chosen) else np.zeros(0, np.int64)
        chosen, place_N = chosen[place_N >= 0], place_N[place_N >= 0]
        if not len(chosen):
            continue
        cosines_N = score_rows(view, unit_D, "cosine", chosen)[chosen].astype(np.float64)
        counts_N = view.n_rollouts[chosen].astype(np.float64)
        rates_N, norms_N = (column[chosen].astype(np.float64) for column in (view.pass_rates, view.norms))
        rollouts_N, slack_N = effective(counts_N, rates_N), slack(rates_N)
        for measured in np.unique(view.steps[chosen]).tolist():
            here = view.steps[chosen] == measured
            columns = (norms_N, slack_N, counts_N, rollouts_N)
            found.append(Rows(measured, place_N[here], cosines_N[here], *(column[here] for column in columns)))
    return found
