"""Lookup of ids among those of a million problems, without a Python string for each: sorted 64-bit hashes.

The hash only proposes a row; the texts decide. It takes 12 bytes an id and a fraction of a second to build.
"""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from gradstore.errors import RequestError

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
_FACTOR = 0x9E3779B97F4A7C15
"""Odd: a power of it is the weight of a byte's place in its text."""
_AT_ONCE = 65536


class IdLookup:
    """Rows of ids in a column."""

    def __init__(self, ids: "pa.Array") -> None:
        """ids: large strings, none null or empty."""
        self._ids = ids
        hashes = hashes_of(ids)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._rows = hashes[order], order.astype(np.int32)

    def find(self, asked: "pa.Array") -> np.ndarray:
        """Row of each id (the first, if it occurs twice), -1 for unknown ids and nulls; int64 [len(asked)]."""
        import pyarrow.compute as pc

        rows = np.full(len(asked), -1, np.int64)
        if not len(self._ids) or not len(asked):
            return rows
        wanted = hashes_of(asked)
        place = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        maybe = np.flatnonzero(self._hashes[place] == wanted)
        found = self._rows[place[maybe]].astype(np.int64)
        equal = pc.equal(asked.take(maybe), self._ids.take(found)).fill_null(False).to_numpy(zero_copy_only=False)
        rows[maybe[equal]] = found[equal]
        others = maybe[~equal]
        if len(others):  # Another id has the same hash.
            exact = pc.index_in(asked.take(others), value_set=self._ids, skip_nulls=True)
            rows[others] = exact.fill_null(-1).to_numpy(zero_copy_only=False)
        return rows

    def repeated(self) -> str | None:
        """An id that occurs more than once; None if all are different."""
        same = self._hashes[1:] == self._hashes[:-1]
        if not same.any():
            return None
        rows = np.sort(self._rows[np.append(same, False) | np.append(False, same)])
        counts = Counter(self._ids.take(rows).to_pylist())
        return next((name for name, count in counts.items() if count > 1), None)


def listed(ids: Iterable[T]) -> list[T]:
    """The ids; RequestError for one text, whose characters would be taken for ids."""
    if isinstance(ids, str):
        raise RequestError(f"ids are {ids!r}, expected a list of them: [{ids!r}]")
    return list(ids)


def id_array(ids: "Iterable[object] | pa.Array") -> "pa.Array":
    """Ids as large strings (an array of them stays); null for what cannot be an id: no text, or not valid Unicode."""
    import pyarrow as pa

    if isinstance(ids, pa.Array):
        return ids
    ids = listed(ids)
    try:
        if set(map(type, ids)) <= {str}:
            # From buffers: `pa.array` imports pandas, which takes longer than finding a few ids.
            texts = [str(name).encode() for name in ids]
            ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
            return pa.LargeStringArray.from_buffers(len(ids), pa.py_buffer(ends), pa.py_buffer(b"".join(texts)))
    except UnicodeEncodeError:
        pass
    return pa.array([name if isinstance(name, str) and _is_valid(name) else None for name in ids], pa.large_string())


def hashes_of(ids: "pa.Array") -> np.ndarray:
    """Hash of each large string, uint64: its bytes times powers of a factor, mixed; 0 for an empty one or a null."""
    hashes = np.zeros(len(ids), np.uint64)
    _, offsets, text = ids.buffers()
    ends = np.frombuffer(offsets, np.int64)[ids.offset : ids.offset + len(ids) + 1]
    data = np.frombuffer(text or b"", np.uint8)
    with np.errstate(over="ignore"):
        longest = int(np.diff(ends).max(initial=0))
        weights = np.cumprod(np.full(longest, _FACTOR, np.uint64), dtype=np.uint64)
        for start in range(0, len(ids), _AT_ONCE):
            some = ends[start : start + _AT_ONCE + 1]
            lengths = np.diff(some)
            filled = np.flatnonzero(lengths)
            if not len(filled):
                continue
            first = int(some[0])
            within = np.arange(int(some[-1]) - first) - np.repeat(some[:-1] - first, lengths)
            terms = (data[first : int(some[-1])].astype(np.uint64) + np.uint64(1)) * weights[within]
            found = np.add.reduceat(terms, some[:-1][filled] - first)
            found ^= found >> np.uint64(29)
            found *= np.uint64(0xBF58476D1CE4E5B9)
            hashes[start + filled] = found ^ (found >> np.uint64(32))
    return hashes


def _is_valid(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
