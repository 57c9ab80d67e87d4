"""Reading rows from disk: small arrays are read whole; codes are memory-mapped, one chunk at a time.

All are checked against the manifest's checksums before anything is computed from them. Codes are checked when a chunk
is first mapped in this process, in the thread that is about to scan it: the bytes are then in the processor's cache.
"""

import mmap
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from gradstore.durable import crc32c, reading
from gradstore.errors import DamagedError, GradstoreError
from gradstore.inside import open_folder, open_in, open_inside
from gradstore.layout import RowArray, store_of
from gradstore.parallel_crc import crc32c_of


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


class _Checked:
    """Checksums of the files mapped in this process, so that the same bytes are not checked at every view or query.

    A file is the same if device, inode, size and both times are. A writer that appends changes its time: the chunk is
    then checked again, up to the rows that the asking view sees.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], tuple[tuple[int, ...], int]] = {}

    def holds(self, status: os.stat_result, mapped: np.ndarray, crc: int) -> bool:
        """Whether the mapped bytes have this checksum. status: of the file, taken before it was mapped."""
        state = mapped.nbytes, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        known_state, found = self._found.get((status.st_dev, status.st_ino), ((), -1))
        if known_state != state:
            found = crc32c_of(mapped)
            self._found[status.st_dev, status.st_ino] = state, found
        return found == crc


_CHECKED = _Checked()


class CodeRows:
    """The published codes of a collection, chunk by chunk; the most recently used chunks stay open or in memory."""

    def __init__(self, read: Callable[[int], np.ndarray], most: int, threads: int = 1) -> None:
        """read: chunk number -> its published rows, [rows in it, width], read-only. most: chunks that are kept.

        threads: those that read ahead.
        """
        self._read, self._most, self._threads = read, most, threads
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

    def read_ahead(self, chunks: list[int]) -> None:
        """Start threads that read these chunks, as many as are kept; a thread stops at the first that is damaged."""

        def read(some: list[int]) -> None:
            with suppress(GradstoreError):
                for chunk in some:
                    self.chunk(chunk)

        ahead = chunks[: self._most]
        for number in range(min(self._threads, len(ahead))):
            share = ahead[number :: self._threads]
            threading.Thread(target=read, args=(share,), name="read ahead", daemon=True).start()


def mapped_rows(generation: Path, array: RowArray, rows: int, crcs: tuple[int, ...]) -> CodeRows:
    """The first `rows` rows of an array, over mapped chunk files.

    crcs: checksum of each chunk's published bytes. DamagedError for a file that is too short or whose bytes differ.
    """

    def read(chunk: int) -> np.ndarray:
        path = generation / array.name / array.chunk_file(chunk)
        shape = array.shape(array.rows_in(chunk, rows))
        return map_checked(path, store_of(generation.parent), array.dtype, shape, crcs[chunk])

    return CodeRows(read, most_mapped())


def most_mapped() -> int:
    """Most files that one collection maps at once: a quarter of the descriptors that the process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else max(8, min(4096, soft // 4))


def map_checked(path: Path, root: Path, dtype: np.dtype, shape: tuple[int, ...], crc: int) -> np.ndarray:
    """The beginning of a file below `root`, mapped as a read-only array; DamagedError if short or of another checksum.

    shape: rows first.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    with reading(path):
        descriptor = open_inside(path, root)
        try:
            status = os.fstat(descriptor)
            # Touching a mapping past the end of its file would kill the process.
            if status.st_size < size:
                raise DamagedError(f"{path}: damaged: shorter than its {shape[0]} published rows")
            mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
    found = np.frombuffer(mapped, dtype=dtype).reshape(shape)
    if not _CHECKED.holds(status, found, crc):
        raise DamagedError(f"{path}: damaged: its bytes do not match their checksum; see `gradstore verify`")
    return found
