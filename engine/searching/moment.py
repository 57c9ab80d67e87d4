"""The second moment of a view's rows without its matrix: M/n v = sum over rows of g (g . v) / n, in one pass.

    moment = Moment(view, live_positions, unit)        g = unit row * norm / unit
    moment.times(vectors_QD)                           one pass over the rows, on every core
    moment.sampled(32768)                              the matrix of a sample of rows, to precondition with

int8 rows are read as they are stored, both products while a row is in the cache (_moment.c). Other rows, and
installations without a C compiler, decode blocks of rows. What is rounded is below 2^-30 of the largest terms of a sum:
where the moment is nearly singular, its inverse makes errors of the sums many times larger.

P rows of a block or piece, N rows, Q vectors, D sketch dimensions.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from types import ModuleType

import numpy as np

from gradstore import View
from gradstore.stored_rows import Piece

_BLOCK_BYTES = 4 << 20
"""Size of a decoded block."""
_LARGEST_DIGIT = 32767
_EVERY = np.empty(0, np.int64)


class Moment:
    """Products with the second moment M/n of some rows of a view, lengths in units of `unit`."""

    def __init__(self, view: View, positions: np.ndarray, unit: float) -> None:
        """positions: int64 [N], ascending, at least one. unit: above 0; keeps squares of tiny norms from vanishing."""
        self._view, self._positions, self._unit = view, positions, unit

    def times(self, vectors_QD: np.ndarray) -> np.ndarray:
        """M/n times each vector, float64 [Q, D]; the same bytes on any number of cores."""
        kernel = _kernel() if self._view.stored.dtype == "int8" else None
        product = self._decoded(vectors_QD) if kernel is None else self._stored(kernel, vectors_QD)
        total_QD = np.zeros(vectors_QD.shape)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for part_QD in pool.map(product, self._weighed):
                total_QD += part_QD
        return total_QD / len(self._positions)

    def sampled(self, n: int) -> np.ndarray:
        """The moment of n rows drawn by their squared norms, float64 [D, D]; a row can be drawn several times.

        An unbiased estimate of M/n: drawn so, rows count with unit length, and no few of them decide. One row is drawn
        from each n-th of the sum of squares, in the order of the stored rows, the same at every call.
        """
        row_order = self._positions[np.argsort(self._view.stored.numbers[self._positions], kind="stable")]
        squares_N = (self._view.norms[row_order] / self._unit) ** 2.0
        sums_N = np.cumsum(squares_N)
        drawn_n = (np.arange(n) + np.random.default_rng(0).random(n)) * (sums_N[-1] / n)
        chosen, times = np.unique(np.minimum(np.searchsorted(sums_N, drawn_n), len(row_order) - 1), return_counts=True)
        blocks = np.array_split(np.arange(len(chosen)), -(-len(chosen) * 4 * self._view.dim // (2 * _BLOCK_BYTES)))

        def moment(some: np.ndarray) -> np.ndarray:
            rows_PD = self._view.rows(row_order[chosen[some]])
            rows_PD *= np.sqrt(times[some])[:, None]
            return rows_PD.T @ rows_PD

        total_DD = np.zeros((self._view.dim, self._view.dim))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for part_DD in pool.map(moment, blocks):
                total_DD += part_DD
        return total_DD * (sums_N[-1] / n / len(row_order))

    @cached_property
    def _weighed(self) -> list[tuple[Piece, np.ndarray]]:
        """The rows by chunk file, with the squared length of each code's unit, float64 [P]."""
        return [
            (piece, (self._view.norms[piece.positions].astype(np.float64) * piece.scale / self._unit) ** 2)
            for piece in self._view.stored.pieces(self._positions)
        ]

    def _stored(self, kernel: ModuleType, vectors_QD: np.ndarray) -> Callable[[tuple[Piece, np.ndarray]], np.ndarray]:
        digits, steps_Q = _digits_of(vectors_QD)

        def product(weighed: tuple[Piece, np.ndarray]) -> np.ndarray:
            piece, weights_P = weighed
            found_QD = np.zeros(vectors_QD.shape)
            within = _EVERY if piece.whole else piece.within
            kernel.moment_int8(self._view.dim, piece.codes, within, weights_P, digits, steps_Q, found_QD)
            return found_QD

        return product

    def _decoded(self, vectors_QD: np.ndarray) -> Callable[[tuple[Piece, np.ndarray]], np.ndarray]:
        at_once = max(1, _BLOCK_BYTES // (8 * self._view.dim))

        def product(weighed: tuple[Piece, np.ndarray]) -> np.ndarray:
            positions, found_QD = weighed[0].positions, np.zeros(vectors_QD.shape)
            for start in range(0, len(positions), at_once):
                some = positions[start : start + at_once]
                rows_PD = self._view.stored.unit_rows(some).astype(np.float64)
                rows_PD *= (self._view.norms[some] / self._unit)[:, None]
                found_QD += (vectors_QD @ rows_PD.T) @ rows_PD
            return found_QD

        return product


def sums_by_group(view: View, positions: np.ndarray, group_N: np.ndarray, n_groups: int) -> np.ndarray:
    """Sum of the gradients of each group, unit row * norm, float64 [groups, D]; positions int64 [N], ascending.

    group_N: int64 [N], each in [0, n_groups). Other than int8 rows are decoded, in blocks.
    """
    kernel = _kernel() if view.stored.dtype == "int8" else None
    group_P = np.full(len(view), -1)
    group_P[positions] = group_N
    total_SD = np.zeros((n_groups, view.dim))
    at_once = max(1, _BLOCK_BYTES // (8 * view.dim))

    def stored(piece: Piece, kernel: ModuleType) -> list[tuple[int, np.ndarray]]:
        factors, codes, within = view.norms[piece.positions].astype(np.float64) * piece.scale, piece.codes, piece.within
        found = []
        for group, some in _by_group(group_P[piece.positions]):
            sum_D = np.zeros(view.dim)
            kernel.sum_int8(view.dim, codes, within[some], factors[some], sum_D)
            found.append((group, sum_D))
        return found

    def decoded(piece: Piece) -> list[tuple[int, np.ndarray]]:
        found = []
        for start in range(0, len(piece.positions), at_once):
            at = piece.positions[start : start + at_once]
            rows_PD = view.stored.unit_rows(at).astype(np.float64)
            rows_PD *= view.norms[at, None]
            found += [(group, rows_PD[some].sum(axis=0)) for group, some in _by_group(group_P[at])]
        return found

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        sums = pool.map(
            decoded if kernel is None else lambda piece: stored(piece, kernel), view.stored.pieces(positions)
        )
        for part in sums:
            for group, sum_D in part:
                total_SD[group] += sum_D
    return total_SD


def _by_group(group_N: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Each group with the places of its members, ascending."""
    order_N = np.argsort(group_N, kind="stable")
    groups, first = np.unique(group_N[order_N], return_index=True)
    return list(zip(groups.tolist(), np.split(order_N, first[1:]), strict=True))


def _digits_of(vectors_QD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors as step * (first + second / 65534): int16 digits [Q, 2, D], float64 steps [Q]."""
    steps_Q = np.abs(vectors_QD).max(axis=1) / _LARGEST_DIGIT
    scaled_QD = vectors_QD / np.where(steps_Q > 0, steps_Q, 1)[:, None]
    first_QD = np.rint(scaled_QD)
    second_QD = np.rint((scaled_QD - first_QD) * 2 * _LARGEST_DIGIT)
    return np.stack([first_QD, second_QD], axis=1).astype(np.int16), steps_Q


@cache
def _kernel() -> ModuleType | None:
    """The compiled module of `_moment.c`; None if it was not built."""
    try:
        from gradstore.engine.searching import _moment
    except ImportError:
        return None
    return _moment
