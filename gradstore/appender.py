"""Rows onto disk: the newest chunk file of every array, preallocated, written in place past the published
rows.

Nothing here is visible to a reader until a manifest with the new row count and checksums is published; `sync`
is what must happen before that.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gradstore.durable import (
    at_once,
    crc32c,
    fsync_folder,
    make_folder,
    preallocate,
    replace_file,
    write_all,
    writing,
)
from gradstore.layout import IN_USE, PROBLEMS, ZARR, RowArray, group_json


class Appender:
    """Appends rows to all arrays of one generation; checksums grow with the bytes."""

    def __init__(
        self, generation: Path, arrays: tuple[RowArray, ...], chunk_rows: int, rows: int, chunks: Mapping
    ) -> None:
        self.rows = rows
        self.chunk_rows = chunk_rows
        self._generation = generation
        self._arrays = arrays
        self._crcs: dict[str, list[int]] = {array.name: list(chunks.get(array.name, ())) for array in arrays}
        self._open: dict[str, tuple[Path, int]] = {}
        self._dirty = False
        self._new_files = False

    @property
    def chunks(self) -> dict[str, tuple[int, ...]]:
        """Checksums of all rows so far, as a manifest keeps them."""
        return {name: tuple(crcs) for name, crcs in self._crcs.items()}

    def write(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append rows: one entry of every array for each, not yet durable and not yet visible."""
        total = len(columns["problem"])
        done = 0
        while done < total:
            chunk, within = divmod(self.rows, self.chunk_rows)
            take = min(total - done, self.chunk_rows - within)
            if not self._open:
                at_once(lambda array, chunk=chunk: self._open_chunk(array, chunk), self._arrays)  # type: ignore[misc]
            for array in self._arrays:
                part = np.ascontiguousarray(columns[array.name][done : done + take], dtype=array.dtype)
                self._put(array, chunk, within, part)
            done += take
            self.rows += take
            if within + take == self.chunk_rows:
                self._finish_chunk()
        self._dirty = self._dirty or total > 0

    def sync(self) -> None:
        """Make every row so far durable."""
        if not self._dirty:
            return
        at_once(_sync_file, self._open.values())
        if self._new_files:
            at_once(_sync_folder, (self._generation / array.name for array in self._arrays))
        self._dirty = self._new_files = False

    def close(self) -> None:
        for _, descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _put(self, array: RowArray, chunk: int, within: int, part: np.ndarray) -> None:
        crcs = self._crcs[array.name]
        if within == 0:
            crcs.append(0)
        path, descriptor = self._open[array.name]
        with writing(path):
            write_all(descriptor, part, within * array.row_bytes)
        crcs[chunk] = crc32c(part, crcs[chunk])

    def _open_chunk(self, array: RowArray, chunk: int) -> None:
        path = self._generation / array.name / array.chunk_file(chunk)
        with writing(path):
            existed = path.exists()
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._open[array.name] = path, descriptor
            if not existed:
                preallocate(descriptor, self.chunk_rows * array.row_bytes)
                os.fsync(descriptor)
                self._new_files = True

    def _finish_chunk(self) -> None:
        at_once(_sync_file, self._open.values())
        self.close()


def create_generation(generation: Path, arrays: tuple[RowArray, ...], chunk_rows: int) -> None:
    """An empty generation folder: a Zarr group with every array at zero rows, and a folder for problems."""

    def create_array(array: RowArray) -> None:
        make_folder(generation / array.name)
        replace_file(generation / array.name / ZARR, array.zarr_json(0, chunk_rows))

    make_folder(generation)
    at_once(create_array, arrays)
    make_folder(generation / PROBLEMS)
    replace_file(generation / ZARR, group_json({}))
    replace_file(generation / IN_USE, b"")


def show_rows(generation: Path, arrays: tuple[RowArray, ...], rows: int, chunk_rows: int) -> None:
    """Let the arrays' zarr.json show `rows` rows, for readers that know Zarr but not the manifest."""

    def show(array: RowArray) -> None:
        path = generation / array.name / ZARR
        text = array.zarr_json(rows, chunk_rows)
        with writing(path):
            current = path.read_bytes() if path.exists() else b""
        if current != text:
            replace_file(path, text)

    at_once(show, arrays)


def clear_beyond(generation: Path, arrays: tuple[RowArray, ...], rows: int, chunk_rows: int) -> None:
    """Remove what lies beyond the published rows: later chunk files, and the last chunk's tail."""
    full, within = divmod(rows, chunk_rows)
    for array in arrays:
        folder = generation / array.name
        keep = {array.chunk_file(chunk) for chunk in range(full + (within > 0))}
        with writing(folder):
            for path in folder.iterdir():
                if path.name != ZARR and path.name not in keep:
                    path.unlink()
            fsync_folder(folder)
        if within:
            _clear_tail(folder / array.chunk_file(full), within * array.row_bytes, chunk_rows * array.row_bytes)


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


def _sync_file(opened: tuple[Path, int]) -> None:
    path, descriptor = opened
    with writing(path):
        os.fdatasync(descriptor)


def _sync_folder(folder: Path) -> None:
    with writing(folder):
        fsync_folder(folder)
