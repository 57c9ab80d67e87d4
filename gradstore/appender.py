"""Rows onto disk: the newest chunk file of every array, preallocated, written in place past the published
rows.

Nothing here is visible to a reader until a manifest with the new row count and checksums is published; `sync`
is what must happen before that, or `syncing`, beside the manifest's own way to the disk.
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
from gradstore.layout import IN_USE, PROBLEMS, ZARR, RowArray, group_json

_WRITES_WAITING = 2
"""Calls of `write` whose rows may be on their way: more would only hold memory."""
_LARGE = 1 << 20
"""Bytes of a write from which it goes past the page cache, beside others."""
_LARGE_WAITING = 4
"""Large writes on their way to the disk: enough to keep it busy."""
_DISK_THREADS = 9
_SYNCS_WAITING = 90
"""Files that may wait to be synced; each holds a descriptor."""


@dataclass
class _OpenChunk:
    """A chunk file that more rows are written to."""

    path: Path
    descriptor: int
    large: list[Future] = field(default_factory=list)
    """Writes on their way: to be waited for before a sync."""

    def sync(self) -> None:
        if self.large:
            wait(self.large)  # all of them, before one's error lets the file be closed under another
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
    """Appends rows to all arrays of one generation; checksums grow with the bytes.

    Where they are many, one thread of its own takes them, in order, while the caller makes the next rows; it opens
    files and takes checksums, and others write what is large and sync finished chunks. What goes wrong there is raised
    by the next `write` or by `sync`, which must not be skipped.
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
        """Checksums of all rows up to the last `settle`, as a manifest keeps them."""
        return {name: tuple(crcs) for name, crcs in self._crcs.items()}

    def write(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append rows: one entry of every array for each, not yet durable and not yet visible.

        The arrays are this object's from now on.
        """
        few = columns["codes"].nbytes < _LARGE
        self._wait(0 if few else _WRITES_WAITING - 1)
        self.rows += len(columns["problem"])
        if few:
            self._write(columns)  # Sooner done than handed over.
        else:
            self._writes.append(self._writer.submit(self._write, columns))

    def sync(self) -> None:
        """Make every row so far durable."""
        with self.syncing():
            pass

    def settle(self) -> None:
        """Wait until every row so far is with the system; `chunks` is up to date from here on."""
        self._wait(0)

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """Every row so far goes to the disk while the block runs, and is there when it ends."""
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
        """Let go of the files; what has not been synced may or may not be on the disk."""
        self._writer.shutdown(cancel_futures=True)
        self._disk.shutdown()
        for opened in self._open.values():
            os.close(opened.descriptor)
        self._open.clear()

    def _wait(self, most: int) -> None:
        """Until at most so many writes are on their way; raises the first error."""
        while len(self._writes) > most:
            self._writes[0].result()
            self._writes.popleft()

    def _wait_for_syncs(self, most: int) -> None:
        while len(self._syncs) > most:
            self._syncs[0].result()
            self._syncs.popleft()

    def _write(self, columns: Mapping[str, np.ndarray]) -> None:
        if self._broken:
            return  # Nothing is written behind what could not be written.
        self._broken = True
        for array in self._arrays:
            self._put(array, np.ascontiguousarray(columns[array.name], dtype=array.dtype))
        self._written += len(columns["problem"])
        self._broken = False

    def _put(self, array: RowArray, entries: np.ndarray) -> None:
        """All entries of one array, chunk file by chunk file."""
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
            self._write_part(opened, part, within * array.row_bytes)
            crcs[chunk] = crc32c(part, crcs[chunk])
            done += len(part)
            if within + len(part) == array.chunk_rows:
                self._wait_for_syncs(_SYNCS_WAITING)
                self._syncs.append(self._disk.submit(self._open.pop(array.name).sync_and_close))

    def _write_part(self, opened: _OpenChunk, part: np.ndarray, offset: int) -> None:
        """Whole pages, if they are many, go past the page cache."""
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
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._open[array.name] = _OpenChunk(path, descriptor)
            if not existed:
                self._grown.add(path.parent)
                preallocate(descriptor, array.chunk_bytes)


def create_generation(generation: Path, arrays: tuple[RowArray, ...]) -> None:
    """An empty generation folder: a Zarr group with every array at zero rows, and a folder for problems."""

    def create_array(array: RowArray) -> None:
        make_folder(generation / array.name)
        replace_file(generation / array.name / ZARR, array.zarr_json(0))

    make_folder(generation)
    at_once(create_array, arrays)
    make_folder(generation / PROBLEMS)
    replace_file(generation / ZARR, group_json({}))
    replace_file(generation / IN_USE, b"")


def show_rows(generation: Path, arrays: tuple[RowArray, ...], rows: int) -> None:
    """Let the arrays' zarr.json show `rows` rows, for readers that know Zarr but not the manifest."""

    def show(array: RowArray) -> None:
        path = generation / array.name / ZARR
        text = array.zarr_json(rows)
        with writing(path):
            current = path.read_bytes() if path.exists() else b""
        if current != text:
            replace_file(path, text)

    at_once(show, arrays)


def clear_beyond(generation: Path, arrays: tuple[RowArray, ...], rows: int) -> None:
    """Remove what lies beyond the published rows: later chunk files, and the last chunk's tail."""
    for array in arrays:
        full, within = divmod(rows, array.chunk_rows)
        folder = generation / array.name
        keep = {array.chunk_file(chunk) for chunk in range(array.chunks(rows))}
        with writing(folder):
            for path in folder.iterdir():
                if path.name != ZARR and path.name not in keep:
                    path.unlink()
            fsync_folder(folder)
        if within:
            _clear_tail(folder / array.chunk_file(full), within * array.row_bytes, array.chunk_bytes)


def _clear_tail(path: Path, used: int, size: int) -> None:
    with writing(path):
        descriptor = os.open(path, os.O_RDWR)
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
            if error.errno != errno.EINVAL:  # What file systems and disks say that cannot do this.
                raise
            write_all(descriptor, part, offset)


def _sync_folder(folder: Path) -> None:
    with writing(folder):
        fsync_folder(folder)
