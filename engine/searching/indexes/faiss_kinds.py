"""FAISS kinds: Flat, scalar quantiser, RaBitQ, inverted lists; on the GPU if faiss-gpu finds one and supports the kind.

Quantised entries are unit rows. FAISS fits ranges per dimension and cells by distance; heavy-tailed norms would spoil
both. Files are memory-mapped when opened for reading.
"""

from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from gradstore.engine.searching.indexes.kinds import Effort, Kind

faiss: Any = import_module("faiss")
"""Typed as Any: FAISS's own stubs describe the C++ signatures, not the Python ones."""

_GPU_K = 2048
"""Most results per query of a FAISS GPU search."""


class FaissKind(Kind):
    """One FAISS index with the inner product as its metric."""

    on_gpu: ClassVar[bool] = False

    def __init__(self, dim: int, n_expected: int, built: Any = None) -> None:
        super().__init__(dim, n_expected)
        self.faiss_index = self.make() if built is None else built
        self._gpu_copy: Any = None
        self._resources: Any = None
        self._mapped = False

    def make(self) -> Any:
        raise NotImplementedError

    def parameters(self, effort: Effort, selector: Any) -> Any:
        """Search parameters; `selector` may be None."""
        return None if selector is None else faiss.SearchParameters(sel=selector)

    def __len__(self) -> int:
        return int(self.faiss_index.ntotal)

    def train(self, sample_PD: np.ndarray) -> None:
        self.faiss_index.train(np.ascontiguousarray(sample_PD))

    def add(self, rows_PD: np.ndarray) -> None:
        if self._mapped and len(rows_PD):
            # Adding to a mapped index ends the process: it is copied into memory first.
            self.faiss_index = faiss.deserialize_index(faiss.serialize_index(self.faiss_index))
            self._mapped = False
        self.faiss_index.add(np.ascontiguousarray(rows_PD))
        self._gpu_copy = None

    def search(
        self, queries_QD: np.ndarray, m: int, effort: Effort, mask_N: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        if self.on_gpu and mask_N is None and m <= _GPU_K and faiss.get_num_gpus():
            return self._on_gpu(effort).search(queries_QD, m)
        bits = None if mask_N is None else np.packbits(mask_N, bitorder="little")
        selector = None if bits is None else faiss.IDSelectorBitmap(bits)
        return self.faiss_index.search(queries_QD, m, params=self.parameters(effort, selector))

    def save(self, path: Path) -> None:
        faiss.write_index(self.faiss_index, str(path))

    @classmethod
    def load(cls, path: Path) -> Self:
        loaded = cls(1, 0, faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC))
        loaded.dim, loaded.n_expected, loaded._mapped = loaded.faiss_index.d, len(loaded), True
        return loaded

    def _on_gpu(self, effort: Effort) -> Any:
        if self._gpu_copy is None:
            self._resources = faiss.StandardGpuResources()
            self._gpu_copy = faiss.index_cpu_to_gpu(self._resources, 0, self.faiss_index)
        if effort.probes:
            self._gpu_copy.nprobe = effort.probes
        return self._gpu_copy


class Flat(FaissKind):
    """float32 rows, exact: 4 bytes per dimension."""

    name = "flat"
    exact = True
    scaled = True
    on_gpu = True

    def make(self) -> Any:
        return faiss.IndexFlatIP(self.dim)

    def efforts(self) -> list[Effort]:
        return [Effort()]


class ScalarQuantizer(FaissKind):
    """8 bits per dimension."""

    name = "sq"

    def make(self) -> Any:
        return faiss.IndexScalarQuantizer(self.dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)


class RaBitQ(FaissKind):
    """1 bit per dimension, queries in 8 bits (arXiv 2405.12497)."""

    name = "rabitq"

    def make(self) -> Any:
        return faiss.IndexRaBitQ(self.dim, faiss.METRIC_INNER_PRODUCT)

    def parameters(self, effort: Effort, selector: Any) -> Any:
        parameters = faiss.RaBitQSearchParameters()
        parameters.qb = 8
        if selector is not None:
            parameters.sel = selector
        return parameters


class RaBitQFastScan(FaissKind):
    """1 bit per dimension in FAISS's SIMD layout. At thousands of dimensions its answers are silently wrong;
    it is here to show that the self-test refuses it."""

    name = "rabitq_fastscan"
    masks = False

    def make(self) -> Any:
        return faiss.IndexRaBitQFastScan(self.dim, faiss.METRIC_INNER_PRODUCT)

    def parameters(self, effort: Effort, selector: Any) -> Any:
        return None


class InvertedLists(FaissKind):
    """8-bit rows in about 4 sqrt(N) lists; the self-test picks how many lists a search reads."""

    name = "ivf"
    on_gpu = True

    def make(self) -> Any:
        n_lists = int(max(1, min(4 * np.sqrt(self.n_expected), self.n_expected / 39)))
        made = faiss.index_factory(self.dim, f"IVF{n_lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        made.cp.min_points_per_centroid = 1  # Too few points cost recall, which the self-test measures.
        return made

    def parameters(self, effort: Effort, selector: Any) -> Any:
        return faiss.SearchParametersIVF(nprobe=effort.probes, sel=selector)

    def efforts(self) -> list[Effort]:
        n_lists = int(self.faiss_index.nlist)
        probes = [p for p in (8, 16, 32, 64, 128, 256, 512, 1024, 2048) if p < n_lists]
        return [Effort(1.5, p) for p in [*probes, n_lists]] + [Effort(4, n_lists)]
