"""Per-problem ratio of probed to sketched dot products, from the probes of the last rounds.

A sketch keeps the part of a gradient that its projection was fitted to. As the policy changes, that part shrinks, for
some problems sooner than for others. Probed problems have both dots, along the target of their step. Another problem's
ratio is a regression on theirs, weighted by the similarity of the sketches. Formulas: docs/methods.md, Budgeted
refresh.

Dimension letters: P problems, K probed ones, D sketch dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from gradstore import Store, View
from gradstore.engine.forecasting.cosine_model import sum_of_units
from gradstore.engine.forecasting.kept import Kept, Places
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.searching.query import score_rows
from gradstore.engine.searching.targets import target
from gradstore.errors import RequestError

_STEPS_BACK = 4
"""Newest steps whose probes count."""
_FEWEST = 3
_MOST = 1024
"""Newest probes that count: each is compared with every problem."""
_STEPS = 4000
"""Steps of a unit row's entries: finer than int8 rows of 1,024 dimensions."""
_WEIGHT_BITS, _TERM_BITS = 22, 20
"""Bits of a weight and of a term of the sums: with ten more for the number of probes they fit in float64."""
_AT_ONCE = 1 << 20
"""Pairs of a problem and a probe per block."""
_MOST_ROWS = 4096
"""Of a block."""


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


def _integers(rows: np.ndarray) -> np.ndarray:
    """Unit rows in steps of 1 / _STEPS, as whole numbers, float32.

    Every partial sum of a product of two such rows is below 2^24, hence exact: products do not depend on the order in
    which a kernel adds, and with it on the place of a row in its block.
    """
    found: np.ndarray = np.multiply(rows, np.float32(_STEPS))
    return np.rint(found, out=found)


class LocalRatios:
    """Locally weighted regression of probed on sketched dots, through the origin; slopes are at least 0.

    Probed problem k has the weight max(cos, 0)^2, rounded to 2^-22. The global slope is added as one pseudo-problem of
    weight 1. Both sums over the probed problems are of whole numbers below 2^53, which float64 adds exactly. So they
    do not depend on the order of the problems, and a changed probe can be taken out and put in again.
    """

    def __init__(self, rows_KD: np.ndarray, sketched_K: np.ndarray, probed_K: np.ndarray) -> None:
        """rows_KD: unit sketches of the probed problems, float32."""
        squares_K, products_K = sketched_K**2, probed_K * sketched_K
        self._usual = float(products_K.sum() / (squares_K.sum() or 1.0))
        self._one = float(squares_K.mean()) or 1.0
        self.n = len(rows_KD)
        self._rows_KD = _integers(rows_KD)
        terms_K2 = np.stack([products_K, squares_K], axis=1)
        self._exponents_2 = np.frexp(np.abs(terms_K2).max(axis=0, initial=0.0))[1]
        self._terms_K2 = np.rint(np.ldexp(terms_K2, _TERM_BITS - self._exponents_2))
        self.usual = max(self._usual, 0.0)
        """Global slope, at least 0; also the slope of a problem that is similar to no probed one."""

    def __call__(self, rows_PD: np.ndarray) -> np.ndarray:
        """Slopes for problems with these unit sketches, float64 [P]; memory for P x K numbers."""
        return self.slopes(self.sums(rows_PD))

    def sums(self, rows_PD: np.ndarray) -> np.ndarray:
        """Weighted sums of probed x sketched and of sketched^2, whole numbers in float64 [P, 2]."""
        return _sums(_integers(rows_PD), self._rows_KD, self._terms_K2)

    def slopes(self, sums_P2: np.ndarray) -> np.ndarray:
        """Slopes of problems with these sums, float64 [P]."""
        products_P, squares_P = np.ldexp(sums_P2, self._exponents_2 - _TERM_BITS - _WEIGHT_BITS).T
        slope_P: np.ndarray = (products_P + self._one * self._usual) / (squares_P + self._one)
        return np.maximum(slope_P, 0.0)

    def change_to(self, new: "LocalRatios") -> "Change | None":
        """What makes the sums of `new` from these; None where that is no less work than from nothing."""
        if (self._exponents_2 != new._exponents_2).any():
            return None
        n = min(self.n, new.n)
        same = (self._rows_KD[:n] == new._rows_KD[:n]).all(axis=1) & (self._terms_K2[:n] == new._terms_K2[:n]).all(
            axis=1
        )
        others = np.flatnonzero(~same)
        gone, come = (np.append(others, np.arange(n, size)) for size in (self.n, new.n))
        if len(gone) + len(come) > new.n // 2:
            return None
        rows = np.concatenate([self._rows_KD[gone], new._rows_KD[come]])
        return Change(rows, np.concatenate([-self._terms_K2[gone], new._terms_K2[come]]))


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """Probed problems that were taken out or put in."""

    rows: np.ndarray
    """Unit sketches as whole numbers, float32 [K, D]."""
    terms: np.ndarray
    """Terms of both sums, negative for those that were taken out, float64 [K, 2]."""

    @property
    def n(self) -> int:
        return len(self.rows)

    def sums(self, rows_PD: np.ndarray) -> np.ndarray:
        """What to add to the sums of problems with these unit sketches, float64 [P, 2]."""
        return _sums(_integers(rows_PD), self.rows, self.terms)


def _sums(whole_PD: np.ndarray, whole_KD: np.ndarray, terms_K2: np.ndarray) -> np.ndarray:
    weights_PK = whole_PD @ whole_KD.T
    weights_PK *= np.float32(2 ** (_WEIGHT_BITS // 2) / _STEPS**2)
    np.maximum(weights_PK, 0.0, out=weights_PK)
    np.square(weights_PK, out=weights_PK)
    np.rint(weights_PK, out=weights_PK)
    sums_P2: np.ndarray = weights_PK.astype(np.float64) @ terms_K2
    return sums_P2


@dataclass(frozen=True, slots=True, eq=False)
class Probed:
    """Live probes of one step and the sketches of their problems at that step; both dots are divided by the norm."""

    rows: np.ndarray
    """Unit sketches, float32 [K, D]."""
    sketched: np.ndarray
    """Cosine with the target times its length, float64 [K]."""
    dots: np.ndarray
    """Probed dot over the norm, float64 [K]."""
    errors: np.ndarray
    """Standard error of the probed dot over the norm, float64 [K]."""


def probed_before(store: Store, pool: str, benchmarks: Sequence[str], step: int) -> list[Probed]:
    """Probes of the newest steps before `step`, along the benchmarks' target, newest first."""
    steps = sorted({at for name in benchmarks for at in store.steps(name) if at < step}, reverse=True)
    found = (probed_at(store, pool, benchmarks, at) for at in steps[: _STEPS_BACK - 1])
    return [probed for probed in found if probed is not None]


def probed_at(store: Store, pool: str, benchmarks: Sequence[str], step: int) -> Probed | None:
    """Probes of a step along the benchmarks' target, the first that count; None if none can be compared with a sketch.

    Statistics of a probe are computed once, at the first call that sees it.
    """
    try:
        direction_D, length = aim(store, benchmarks, step)
        seen = _Seen.of(store, pool, step, "+".join(benchmarks))
    except RequestError:
        return None
    view = store.view(pool, step)
    dots_K, errors_K, live_K = (np.array(column) for column in (seen.dots, seen.errors, seen.live))
    places_K = view.positions_of(view.numbers_of(seen.ids))
    known_K = (places_K >= 0) & live_K
    known_K[known_K] = view.live[places_K[known_K]] & (view.steps[places_K[known_K]] == step)
    known_K = np.flatnonzero(known_K)[:_MOST]
    places_K = places_K[known_K]
    if view.n_bases > 1 or not len(places_K):
        return None
    norms_K = view.norms[places_K].astype(np.float64)
    sketched_K = score_rows(view, direction_D, "cosine", places_K)[places_K].astype(np.float64) * length
    return Probed(view.rows(places_K), sketched_K, dots_K[known_K] / norms_K, errors_K[known_K] / norms_K)


class _Seen:
    """Statistics of the probes of a step along a target, in the order in which their problems were first probed."""

    def __init__(self) -> None:
        self._read = pa.chunked_array([], pa.large_string())
        self._place_of: dict[str, int] = {}
        self.dots: list[float] = []
        self.errors: list[float] = []
        self.live: list[bool] = []

    @property
    def ids(self) -> list[str]:
        return list(self._place_of)

    @classmethod
    def of(cls, store: Store, pool: str, step: int, target_name: str) -> "_Seen":
        """All of them; RequestError if there are none, or of several objectives."""
        kept, name = Kept.of(store, pool), ("probes", step, target_name)
        table = store.probes(pool).table(step=step, target=target_name)
        if not len(table) or len(table["objective"].unique()) > 1:
            raise RequestError(f"no probes of one objective at step {step} along {target_name!r}")
        ids = table["id"].cast(pa.large_string())
        seen = kept.last(name)
        n = 0 if seen is None else len(seen._read)
        if seen is None or n > len(ids) or not ids.slice(0, n).equals(seen._read):  # some were deleted
            seen, n = cls(), 0
        if n < len(ids):
            seen._add(ProbeBatch.of_table(table.slice(n)))
        seen._read = ids
        kept.put(name, seen)
        return seen

    def _add(self, batch: ProbeBatch) -> None:
        for name, dot, error, live in zip(batch.ids, batch.dots, batch.standard_errors, batch.live, strict=True):
            place = self._place_of.setdefault(name, len(self._place_of))
            self.dots[place : place + 1] = [float(dot)]
            self.errors[place : place + 1] = [float(error)]
            self.live[place : place + 1] = [bool(live)]


def calibrate(view: View, places: Places, probes: Sequence[Probed], length: float) -> Calibration | None:
    """Calibration of candidates from their newest rows in a view; None with fewer than 3 probes.

    probes: probes of several steps, newest first. length: length of the target now. A candidate's gain is computed
    once for a row and a set of probes.
    """
    if sum(len(own.dots) for own in probes) < _FEWEST:
        return None
    rows_KD, sketched_K, probed_K, errors_K = (
        np.concatenate([getattr(own, name) for own in probes])[:_MOST]
        for name in ("rows", "sketched", "dots", "errors")
    )
    ratios = LocalRatios(rows_KD, sketched_K, probed_K)
    position_P = view.positions_of(places.numbers)
    live = np.flatnonzero((position_P >= 0) & np.append(view.live, False)[position_P])
    gains_P = np.full(len(places), ratios.usual)
    gains_P[live] = _Gains.of(view, ratios, position_P[live])
    left = max(float(np.mean((probed_K - ratios(rows_KD) * sketched_K) ** 2)) - float(np.mean(errors_K**2)), 0.0)
    return Calibration(gains_P, left / ((ratios.usual * length) ** 2 or 1.0), length, len(probed_K))


class _Gains:
    """Sums of the pool's problems for one set of probes, each with the row it was computed from."""

    def __init__(self, view: View, ratios: LocalRatios) -> None:
        self._ratios, self._base = ratios, view.stored.base
        self._row_N = np.full(view.n_problems, -1)
        self._sums_N2 = np.zeros((view.n_problems, 2))

    @classmethod
    def of(cls, view: View, ratios: LocalRatios, positions: np.ndarray) -> np.ndarray:
        """Ratios of the rows at some positions, float64 [len(positions)]."""
        kept = Kept.of(view.store, view.collection)
        own = kept.last("gains")
        number_K, row_K = view.problem_numbers[positions], view.stored.numbers[positions]
        if own is None or (own._base, len(own._row_N)) != (view.stored.base, view.n_problems):
            own = cls(view, ratios)
        else:
            own = own._changed_to(view, ratios, positions)
        kept.put("gains", own)
        other = np.flatnonzero(own._row_N[number_K] != row_K)
        own._sums_N2[number_K[other]] = _in_blocks(view, ratios, positions[other])
        own._row_N[number_K[other]] = row_K[other]
        return ratios.slopes(own._sums_N2[number_K])

    def _changed_to(self, view: View, ratios: LocalRatios, positions: np.ndarray) -> "_Gains":
        """The sums for other probes: those of the rows at the positions, if few probes changed."""
        change = self._ratios.change_to(ratios)
        if change is None:
            return _Gains(view, ratios)
        self._ratios = ratios
        if change.n:
            number_K, row_K = view.problem_numbers[positions], view.stored.numbers[positions]
            known = np.flatnonzero(self._row_N[number_K] == row_K)
            self._sums_N2[number_K[known]] += _in_blocks(view, change, positions[known])
            kept_N = np.full(len(self._row_N), -1)
            kept_N[number_K[known]] = row_K[known]
            self._row_N = kept_N
        return self


def _in_blocks(view: View, of: LocalRatios | Change, positions: np.ndarray) -> np.ndarray:
    """Sums of rows, float64 [len(positions), 2], block by block."""
    size = min(max(1, _AT_ONCE // max(of.n, 1)), _MOST_ROWS)
    found = np.empty((len(positions), 2))
    done = 0
    for block, rows_BD in view.scan(positions, size):
        found[done : done + len(block)] = of.sums(rows_BD)
        done += len(block)
    return found


def aim(store: Store, benchmarks: Sequence[str], step: int) -> tuple[np.ndarray, float]:
    """Unit direction of the benchmarks at a step, float32 [D], and the target's length: 1 with several benchmarks."""
    vectors = [target(store, name, step).vector for name in benchmarks]
    total_D = sum_of_units(vectors)
    length = float(np.linalg.norm(vectors[0].astype(np.float64))) if len(vectors) == 1 else 1.0
    return (total_D / (np.linalg.norm(total_D) or 1.0)).astype(np.float32), length
