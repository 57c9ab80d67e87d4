"""Reading rows from disk: small arrays are read whole and checked; codes are memory-mapped, one chunk at a time.

A mapping holds a file descriptor, so only the most recently used mappings stay open.
"""

import mmap
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gradstore.durable import crc32c, reading
from gradstore.errors import DamagedError
from gradstore.inside import open_folder, open_in, open_inside
from gradstore.layout import RowArray, store_of


def read_column(generation: Path, array: RowArray, rows: int, crcs: tuple[int, ...]) -> np.ndarray:
    """Read all published entries of a one-dimensional array and check their checksums.

    Raises DamagedError that names the chunk file if its bytes do not match.
    """
    folder = generation / array.name
    paths = [folder / array.chunk_file(chunk) for chunk in range(array.chunks(rows))]
    with reading(folder):
        opened = open_folder(folder, store_of(generation.parent))
    try:
        for chunk, path in enumerate(paths):  # Before memory is taken for as many rows as the manifest claims.
            with reading(path):
                size = os.stat(path.name, dir_fd=opened, follow_symlinks=False).st_size
            if size < array.rows_in(chunk, rows) * array.row_bytes:
                raise DamagedError(f"{path}: damaged: shorter than its {array.rows_in(chunk, rows)} published rows")
        column = np.empty(rows, dtype=array.dtype)
        for chunk, path in enumerate(paths):
            part = column[chunk * array.chunk_rows :][: array.chunk_rows]
            with reading(path), open(open_in(opened, path), "rb", buffering=0) as file:
                got = file.readinto(memoryview(part.view(np.uint8)))  # type: ignore[arg-type]
            if got != part.nbytes or crc32c(part) != crcs[chunk]:
                raise DamagedError(f"{path}: damaged: its bytes do not match their checksum; see `gradstore verify`")
    finally:
        os.close(opened)
    return column


class CodeRows:
    """The published codes of a collection, chunk by chunk; the most recently used chunks stay open or in memory."""

    def __init__(self, read: Callable[[int], np.ndarray], most: int) -> None:
        """read: chunk number -> its published rows, [rows in it, width], read-only. most: chunks that are kept."""
        self._read, self._most = read, most
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def chunk(self, chunk: int) -> np.ndarray:
        """The published rows of one chunk, shape [rows in it, width], read-only."""
        with self._lock:
            if chunk in self._kept:
                self._kept.move_to_end(chunk)
                return self._kept[chunk]
        rows = self._read(chunk)
        with self._lock:
            self._kept[chunk] = rows
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return rows


def mapped_rows(generation: Path, array: RowArray, rows: int) -> CodeRows:
    """The first `rows` rows of an array, over mapped chunk files; DamagedError for a file that is too short."""

    def read(chunk: int) -> np.ndarray:
        path = generation / array.name / array.chunk_file(chunk)
        shape = array.shape(array.rows_in(chunk, rows))
        size = shape[0] * array.row_bytes
        with reading(path):
            descriptor = open_inside(path, store_of(generation.parent))
            try:
                # Touching a mapping past the end of its file would kill the process.
                if os.fstat(descriptor).st_size < size:
                    raise DamagedError(f"{path}: damaged: shorter than its {shape[0]} published rows")
                mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            finally:
                os.close(descriptor)
        return np.frombuffer(mapped, dtype=array.dtype).reshape(shape)

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CodeRows(read, 4096 if soft == resource.RLIM_INFINITY else max(8, min(4096, soft // 4)))
