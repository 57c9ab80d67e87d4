"""Appender: writes rows in place to the newest, preallocated chunk file of every array, after the published rows.

A reader sees nothing of this until a manifest with the new row count and checksums is published. Call `sync` before
that, or publish inside `syncing`, which syncs rows and manifest in parallel.
"""

import errno
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gradstore.durable import (
    PAGE,
    at_once,
    crc32c,
    fsync_folder,
    make_folder,
    preallocate,
    replace_file,
    syncing_beside,
    write_all,
    write_past_cache,
    writing,
)
from gradstore.inside import names_inside, open_inside, read_inside, remove_file
from gradstore.layout import IN_USE, PROBLEMS, ZARR, RowArray, group_json, store_of

MOST_TEXT = 1 << 16
"""Largest zarr.json of an array or group."""
_WRITES_WAITING = 2
"""Most pending calls of `write`: more would only hold memory."""
_LARGE = 1 << 20
"""Writes of at least this many bytes bypass the page cache and run in parallel."""
_MORE = 4
"""A chunk file reserves a part in so many more than it holds."""
_LARGE_WAITING = 4
"""Most pending large writes: enough to keep the disk busy."""
_DISK_THREADS = 9
_SYNCS_WAITING = 90
"""Most files waiting for a sync; each holds a descriptor."""


@dataclass
class _OpenChunk:
    """A chunk file that is still being written."""

    path: Path
    descriptor: int
    size: int
    """Bytes of the whole chunk."""
    reserved: int = 0
    """Bytes from its beginning that surely have their place on disk."""
    large: list[Future] = field(default_factory=list)
    """Pending large writes; a sync waits for them first."""

    def reserve(self, end: int) -> None:
        """Reserve the disk's space up to a byte, and some more each time; the file has its whole size from the first.

        So a full disk raises before a row is begun, and a collection of few rows takes no space for a whole chunk.
        """
        if end > self.reserved:
            more = min(self.size, -(-(end + end // _MORE) // PAGE) * PAGE)
            with writing(self.path):
                preallocate(self.descriptor, more)
                if os.fstat(self.descriptor).st_size < self.size:
                    os.ftruncate(self.descriptor, self.size)
            self.reserved = more

    def sync(self) -> None:
        if self.large:
            wait(self.large)  # Wait for all: an error of one closes the file that others still write to.
            for write in self.large:
                write.result()
            self.large.clear()
        with writing(self.path):
            os.fdatasync(self.descriptor)

    def sync_and_close(self) -> None:
        try:
            self.sync()
        finally:
            os.close(self.descriptor)


class Appender:
    """Appends rows to all arrays of one generation and updates the checksums with every write.

    Large appends run in a writer thread, in order, while the caller prepares the next rows. That thread opens files and
    computes checksums; other threads write large blocks and sync finished chunks. The next `write` or `sync` raises
    their errors, so `sync` must not be skipped.
    """

    def __init__(self, generation: Path, arrays: tuple[RowArray, ...], rows: int, chunks: Mapping) -> None:
        self.rows = rows
        self._generation = generation
        self._arrays = arrays
        self._crcs: dict[str, list[int]] = {array.name: list(chunks.get(array.name, ())) for array in arrays}
        self._written = rows
        self._open: dict[str, _OpenChunk] = {}
        self._dirty = False
        self._grown: set[Path] = set()  # Folders with new files.
        self._broken = False
        self._writer = ThreadPoolExecutor(1)
        self._writes: deque[Future] = deque()
        self._disk = ThreadPoolExecutor(_DISK_THREADS)
        self._large: deque[Future] = deque()
        self._syncs: deque[Future] = deque()

    @property
    def chunks(self) -> dict[str, tuple[int, ...]]:
        """Checksums of all rows up to the last `settle`, in the manifest's form."""
        return {name: tuple(crcs) for name, crcs in self._crcs.items()}

    def write(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append rows, with one entry per row in every array; they are not yet durable and not yet visible.

        The caller must not change the arrays afterwards.
        """
        few = columns["codes"].nbytes < _LARGE
        self._wait(0 if few else _WRITES_WAITING - 1)
        self.rows += len(columns["problem"])
        if few:
            self._write(columns)  # For few rows this is faster than a thread switch.
        else:
            self._writes.append(self._writer.submit(self._write, columns))

    def sync(self) -> None:
        """Make every row so far durable."""
        with self.syncing():
            pass

    def settle(self) -> None:
        """Wait until all rows so far are handed to the operating system; `chunks` is then up to date."""
        self._wait(0)

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """Context manager: syncs every row so far to disk while the block runs; all are durable when it ends."""
        self.settle()
        if self._dirty:
            self._syncs.extend(self._disk.submit(opened.sync) for opened in self._open.values() if opened.large)
            self._syncs.extend(self._disk.submit(_sync_folder, folder) for folder in self._grown)
        small = [opened for opened in self._open.values() if self._dirty and not opened.large]
        with syncing_beside({opened.descriptor: opened.path for opened in small}):
            yield
        self._wait_for_syncs(0)
        self._dirty = False
        self._grown.clear()

    def close(self) -> None:
        """Close the files; bytes that were not synced may or may not be on disk."""
        self._writer.shutdown(cancel_futures=True)
        self._disk.shutdown()
        for opened in self._open.values():
            os.close(opened.descriptor)
        self._open.clear()

    def _wait(self, most: int) -> None:
        """Wait until at most `most` writes are pending; raises the first error."""
        while len(self._writes) > most:
            self._writes[0].result()
            self._writes.popleft()

    def _wait_for_syncs(self, most: int) -> None:
        while len(self._syncs) > most:
            self._syncs[0].result()
            self._syncs.popleft()

    def _write(self, columns: Mapping[str, np.ndarray]) -> None:
        if self._broken:
            return  # After a failed write no more rows may follow.
        self._broken = True
        for array in self._arrays:
            self._put(array, np.ascontiguousarray(columns[array.name], dtype=array.dtype))
        self._written += len(columns["problem"])
        self._broken = False

    def _put(self, array: RowArray, entries: np.ndarray) -> None:
        """Write all entries of one array, chunk file by chunk file."""
        crcs = self._crcs[array.name]
        done = 0
        while done < len(entries):
            self._dirty = True
            chunk, within = divmod(self._written + done, array.chunk_rows)
            part = entries[done : done + array.chunk_rows - within]
            if within == 0:
                crcs.append(0)
            if array.name not in self._open:
                self._open_chunk(array, chunk)
            opened = self._open[array.name]
            opened.reserve(within * array.row_bytes + part.nbytes)
            self._write_part(opened, part, within * array.row_bytes)
            crcs[chunk] = crc32c(part, crcs[chunk])
            done += len(part)
            if within + len(part) == array.chunk_rows:
                self._wait_for_syncs(_SYNCS_WAITING)
                self._syncs.append(self._disk.submit(self._open.pop(array.name).sync_and_close))

    def _write_part(self, opened: _OpenChunk, part: np.ndarray, offset: int) -> None:
        """Write a part of a chunk; large page-aligned parts bypass the page cache."""
        if part.nbytes < _LARGE or (part.ctypes.data | part.nbytes | offset) % PAGE:
            with writing(opened.path):
                write_all(opened.descriptor, part, offset)
            return
        while len(self._large) >= _LARGE_WAITING:
            self._large.popleft().result()
        write = self._disk.submit(_write_large, opened.path, opened.descriptor, part, offset)
        opened.large.append(write)
        self._large.append(write)

    def _open_chunk(self, array: RowArray, chunk: int) -> None:
        path = self._generation / array.name / array.chunk_file(chunk)
        with writing(path):
            existed = path.exists()
            descriptor = open_inside(path, store_of(self._generation.parent), os.O_RDWR | os.O_CREAT)
            self._open[array.name] = _OpenChunk(path, descriptor, array.chunk_bytes)
            if not existed:
                self._grown.add(path.parent)


def create_generation(generation: Path, arrays: tuple[RowArray, ...]) -> None:
    """Create an empty generation folder: a Zarr group with every array at zero rows, and a folder for problems."""

    def create_array(array: RowArray) -> None:
        make_folder(generation / array.name)
        replace_file(generation / array.name / ZARR, array.zarr_json(0))

    make_folder(generation)
    at_once(create_array, arrays)
    make_folder(generation / PROBLEMS)
    replace_file(generation / ZARR, group_json({}))
    replace_file(generation / IN_USE, b"")


def show_rows(generation: Path, arrays: tuple[RowArray, ...], rows: int) -> None:
    """Set the row count in the arrays' zarr.json, for readers that know Zarr but not the manifest."""

    def show(array: RowArray) -> None:
        path = generation / array.name / ZARR
        text = array.zarr_json(rows)
        current = read_inside(path, store_of(generation.parent), MOST_TEXT) if os.path.lexists(path) else b""
        if current != text:
            replace_file(path, text)

    at_once(show, arrays)


def clear_beyond(generation: Path, arrays: tuple[RowArray, ...], rows: int) -> None:
    """Remove unpublished bytes: delete later chunk files and zero the tail of the last chunk."""
    for array in arrays:
        full, within = divmod(rows, array.chunk_rows)
        folder = generation / array.name
        keep = {array.chunk_file(chunk) for chunk in range(array.chunks(rows))}
        store = store_of(generation.parent)
        with writing(folder):
            for name in names_inside(folder, store):
                if array.is_chunk_file(name) and name not in keep:
                    remove_file(folder / name, store)
            fsync_folder(folder)
        if within:
            _clear_tail(folder / array.chunk_file(full), store, within * array.row_bytes, array.chunk_bytes)


def _clear_tail(path: Path, store: Path, used: int, size: int) -> None:
    with writing(path):
        descriptor = open_inside(path, store, os.O_RDWR)
        try:
            tail = os.pread(descriptor, size - used, used)
            if tail.count(0) == size - used:
                return
            preallocate(descriptor, size)
            write_all(descriptor, bytes(size - used), used)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_large(path: Path, descriptor: int, part: np.ndarray, offset: int) -> None:
    with writing(path):
        try:
            write_past_cache(path, part, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: the file system or disk does not support direct writes.
                raise
            write_all(descriptor, part, offset)


def _sync_folder(folder: Path) -> None:
    with writing(folder):
        fsync_folder(folder)
