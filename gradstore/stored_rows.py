"""Stored rows of a view as they are on disk: codes and scales, by position. The exact scan and the indexes read them.

D sketch dimensions, N problems of the view, W bytes or elements of codes per row, n rows that were asked for.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from gradstore.errors import RequestError
from gradstore.quantise import decode
from gradstore.snapshot import Snapshot


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Some stored rows of one chunk file, not decoded."""

    positions: np.ndarray
    """Positions in the view, int64 [n], in the order of the rows."""
    rows: np.ndarray
    """Row numbers, int64 [n], ascending."""
    at: slice | np.ndarray
    """The positions as an index: a slice where they are consecutive, which is many times faster."""
    _snapshot: Snapshot

    @property
    def whole(self) -> bool:
        """Whether the rows are consecutive in the file."""
        return int(self.rows[-1] - self.rows[0]) + 1 == len(self.rows)

    @property
    def scale(self) -> np.ndarray:
        """Scale of each row, float32 [n]: decoded row = codes * scale."""
        column = self._snapshot.column("scale")
        return column[int(self.rows[0]) : int(self.rows[-1]) + 1] if self.whole else column[self.rows]

    @property
    def codes(self) -> np.ndarray:
        """Mapped codes from the first row to the last, with rows between that are of no interest: [m, W], read-only."""
        chunk, first = divmod(int(self.rows[0]), self._snapshot.header.chunk_rows)
        stop = first + int(self.rows[-1] - self.rows[0]) + 1
        return self._snapshot.codes.chunk(chunk)[first:stop]

    @property
    def within(self) -> np.ndarray:
        """Index of each row in `codes`, int64 [n]."""
        return self.rows - self.rows[0]


class StoredRows:
    """The rows of a view as they are on disk. Positions are int64; only `pieces` checks their range."""

    def __init__(self, snapshot: Snapshot, numbers: np.ndarray) -> None:
        self.numbers = numbers
        """Row number of each position within the generation, int64 [N]."""
        self._snapshot = snapshot
        self._last: tuple[np.ndarray | None, list[Piece]] | None = None

    @property
    def generation(self) -> int:
        """Number of the generation of files that holds the rows; rows of one generation never change."""
        return self._snapshot.manifest.generation

    @property
    def base(self) -> tuple[int, int]:
        """While this is the same, rows keep their numbers, problems theirs, and nothing is deleted: rows only come."""
        manifest = self._snapshot.manifest
        return manifest.generation, hash(tuple(sorted(manifest.tombstones.items())))

    @property
    def dtype(self) -> str:
        """How the rows are stored: int8, int4, 1bit, fp16 or fp32."""
        return self._snapshot.header.dtype

    def column(self, name: str) -> np.ndarray:
        """Entry of each row in a one-dimensional array (docs/format.md), [N]."""
        return self._snapshot.column(name)[self.numbers]

    def read_ahead(self) -> None:
        """Start to map and check the codes of these rows, in a thread of its own, while the caller does other work.

        Whoever needs a chunk meanwhile maps it as ever; a damaged one raises there.
        """
        chunks = np.unique(self.numbers // self._snapshot.header.chunk_rows).tolist()
        self._snapshot.codes.read_ahead(chunks)

    def pieces(self, positions: np.ndarray | None = None) -> list[Piece]:
        """Rows at some distinct positions (None: all), in any order: one Piece per chunk file, not decoded.

        The last pieces of all rows or of a read-only array (`View.live_positions`) are kept, for the next search.
        """
        last = self._last
        if last is not None and last[0] is positions:
            return last[1]
        found = self._pieces(positions)
        if positions is None or not positions.flags.writeable:
            self._last = positions, found
        return found

    def _pieces(self, positions: np.ndarray | None) -> list[Piece]:
        row_order = self._row_order
        every = positions is None
        if not every:
            wanted = np.zeros(len(self.numbers), dtype=bool)
            wanted[checked_positions(positions, len(self.numbers))] = True
            every = bool(wanted.all())
        if every:
            places = np.arange(len(self.numbers)) if row_order is None else row_order
        else:
            places = np.flatnonzero(wanted) if row_order is None else row_order[wanted[row_order]]
        rows = self.numbers if every and row_order is None else self.numbers[places]
        chunk_rows = self._snapshot.header.chunk_rows
        self._snapshot.column("scale")  # Read once, before several threads ask for it.
        cuts = np.searchsorted(rows, np.arange(0, self._snapshot.manifest.rows + chunk_rows, chunk_rows))
        return [
            Piece(places[a:b], rows[a:b], _index(places[a:b], ascending=row_order is None), self._snapshot)
            for a, b in pairwise(cuts.tolist())
            if b > a
        ]

    def places(self, positions: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        """Addresses of the rows at a few positions, without a copy.

        Mapped codes of the chunks, read-only; each row's chunk among these and its place in it, both int64 [n]; and
        scale float32 [n].
        """
        rows = self.numbers[positions]
        chunk_of, within_of = np.divmod(rows, self._snapshot.header.chunk_rows)
        numbers, which = np.unique(chunk_of, return_inverse=True)
        chunks = [self._snapshot.codes.chunk(chunk) for chunk in numbers.tolist()]
        return chunks, which.astype(np.int64, copy=False), within_of, self._snapshot.column("scale")[rows]

    def codes(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows at a few positions, copied but not decoded: codes [n, W] and scale float32 [n]."""
        rows = self.numbers[positions]
        return self._copied(rows), self._snapshot.column("scale")[rows]

    def unit_rows(self, positions: np.ndarray) -> np.ndarray:
        """Decoded rows, float32 [n, D]: unit length where live, zeros elsewhere."""
        header, rows = self._snapshot.header, self.numbers[positions]
        n = len(rows)
        out = np.empty((n, header.dim), dtype=np.float32)
        if not n:
            return out
        scale = self._snapshot.column("scale")
        if rows[-1] - rows[0] != n - 1 or not (n == 1 or bool(np.all(np.diff(rows) == 1))):
            decode(self._copied(rows), scale[rows], header.dtype, out)
            return out
        done = 0
        while done < n:
            start = int(rows[done])
            chunk, within = divmod(start, header.chunk_rows)
            take = min(n - done, header.chunk_rows - within)
            codes = self._snapshot.codes.chunk(chunk)[within : within + take]
            decode(codes, scale[start : start + take], header.dtype, out[done : done + take])
            done += take
        return out

    def _copied(self, rows: np.ndarray) -> np.ndarray:
        """Codes of some row numbers, copied, [n, W]."""
        if (rows[1:] < rows[:-1]).any():
            order = np.argsort(rows)
            return self._copied(rows[order])[np.argsort(order)]
        array = self._snapshot.header.arrays[0]
        codes = np.empty(array.shape(len(rows)), dtype=array.dtype)
        chunk_of, within_of = np.divmod(rows, array.chunk_rows)
        cuts = [0, *(np.flatnonzero(np.diff(chunk_of)) + 1).tolist(), len(rows)]
        for start, stop in pairwise(cuts) if len(rows) else ():
            part = slice(start, stop)
            chunk = self._snapshot.codes.chunk(int(chunk_of[start]))
            # mode="clip" saves a copy: numpy then writes directly to `out`.
            np.take(chunk, within_of[part], axis=0, out=codes[part], mode="clip")
        return codes

    @cached_property
    def _row_order(self) -> np.ndarray | None:
        """Positions sorted by row number; None if the rows are already sorted."""
        if bool(np.all(self.numbers[1:] > self.numbers[:-1])):
            return None
        return np.argsort(self.numbers)


def _index(places: np.ndarray, *, ascending: bool) -> slice | np.ndarray:
    """Places as a slice if they are consecutive. ascending: they are known to ascend."""
    first, last = int(places[0]), int(places[-1])
    consecutive = last - first + 1 == len(places) and (ascending or bool(np.all(places[1:] > places[:-1])))
    return slice(first, last + 1) if consecutive else places


def checked_positions(positions: Any, n: int) -> np.ndarray:
    """Positions as int64, also from a mask, bool [n]; RequestError if one is not a whole number in [0, n)."""
    order = np.asarray(positions)
    if order.dtype == bool and order.shape == (n,):
        return np.flatnonzero(order)
    if order.size == 0:
        return np.zeros(0, dtype=np.int64)
    if order.ndim != 1 or order.dtype.kind not in "iu":
        raise RequestError(f"positions must be whole numbers, one dimension, not {order.dtype} {order.shape}")
    if order.min() < 0 or order.max() >= n:
        raise RequestError(f"positions must be in [0, {n}), not {order.min()} to {order.max()}")
    return order.astype(np.int64, copy=False)
