"""flat kind: FAISS's exact float32 index, on the GPU if faiss-gpu finds one. Files are memory-mapped when opened."""

import struct
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import numpy as np

from gradstore.engine.searching.indexes.kinds import Kind

faiss: Any = import_module("faiss")
"""Typed as Any: FAISS's own stubs describe the C++ signatures, not the Python ones."""

_HEAD = struct.Struct("<4siq")
"""Beginning of a FAISS file: type, dimensions, number of entries."""
_MOST_HEADER = 4096
"""Most bytes of a flat FAISS file beside its entries."""
_GPU_K = 2048
"""Most results per query of a FAISS GPU search."""


class Flat(Kind):
    """float32 rows, exact: 4 bytes per dimension."""

    name = "flat"
    exact = True

    def __init__(self, dim: int, built: Any = None) -> None:
        self.faiss_index = faiss.IndexFlatIP(dim) if built is None else built
        self._gpu_copy: Any = None
        self._resources: Any = None
        self._mapped = built is not None

    def __len__(self) -> int:
        return int(self.faiss_index.ntotal)

    def add(self, rows_PD: np.ndarray) -> None:
        if self._mapped and len(rows_PD):
            # Adding to a mapped index ends the process: it is copied into memory first.
            self.faiss_index = faiss.deserialize_index(faiss.serialize_index(self.faiss_index))
            self._mapped = False
        self.faiss_index.add(np.ascontiguousarray(rows_PD))
        self._gpu_copy = None

    def search(self, queries_QD: np.ndarray, m: int, mask_N: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        if mask_N is None and m <= _GPU_K and faiss.get_num_gpus():
            return self._on_gpu().search(queries_QD, m)
        parameters = None
        if mask_N is not None:
            bits = np.packbits(mask_N, bitorder="little")
            parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
        return self.faiss_index.search(queries_QD, m, params=parameters)

    def save(self, path: Path) -> None:
        faiss.write_index(self.faiss_index, str(path))

    @classmethod
    def load(cls, path: Path, n: int, dim: int) -> Self:
        # FAISS allocates what the header claims, so the claims are compared with the file first.
        with path.open("rb") as file:
            magic, its_dim, its_n = _HEAD.unpack(file.read(_HEAD.size).ljust(_HEAD.size, b"\0"))
        spare = path.stat().st_size - 4 * n * dim
        if not magic.startswith(b"IxF") or (its_dim, its_n) != (dim, n) or not 0 < spare <= _MOST_HEADER:
            raise ValueError(f"not a flat FAISS index of {n} entries of {dim} dimensions")
        mapped = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        if not isinstance(mapped, faiss.IndexFlat):
            raise ValueError(f"a FAISS index of type {type(mapped).__name__}")
        return cls(mapped.d, mapped)

    def _on_gpu(self) -> Any:
        if self._gpu_copy is None:
            self._resources = faiss.StandardGpuResources()
            self._gpu_copy = faiss.index_cpu_to_gpu(self._resources, 0, self.faiss_index)
        return self._gpu_copy
