"""Reading rows from disk: small arrays are read whole and checked; codes are memory-mapped, one chunk at a time.

A mapping holds a file descriptor, so only the most recently used mappings stay open.
"""

import mmap
import os
import resource
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import numpy as np

from gradstore.durable import crc32c, reading
from gradstore.errors import DamagedError
from gradstore.layout import RowArray


def read_column(generation: Path, array: RowArray, rows: int, crcs: tuple[int, ...]) -> np.ndarray:
    """Read all published entries of a one-dimensional array and check their checksums.

    Raises DamagedError that names the chunk file if its bytes do not match.
    """
    column = np.empty(rows, dtype=array.dtype)
    for chunk, start in enumerate(range(0, rows, array.chunk_rows)):
        part = column[start : start + array.chunk_rows]
        path = generation / array.name / array.chunk_file(chunk)
        with reading(path), open(path, "rb", buffering=0) as file:
            got = file.readinto(memoryview(part.view(np.uint8)))  # type: ignore[arg-type]
        if got != part.nbytes or crc32c(part) != crcs[chunk]:
            raise DamagedError(f"{path}: damaged: its bytes do not match their checksum; see `gradstore verify`")
    return column


def map_chunk(generation: Path, array: RowArray, chunk: int, rows: int) -> np.ndarray:
    """Map the first `rows` rows of a chunk file as a read-only array; DamagedError if the file is shorter."""
    path = generation / array.name / array.chunk_file(chunk)
    size = rows * array.row_bytes
    with reading(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            # Touching a mapping past the end of its file would kill the process.
            if os.fstat(descriptor).st_size < size:
                raise DamagedError(f"{path}: damaged: shorter than its {rows} published rows")
            mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
    return np.frombuffer(mapped, dtype=array.dtype).reshape(array.shape(rows))


class CodeRows(Protocol):
    """The published codes of a collection, chunk by chunk."""

    def chunk(self, chunk: int) -> np.ndarray:
        """The published rows of one chunk, shape [rows in it, width], read-only."""
        ...


class MappedRows:
    """The published rows of one array by row number, over mapped chunk files."""

    def __init__(self, generation: Path, array: RowArray, rows: int) -> None:
        self.rows = rows
        self._generation = generation
        self._array = array
        self._mapped: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._capacity = 4096 if soft == resource.RLIM_INFINITY else max(8, min(4096, soft // 4))

    def chunk(self, chunk: int) -> np.ndarray:
        """The published rows of one chunk, shape [rows in it, width], read-only."""
        with self._lock:
            if chunk in self._mapped:
                self._mapped.move_to_end(chunk)
                return self._mapped[chunk]
            rows = self._array.rows_in(chunk, self.rows)
            mapped = self._mapped[chunk] = map_chunk(self._generation, self._array, chunk, rows)
            if len(self._mapped) > self._capacity:
                self._mapped.popitem(last=False)
            return mapped
