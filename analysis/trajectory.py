"""Scores of every problem of a pool at every step; most analyses start from these arrays.

At step s, a problem's newest row at or before s is scored against the benchmark's target at or before s. This is what a
selection at that moment would have seen.

Dimension letters: S steps, P problems (those with a row in the newest view), D sketch dimensions.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from gradstore import Store, View
from gradstore.engine.searching.query import Metric, eligible_positions, query_vectors, score_rows
from gradstore.engine.searching.targets import Target, target
from gradstore.errors import RequestError

UNMEASURED = 255
"""In `states_SP`: no row yet at that step."""
STATE_NAMES = ("live", "no_signal", "failed", "unmeasured")


MOST_STEPS = 64
"""Maximum steps of a pool that are used, unless steps are given."""


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
    """float32 [S, P]; nan if the problem is not live, or the benchmark has no target yet."""
    norms_SP: np.ndarray
    """float32 [S, P]; nan without a row."""
    pass_rates_SP: np.ndarray
    """float32 [S, P]; nan if unknown."""
    states_SP: np.ndarray
    """uint8 [S, P]: `State`, or UNMEASURED."""
    row_steps_SP: np.ndarray
    """int64 [S, P]: step at which the row used was computed; -1 without a row."""

    @property
    def fresh(self) -> np.ndarray:
        """bool [S, P]: whether the row was computed at exactly this step."""
        fresh_SP: np.ndarray = self.row_steps_SP == self.steps[:, None]
        return fresh_SP

    @property
    def measured(self) -> np.ndarray:
        """float32 [S, P]: scores of rows computed at exactly this step, each from new rollouts; nan elsewhere."""
        return np.where(self.fresh, self.scores_SP, np.float32(np.nan))


def trajectory(
    store: Store, pool: str, benchmark: str, metric: Metric = "cosine", steps: Sequence[int] | None = None
) -> Trajectory:
    """Score the pool at each step (None: the benchmark's steps).

    Memory: 21 bytes per problem and step, kept for the next call of the same store until something is published.
    The arrays are read-only. RequestError for an unknown collection or metric, or if there is no step.
    """
    chosen = steps_of(store, benchmark, steps)
    key = pool, benchmark, metric, chosen.tobytes(), store.commit(pool), store.commit(benchmark)
    if store not in _last or _last[store][0] != key:
        _last[store] = key, _scored(store, pool, benchmark, metric, chosen)
    return _last[store][1]


_last: WeakKeyDictionary[Store, tuple[Hashable, Trajectory]] = WeakKeyDictionary()
"""The trajectory of each open store that was asked for last, with what it depends on."""


def _scored(store: Store, pool: str, benchmark: str, metric: Metric, chosen: np.ndarray) -> Trajectory:
    last = store.view(pool)
    ids = last.ids
    shape = (len(chosen), len(ids))
    scores_SP, norms_SP, rates_SP = (np.full(shape, np.nan, np.float32) for _ in range(3))
    states_SP, row_steps_SP = np.full(shape, UNMEASURED, np.uint8), np.full(shape, -1, np.int64)
    for s, step in enumerate(chosen.tolist()):
        view = store.view(pool, step)
        same = view.stored.base == last.stored.base  # else compacted meanwhile: problems have other numbers
        kept = last.positions_of(view.problem_numbers) if same else last.positions(view.ids.tolist(), strict=False)
        here, columns = kept >= 0, kept[kept >= 0]
        norms_SP[s, columns] = view.norms[here]
        rates_SP[s, columns] = view.pass_rates[here]
        states_SP[s, columns] = view.states[here]
        row_steps_SP[s, columns] = view.steps[here]
        wanted = target_at(store, benchmark, step)
        if wanted is not None and view.live.any():
            query_D = query_vectors(view, [wanted], metric)[0]
            scores_SP[s, columns] = score_rows(view, query_D, metric, eligible_positions(view, None))[here]
    sources = sources_of(last)
    for array in (scores_SP, norms_SP, rates_SP, states_SP, row_steps_SP):
        array.flags.writeable = False
    return Trajectory(ids, sources, chosen, scores_SP, norms_SP, rates_SP, states_SP, row_steps_SP)


def sources_of(view: View) -> np.ndarray:
    """Source of each problem, object array of str [P]; equal sources are one string in memory."""
    column = view.problems_at(columns=["source"])["source"].combine_chunks().dictionary_encode()
    names = np.array(column.dictionary.to_pylist(), object)
    return names[column.indices.to_numpy()] if len(names) else np.empty(0, object)


def steps_of(store: Store, collection: str, steps: Sequence[int] | None = None) -> np.ndarray:
    """The given steps, or all steps at which the collection has rows: int64, ascending, distinct."""
    found = np.unique(np.asarray(list(store.steps(collection)) if steps is None else list(steps), np.int64))
    if not len(found):
        raise RequestError(f"collection {collection!r} has no rows yet, so no step: collect rollouts for it first")
    return found


def measured_steps(
    store: Store, collection: str, steps: Sequence[int] | None = None, most: int = MOST_STEPS
) -> list[int]:
    """The given steps, or those at which the collection has rows, at most `most` of them.

    The steps with the most rows are kept, evenly spaced among equals. (A run that keeps every training step's rollouts
    has a thousand steps.)
    """
    found = steps_of(store, collection, steps)
    if steps is not None or len(found) <= most:
        return [int(step) for step in found]
    rows = np.array(list(store.steps(collection).values()))
    least = np.sort(rows)[-most]
    above, equal = found[rows > least], found[rows == least]
    evenly = equal[np.linspace(0, len(equal) - 1, most - len(above)).round().astype(int)]
    return sorted(int(step) for step in np.concatenate([above, evenly]))


def target_at(store: Store, benchmark: str, step: int | None) -> Target | None:
    """The benchmark's target at or before a step; None if none of its problems is live then.

    RequestError for a benchmark that is not in the store.
    """
    return target(store, benchmark, step) if store.view(benchmark, step).live.any() else None
