"""Where some ids stand among others, by hashing them all at once."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def places(
    ids: Sequence[str] | np.ndarray | pa.ChunkedArray, among: Sequence[str] | np.ndarray | pa.ChunkedArray
) -> np.ndarray:
    """Place of each id among others (the first, if it is there twice), -1 where it is not; int64 [len(ids)]."""
    found = pc.index_in(_strings(ids), value_set=_strings(among))
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _strings(ids: Sequence[str] | np.ndarray | pa.ChunkedArray) -> pa.Array:
    if isinstance(ids, pa.ChunkedArray):
        return ids.combine_chunks().cast(pa.large_string())
    return pa.array(np.asarray(ids, object), pa.large_string())
