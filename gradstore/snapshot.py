"""Snapshot: a reader's fixed state of a collection at one commit, with a lease on its files."""

import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from gradstore.bases import count_bases
from gradstore.chunks import mapped_rows, read_column
from gradstore.column_checks import check_column
from gradstore.errors import DamagedError
from gradstore.header import Header
from gradstore.inside import check_folder
from gradstore.layout import IN_USE, MANIFEST, store_of
from gradstore.lock import Lease, take_lease
from gradstore.manifest import Manifest, read_manifest
from gradstore.problem_table import ProblemTable

_ATTEMPTS = 100


class Snapshot:
    """Rows [0, manifest.rows) of one generation; they never change while this object exists."""

    def __init__(self, header: Header, collection: Path, manifest: Manifest, lease: Lease | None = None) -> None:
        self.header = header
        self.collection = collection
        self.manifest = manifest
        self.problems = ProblemTable(collection, manifest)
        self._lease = lease
        self._generation = collection / manifest.folder
        self._columns: dict[str, np.ndarray] = {}
        codes = header.arrays[0]
        self.codes = mapped_rows(self._generation, codes, manifest.rows, manifest.chunks[codes.name])

    def column(self, name: str) -> np.ndarray:
        """All published entries of a one-dimensional array; read and checked once, then cached."""
        if name not in self._columns:
            manifest = self.manifest
            array = next(array for array in self.header.arrays if array.name == name)
            column = read_column(self._generation, array, manifest.rows, manifest.chunks[name])
            check_column(array, column, manifest, str(self._generation))
            self._columns[name] = column
        return self._columns[name]

    @cached_property
    def n_problems(self) -> int:
        """Number of problems; DamagedError if their files have other sizes, before memory is taken for so many."""
        folder = self.manifest.problems_folder(self.collection)
        check_folder(folder, store_of(self.collection))
        for part in self.manifest.parts:
            with suppress(FileNotFoundError):  # A later writer may have merged the part.
                size = (folder / part.file).lstat().st_size
                if size != part.bytes:
                    raise DamagedError(f"{folder / part.file}: damaged: {size} bytes, expected {part.bytes}")
        return self.manifest.n_problems

    def alive(self) -> np.ndarray:
        """True for rows that are not deleted, bool [rows]."""
        if not self.manifest.tombstones:
            return np.ones(self.manifest.rows, dtype=bool)
        dead_before = np.zeros(self.n_problems, dtype=np.int64)
        dead_before[list(self.manifest.tombstones)] = list(self.manifest.tombstones.values())
        alive: np.ndarray = np.arange(self.manifest.rows) >= dead_before[self.column("problem")]
        return alive

    def rows_by_step(self) -> dict[int, int]:
        """Step -> number of rows that are not deleted, ascending."""
        return dict(self._by_step)

    @cached_property
    def _by_step(self) -> dict[int, int]:
        steps, counts = np.unique(self.column("step")[self.alive()], return_counts=True)
        return dict(zip(steps.tolist(), counts.tolist(), strict=True))

    def bases(self) -> np.ndarray:
        """Number of the basis that each row is in, uint16 [rows]."""
        if not self.manifest.bases:
            return np.zeros(self.manifest.rows, dtype=np.uint16)
        starts, numbers = np.array(((0, 0), *self.manifest.bases), dtype=np.int64).T
        return np.repeat(numbers.astype(np.uint16), np.diff(np.append(starts, self.manifest.rows)))

    def newest(self, at: int | None, basis: int | None = None, since: int | None = None) -> np.ndarray:
        """Newest row of each problem at or before step `at` (None: of all), int64 [n_problems]; -1 without a row.

        The newest row has the largest step; among rows of that step it is the last one appended. basis: use only rows
        in this basis. since: use only rows at or after this step.
        """
        newest = np.full(self.n_problems, -1, dtype=np.int64)
        step = self.column("step")
        rows: np.ndarray | None = None
        if since is not None:
            rows = np.flatnonzero(step >= since if at is None else (step >= since) & (step <= at))
        elif at is not None and len(step) and step.max() > at:
            rows = np.flatnonzero(step <= at)
        if self.manifest.tombstones:
            alive = self.alive()
            rows = np.flatnonzero(alive) if rows is None else rows[alive[rows]]
        if basis is not None and (basis or self.manifest.bases):
            of_basis = self.bases() == basis
            rows = np.flatnonzero(of_basis) if rows is None else rows[of_basis[rows]]
        if rows is None:
            rows = np.arange(len(step))
        steps = step[rows]
        if np.any(steps[1:] < steps[:-1]):
            rows = rows[np.argsort(steps, kind="stable")]
        newest[self.column("problem")[rows]] = rows  # For repeated problems, the last assignment wins.
        return newest

    def deleted(self) -> np.ndarray:
        """Problem-table rows of problems that were deleted and not appended again, int64, ascending."""
        tombstones = self.manifest.tombstones
        if not tombstones:
            return np.zeros(0, dtype=np.int64)
        problems = np.array(sorted(tombstones), dtype=np.int64)
        return problems[self.newest(None)[problems] < 0]


def open_snapshot(header: Header, collection: Path) -> Snapshot:
    """Open a snapshot of the newest commit; DamagedError if its files are missing.

    A compaction may replace the files between reading the manifest and taking the lease; then it reads the newer one.
    """
    for attempt in range(_ATTEMPTS):
        manifest = read_manifest(collection)
        generation = collection / manifest.folder
        lease = take_lease(generation)
        if lease is not None:
            check_manifest(manifest, header, collection)
            return Snapshot(header, collection, manifest, lease)
        if attempt and check_folder(generation, store_of(collection)) and not (generation / IN_USE).exists():
            # A copy of a store may lack the empty lease file; its rows are complete.
            if read_manifest(collection).generation == manifest.generation:
                check_manifest(manifest, header, collection)
                return Snapshot(header, collection, manifest)
        elif attempt:
            time.sleep(0.01)
    raise DamagedError(f"{generation}: the files that the manifest names are missing; see `gradstore verify`")


def check_manifest(manifest: Manifest, header: Header, collection: Path) -> None:
    """DamagedError if a manifest is of other arrays or bases than its store has."""
    file = collection / MANIFEST
    manifest.check_arrays(header.arrays, file)
    if manifest.bases:
        known, largest = count_bases(store_of(collection)), max(basis for _, basis in manifest.bases)
        if largest >= known:
            raise DamagedError(f"{file}: damaged: field bases: basis {largest}, the store has {known}")
