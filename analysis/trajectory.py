"""How every problem of a pool scored at every step: the arrays that most of the analysis is made of.

At step s a problem's score is that of its newest row at or before s against the benchmark's target at or before s:
what a selection at that moment would have seen.

Dimension letters: S steps, P problems (those with a row in the newest view), D sketch dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradstore import Store
from gradstore.engine.searching.query import Metric, eligible_positions, query_vectors, score_rows
from gradstore.engine.searching.targets import Target, target
from gradstore.errors import RequestError

UNMEASURED = 255
"""In `states_SP`: no row yet at that step."""
STATE_NAMES = ("live", "no_signal", "failed", "unmeasured")


MOST_STEPS = 64
"""Steps of a pool that are looked at unless steps are given."""


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """Scores of a pool's problems over steps."""

    ids: np.ndarray
    """str [P]."""
    sources: np.ndarray
    """str [P]."""
    steps: np.ndarray
    """int64 [S], ascending."""
    scores_SP: np.ndarray
    """float32; nan where the problem is not live, or the benchmark has no target yet."""
    norms_SP: np.ndarray
    """float32; nan where there is no row."""
    pass_rates_SP: np.ndarray
    """float32; nan unknown."""
    states_SP: np.ndarray
    """uint8: `State`, or UNMEASURED."""
    row_steps_SP: np.ndarray
    """int64: the step at which the row used was computed; -1 where there is none."""

    @property
    def fresh(self) -> np.ndarray:
        """bool [S, P]: the row was computed at that very step."""
        fresh_SP: np.ndarray = self.row_steps_SP == self.steps[:, None]
        return fresh_SP

    @property
    def measured(self) -> np.ndarray:
        """float32 [S, P]: scores of the rows computed at that very step, nan elsewhere: each from its own rollouts."""
        return np.where(self.fresh, self.scores_SP, np.float32(np.nan))


def trajectory(
    store: Store, pool: str, benchmark: str, metric: Metric = "cosine", steps: Sequence[int] | None = None
) -> Trajectory:
    """Scores of the pool at each step (None: those of the benchmark).

    Memory: 21 bytes a problem and step. RequestError for an unknown collection or metric, and where there is no step.
    """
    chosen = steps_of(store, benchmark, steps)
    last = store.view(pool)
    ids = last.ids
    place = {name: number for number, name in enumerate(ids.tolist())}
    shape = (len(chosen), len(ids))
    scores_SP, norms_SP, rates_SP = (np.full(shape, np.nan, np.float32) for _ in range(3))
    states_SP, row_steps_SP = np.full(shape, UNMEASURED, np.uint8), np.full(shape, -1, np.int64)
    for s, step in enumerate(chosen.tolist()):
        view = store.view(pool, step)
        kept = np.fromiter((place.get(name, -1) for name in view.ids.tolist()), np.int64, len(view))
        here, columns = kept >= 0, kept[kept >= 0]
        norms_SP[s, columns] = view.norms[here]
        rates_SP[s, columns] = view.pass_rates[here]
        states_SP[s, columns] = view.states[here]
        row_steps_SP[s, columns] = view.steps[here]
        wanted = target_at(store, benchmark, step)
        if wanted is not None and view.live.any():
            query_D = query_vectors(view, [wanted], metric)[0]
            scores_SP[s, columns] = score_rows(view, query_D, metric, eligible_positions(view, None))[here]
    sources = last.problems.column("source").to_numpy(zero_copy_only=False)
    return Trajectory(ids, sources, chosen, scores_SP, norms_SP, rates_SP, states_SP, row_steps_SP)


def steps_of(store: Store, collection: str, steps: Sequence[int] | None = None) -> np.ndarray:
    """The steps asked for, or all at which the collection has rows: int64, ascending, distinct."""
    found = np.unique(np.asarray(list(store.steps(collection)) if steps is None else list(steps), np.int64))
    if not len(found):
        raise RequestError(f"collection {collection!r} has no rows yet, so no step: collect rollouts for it first")
    return found


def measured_steps(
    store: Store, collection: str, steps: Sequence[int] | None = None, most: int = MOST_STEPS
) -> list[int]:
    """The steps asked for; or those at which the collection has rows, of more than `most` the ones with the most rows,
    evenly among equals: a run that keeps every training step's rollouts has a thousand of them."""
    found = steps_of(store, collection, steps)
    if steps is not None or len(found) <= most:
        return [int(step) for step in found]
    rows = np.array(list(store.steps(collection).values()))
    least = np.sort(rows)[-most]
    above, equal = found[rows > least], found[rows == least]
    evenly = equal[np.linspace(0, len(equal) - 1, most - len(above)).round().astype(int)]
    return sorted(int(step) for step in np.concatenate([above, evenly]))


def target_at(store: Store, benchmark: str, step: int | None) -> Target | None:
    """The benchmark's target at or before a step; None where none of its problems is live then.

    RequestError for a benchmark that is not in the store.
    """
    return target(store, benchmark, step) if store.view(benchmark, step).live.any() else None
