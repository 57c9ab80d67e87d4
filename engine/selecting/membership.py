"""Lookup of ids in a list of other ids, vectorised with one hash table."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def places(
    ids: Sequence[str] | np.ndarray | pa.ChunkedArray, among: Sequence[str] | np.ndarray | pa.ChunkedArray
) -> np.ndarray:
    """Index of each id in `among` (the first, if it occurs twice), -1 if missing; int64 [len(ids)]."""
    found = pc.index_in(_strings(ids), value_set=_strings(among))
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _strings(ids: Sequence[str] | np.ndarray | pa.ChunkedArray) -> pa.Array:
    if isinstance(ids, pa.ChunkedArray):
        return ids.combine_chunks().cast(pa.large_string())
    return pa.array(np.asarray(ids, object), pa.large_string())
