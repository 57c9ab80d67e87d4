"""Per-problem ratio of probed to sketched dot products, from the probes of the last rounds.

A sketch keeps the part of a gradient that its projection was fitted to. As the policy changes, that part shrinks, for
some problems sooner than for others. Probed problems have both dots, along the target of their step. Another problem's
ratio is a regression on theirs, weighted by the similarity of the sketches (local_ratios.py).

Its sums are kept, step by step of the probes. So a candidate is compared with the probes that are new, and with all of
them only when its own row is new.

Dimension letters: P problems, K probed ones, N problems of the pool.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from gradstore import Store, View
from gradstore.engine.forecasting.cosine_model import sum_of_units
from gradstore.engine.forecasting.kept import Kept, Places
from gradstore.engine.forecasting.local_ratios import Change, Changes, LocalRatios, Part, Probed, Sketches
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.searching.query import score_rows
from gradstore.engine.searching.targets import target
from gradstore.errors import RequestError

_STEPS_BACK = 4
"""Newest steps whose probes count."""
_FEWEST = 3
_MOST = 256
"""First probes of each step that count: each is compared with every problem, in its round or for a new row later."""
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Ratio of probed to sketched dots, per problem."""

    gains: np.ndarray
    """Ratio for each problem, float64 [P]; a sketched dot is norm x cosine x the sketched target's length."""
    left: float
    """Residual variance of a cosine: the error of the sketch, without that of the rollouts."""
    length: float
    """Length of the sketched target now; 1 with several benchmarks."""
    n: int
    """Number of probes used."""

    def describe(self) -> dict[str, Any]:
        """Summary as a dict for JSON: quantiles of the gains, residual variance and number of probes."""
        low, usual, high = np.quantile(self.gains, (0.1, 0.5, 0.9)).tolist()
        return {"gain": usual, "gain_low": low, "gain_high": high, "left": self.left, "n_probes": self.n}


def probed_before(store: Store, pool: str, benchmarks: Sequence[str], step: int) -> list[Probed]:
    """Probes of the newest steps before `step`, along the benchmarks' target, newest first."""
    steps = sorted({at for name in benchmarks for at in store.steps(name) if at < step}, reverse=True)
    steps = steps[: _STEPS_BACK - 1]
    Kept.of(store, pool).keep_only("probes", {("probes", at, "+".join(benchmarks)) for at in [step, *steps]})
    found = (probed_at(store, pool, benchmarks, at) for at in steps)
    return [probed for probed in found if probed is not None]


def probed_at(store: Store, pool: str, benchmarks: Sequence[str], step: int) -> Probed | None:
    """Probes of a step along the benchmarks' target, the first that count; None if none can be compared with a sketch.

    Statistics of a probe are computed once, at the first call that sees it.
    """
    view = store.view(pool, step, since=step)
    try:
        direction_D, length = aim(store, benchmarks, step)
        seen = _Seen.of(view, step, "+".join(benchmarks))
    except RequestError:
        return None
    positions_K = view.positions_of(seen.numbers)
    found_K = (positions_K >= 0) & seen.live
    found_K[found_K] = view.live[positions_K[found_K]]
    known_K = np.flatnonzero(found_K)[:_MOST]
    positions_K = positions_K[known_K]
    if view.n_bases > 1 or not len(positions_K):
        return None
    norms_K = view.norms[positions_K].astype(np.float64)
    sketched_K = score_rows(view, direction_D, "cosine", positions_K)[positions_K].astype(np.float64) * length
    dots_K, errors_K = seen.dots[known_K] / norms_K, seen.errors[known_K] / norms_K
    return Probed(step, Sketches.at(view, positions_K), sketched_K, dots_K, errors_K)


class _Seen:
    """Statistics of the probes of a step along a target, in the order in which their problems were first probed."""

    def __init__(self, key: Any, n_problems: int) -> None:
        self._key, self._n_parts, self._objectives = key, 0, set[str]()
        self._place_N = np.full(n_problems, -1, np.int32)
        self.numbers = np.zeros(0, np.int64)
        """Numbers of the problems, int64 [K]."""
        self.dots, self.errors, self.live = np.zeros(0), np.zeros(0), np.zeros(0, bool)

    @classmethod
    def of(cls, view: View, step: int, target_name: str) -> "_Seen":
        """All of them; RequestError if there are none, or of several objectives. Reads parts that were not read yet."""
        kept, name = Kept.of(view.store, view.collection), ("probes", step, target_name)
        key = (view.stored.base, tuple(view.deleted_numbers.tolist()), view.n_problems)
        seen = kept.last(name)
        if seen is None or seen._key != key:
            seen = cls(key, view.n_problems)
            kept.put(name, seen)
        probes = view.store.probes(view.collection)
        n_parts = probes.n_parts
        seen._add(view, probes.table(step=step, target=target_name, parts=slice(seen._n_parts, n_parts)))
        seen._n_parts = n_parts
        if len(seen._objectives) != 1:
            raise RequestError(f"no probes of one objective at step {step} along {target_name!r}")
        return seen

    def _add(self, view: View, table: pa.Table) -> None:
        self._objectives |= set(table["objective"].unique().to_pylist())
        if not len(table) or len(self._objectives) > 1:
            return
        batch = ProbeBatch.of_table(table)
        number_K = view.numbers_of(batch.ids)
        new = np.flatnonzero(self._place_N[number_K] < 0)
        self._place_N[number_K[new]] = len(self.numbers) + np.arange(len(new))
        self.numbers = np.append(self.numbers, number_K[new])
        place_K = self._place_N[number_K]
        for name, column in (("dots", batch.dots), ("errors", batch.standard_errors), ("live", batch.live)):
            grown = np.append(getattr(self, name), column[new])
            grown[place_K] = column
            setattr(self, name, grown)


def calibrate(view: View, places: Places, probes: Sequence[Probed], length: float) -> Calibration | None:
    """Calibration of candidates from their newest rows in a view; None with fewer than 3 probes.

    probes: probes of several steps, newest first. length: length of the target now. A candidate's gain is computed
    once for a row and a set of probes.
    """
    if sum(map(len, probes)) < _FEWEST:
        return None
    sketched_K, probed_K, errors_K = (
        np.concatenate([getattr(own, name) for own in probes]) for name in ("sketched", "dots", "errors")
    )
    ratios = LocalRatios(probes)
    position_P = view.positions_of(places.numbers)
    live = np.flatnonzero((position_P >= 0) & np.append(view.live, False)[position_P])
    gains_P = np.full(len(places), ratios.usual)
    gains_P[live], own_K = _Gains.of(view, ratios, position_P[live])
    left = max(float(np.mean((probed_K - own_K * sketched_K) ** 2)) - float(np.mean(errors_K**2)), 0.0)
    return Calibration(gains_P, left / ((ratios.usual * length) ** 2 or 1.0), length, len(probed_K))


class _Gains:
    """Sums of the pool's problems over the probes of each step, and the row that each problem's were computed from."""

    def __init__(self, view: View) -> None:
        self.made_for = view.stored.base, view.n_problems
        self._row_N = np.full(view.n_problems, -1)
        self._parts: dict[int, Part] = {}
        self._sums: dict[int, np.ndarray] = {}
        """By step, float64 [N, 2]."""
        self._own: dict[int, np.ndarray] = {}
        """Sums of the probed problems themselves, by step, float64 [K, 2]."""

    @classmethod
    def of(cls, view: View, ratios: LocalRatios, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ratios of the rows at some positions, and of the probed ones: float64 [len(positions)] and [K]."""
        kept = Kept.of(view.store, view.collection)
        own = kept.last("gains")
        if own is None or own.made_for != (view.stored.base, view.n_problems):
            own = cls(view)
        kept.put("gains", None)  # Not to be gone on from if this is interrupted.
        number_K, row_K = view.problem_numbers[positions], view.stored.numbers[positions]
        known_K = own._row_N[number_K] == row_K
        own._change_to(ratios, view, positions[known_K])
        own._start(ratios, view, positions[~known_K])
        kept.put("gains", own)
        return ratios.slopes(own._sums, number_K), ratios.slopes(own._own)

    def _change_to(self, ratios: LocalRatios, view: View, positions: np.ndarray) -> None:
        """Go over to other probes, for the rows at the positions; those of other problems are known no more."""
        changes = dict[int, Change]()
        for step, part in ratios.parts.items():
            change = self._parts[step].change_to(part) if step in self._parts else None
            if change is None:
                self._sums[step] = np.zeros((len(self._row_N), 2))
                change = part.whole()
            changes[step] = change
        same = self._parts.keys() == ratios.parts.keys() and not any(map(len, changes.values()))
        self._sums = {step: self._sums[step] for step in ratios.parts}
        self._parts = dict(ratios.parts)
        if same:
            return
        assert ratios.whole.sketches is not None
        self._own = ratios.sums(ratios.whole.sketches)
        if not any(map(len, changes.values())):
            return
        row_N, number_K = np.full(len(self._row_N), -1), view.problem_numbers[positions]
        row_N[number_K] = self._row_N[number_K]
        self._row_N = row_N
        self._add(Changes(changes), view, positions)

    def _start(self, ratios: LocalRatios, view: View, positions: np.ndarray) -> None:
        """Sums of rows that are new."""
        number_K = view.problem_numbers[positions]
        for sums_N2 in self._sums.values():
            sums_N2[number_K] = 0
        self._add(ratios.whole, view, positions)
        self._row_N[number_K] = view.stored.numbers[positions]

    def _add(self, changes: Changes, view: View, positions: np.ndarray) -> None:
        """Add the sums of the rows at the positions, block by block in the order on disk; every core takes blocks."""
        order = positions[np.argsort(view.stored.numbers[positions])]

        def add(start: int) -> None:
            block = order[start : start + _ROWS_AT_ONCE]
            number_B = view.problem_numbers[block]
            for step, sums_B2 in changes.sums(Sketches.at(view, block)).items():
                self._sums[step][number_B] += sums_B2

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(add, range(0, len(order), _ROWS_AT_ONCE)))


def aim(store: Store, benchmarks: Sequence[str], step: int) -> tuple[np.ndarray, float]:
    """Unit direction of the benchmarks at a step, float32 [D], and the target's length: 1 with several benchmarks."""
    vectors = [target(store, name, step).vector for name in benchmarks]
    total_D = sum_of_units(vectors)
    length = float(np.linalg.norm(vectors[0].astype(np.float64))) if len(vectors) == 1 else 1.0
    return (total_D / (np.linalg.norm(total_D) or 1.0)).astype(np.float32), length
