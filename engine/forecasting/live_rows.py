"""Live rows of a round's candidates, grouped by step, with their cosines to a direction.

Dimension letters: N rows, D sketch dimensions.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial

import numpy as np

from gradstore import Store
from gradstore.engine.forecasting.kept import Kept, Places
from gradstore.engine.forecasting.pass_rates import effective, slack
from gradstore.engine.searching.query import score_rows

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


def live_rows(store: Store, pool: str, places: Places, unit_D: np.ndarray, now: int) -> list[Rows]:
    """All live rows of the newest _STEPS_BACK steps, and each problem's newest row before them; oldest first.

    Rows of a step are read once for a direction: again only when the step has other rows.
    """
    counts = {step: n for step, n in store.steps(pool).items() if step <= now}
    recent = list(counts)[-_STEPS_BACK:]
    moments = [] if len(counts) == len(recent) else [list(counts)[-_STEPS_BACK - 1]]
    kept, found, names = Kept.of(store, pool), list[Rows](), set[Hashable]()
    direction = unit_D.tobytes()
    for step in [*moments, *recent]:
        before = tuple((own, n) for own, n in counts.items() if own <= step)
        name = ("rows", step, step in moments)
        names.add(name)
        make = partial(_rows_of, store, pool, places, unit_D, step, step in moments)
        found += kept.get(name, (before, places, direction), make)
    kept.keep_only("rows", names)
    return found


def _rows_of(store: Store, pool: str, places: Places, unit_D: np.ndarray, step: int, with_earlier: bool) -> list[Rows]:
    """Live rows of the candidates at a step; with_earlier: each problem's newest row at or before it."""
    view = store.view(pool, step, since=None if with_earlier else step)
    chosen = np.flatnonzero(view.live)
    place_N = places.of_numbers(view.problem_numbers[chosen])
    chosen, place_N = chosen[place_N >= 0], place_N[place_N >= 0]
    if not len(chosen):
        return []
    cosines_N = score_rows(view, unit_D, "cosine", chosen)[chosen].astype(np.float64)
    counts_N = view.n_rollouts[chosen].astype(np.float64)
    rates_N, norms_N = (column[chosen].astype(np.float64) for column in (view.pass_rates, view.norms))
    rollouts_N, slack_N = effective(counts_N, rates_N), slack(rates_N)
    found, steps_N = [], view.steps[chosen]
    for measured in np.unique(steps_N).tolist():
        here = steps_N == measured
        columns = (norms_N, slack_N, counts_N, rollouts_N)
        found.append(Rows(measured, place_N[here], cosines_N[here], *(column[here] for column in columns)))
    return found
