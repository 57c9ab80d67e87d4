"""turbovec kind: TurboQuant codes of 4 bits per dimension (arXiv 2504.19874); row lengths are stored separately.

turbovec normalises rows itself, so gradients with heavy-tailed norms lose no accuracy.
"""

from pathlib import Path
from typing import Self

import numpy as np
from turbovec import TurboQuantIndex

from gradstore.engine.searching.indexes.kinds import Kind
from gradstore.errors import RequestError

_BITS = 4
_LARGEST_DIM = 16384


class Turbovec(Kind):
    """A TurboQuantIndex; rows are zero-padded to a multiple of 8 dimensions."""

    name = "turbovec"
    factors = (1.2, 1.5, 2, 3, 4, 6, 8)

    def __init__(self, dim: int, built: TurboQuantIndex | None = None) -> None:
        if dim > _LARGEST_DIM:
            raise RequestError(f"a turbovec index takes at most {_LARGEST_DIM} dimensions, the store has {dim}")
        self._padded = -(-dim // 8) * 8
        self._built = TurboQuantIndex(self._padded, _BITS) if built is None else built

    def __len__(self) -> int:
        return len(self._built)

    def add(self, rows_PD: np.ndarray) -> None:
        self._built.add(self._pad(rows_PD))

    def search(self, queries_QD: np.ndarray, m: int, mask_N: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        scores, entries = self._built.search(self._pad(queries_QD), m, mask=mask_N)
        return np.asarray(scores), np.asarray(entries, np.int64)

    def save(self, path: Path) -> None:
        self._built.write(str(path), durable=False)

    @classmethod
    def load(cls, path: Path, n: int, dim: int) -> Self:
        index = cls(dim, TurboQuantIndex.load(str(path)))
        if (len(index), index._built.dim) != (n, index._padded):
            raise ValueError(f"not a turbovec index of {n} entries of {dim} dimensions")
        return index

    def _pad(self, rows: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(rows, np.float32)
        missing = self._padded - rows.shape[1]
        return np.pad(rows, ((0, 0), (0, missing))) if missing else rows
