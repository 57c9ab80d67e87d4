"""Verification of a store: checks every stored byte.

Published bytes must match the manifest's checksums, and rows must have unit length or be zero. Each metadata file must
be exactly the text that the format defines. Bytes after the published rows must be zeros or absent. Only these last may
differ while a writer is active or after one was interrupted; the lock file shows this. Then the report has a note, not
a finding, because the next writer clears them.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gradstore import additions
from gradstore.appender import MOST_TEXT
from gradstore.attachments import ATTACHMENTS, damaged_attachments
from gradstore.bases import added_bases, first_basis
from gradstore.derived import unreadable_indexes
from gradstore.durable import TEMPORARY, crc32c
from gradstore.errors import GradstoreError
from gradstore.exclusive import SUFFIX
from gradstore.header import Header, read_header
from gradstore.inside import names_inside, open_inside
from gradstore.inventory import INVENTORY, OF_COLLECTION, OF_STORE, Inventory, missing_files, read_inventory, too_old
from gradstore.layout import (
    COLLECTIONS,
    INDEXES,
    LOCK,
    MANIFEST,
    PROBES,
    ROUNDS,
    ZARR,
    RowArray,
    generation_name,
    generations,
    group_json,
)
from gradstore.lock import describe_holder, is_running, read_holder
from gradstore.manifest import Manifest, read_manifest
from gradstore.presence import missing_projections
from gradstore.problem_table import repeated
from gradstore.projection_digest import changed_projections
from gradstore.quantise import decode
from gradstore.snapshot import Snapshot, open_snapshot

_ATTEMPTS = 5


_DECODED_BYTES = 1 << 22
"""Bytes of rows that are decoded at once."""
_ROUNDING = 1e-3
"""Most by which the length of a stored row differs from 1."""


@dataclass(frozen=True)
class Finding:
    """A fault: a file that is not as it was written."""

    file: str
    """Path relative to the store."""
    chunk: int | None
    """Chunk number, for a chunk file; otherwise None."""
    message: str


@dataclass
class Report:
    """Result of a verification."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Information that is not damage: active writers, leftovers of interrupted ones, unknown files."""
    chunks_checked: int = 0
    bytes_checked: int = 0

    @property
    def ok(self) -> bool:
        return not self.findings


def verify(path: Path, header: Header | None = None) -> Report:
    """Check a whole store. Raises the same errors as `open` if the root cannot be read."""
    report = Report()
    header = read_header(path) if header is None else header
    _Checker(path, header, report).check()
    return report


@dataclass
class _Checker:
    root: Path
    header: Header
    report: Report

    def check(self) -> None:
        self._text(self.root / ZARR, self.header.to_bytes())
        self._text(self.root / COLLECTIONS / ZARR, group_json({}))
        try:
            for path, message in damaged_attachments(self.root):
                self._find(path, None, message)
            self._missing(self.root, OF_STORE, self._inventory(self.root))
            self._projections()
            names = names_inside(self.root / COLLECTIONS, self.root)
        except GradstoreError as error:
            self._find(self.root, None, str(error))
            return
        for folder in (self.root / COLLECTIONS / name for name in names):
            if folder.is_dir():
                try:
                    self._collection(folder)
                except GradstoreError as error:
                    self._find(folder, None, str(error))

    def _collection(self, folder: Path) -> None:
        holder = read_holder(folder)
        if holder:
            doing = "is being written by" if is_running(holder) else "was left by an interrupted writer:"
            self.report.notes.append(f"collection {folder.name}: {doing} {describe_holder(holder)}")
        if not (folder / MANIFEST).exists() and (holder or not generations(folder)):
            return  # A collection begins to exist with its first manifest.
        inventory = self._inventory(folder)  # Before the manifest, which can only be newer.
        try:
            snapshot = open_snapshot(self.header, folder)
        except GradstoreError as error:
            self._find(folder / MANIFEST, None, str(error).removeprefix(f"{folder / MANIFEST}: "))
            return
        self.report.bytes_checked += len(snapshot.manifest.to_bytes())
        self._text(folder / ZARR, group_json({}))
        generation = folder / snapshot.manifest.folder
        self._text(generation / ZARR, group_json({}))
        for array in self.header.arrays:
            self._zarr_json(folder, snapshot.manifest, array)
            for chunk in range(array.chunks(snapshot.manifest.rows)):
                self._chunk(generation, snapshot.manifest, array, chunk)
        self._lengths(snapshot)
        self._parts(folder, snapshot.manifest)
        self._ids(snapshot)
        self._additions(folder)
        self._missing(folder, OF_COLLECTION, inventory)
        if fault := too_old(inventory, snapshot.manifest.commit):
            self._find(folder / MANIFEST, None, fault)
        for path, fault in unreadable_indexes(folder, self.root):
            self.report.notes.append(f"{path.relative_to(self.root)}: {fault}; it will be built anew when it is used")
        self._beyond(folder)

    def _chunk(self, generation: Path, manifest: Manifest, array: RowArray, chunk: int) -> None:
        path = generation / array.name / array.chunk_file(chunk)
        rows = array.rows_in(chunk, manifest.rows)
        used, full = rows * array.row_bytes, array.chunk_bytes
        data = self._bytes(path, chunk, limit=used)
        if data is None:
            return
        self.report.chunks_checked += 1
        size = path.stat().st_size
        if size < used:
            self._find(path, chunk, f"truncated: {size} bytes, its {rows} rows take {used}")
        elif crc32c(data) != manifest.chunks[array.name][chunk]:
            self._find(path, chunk, f"bytes do not match their checksum ({rows} rows, {used} bytes)")
        elif size > full:
            self._find(path, chunk, f"{size} bytes, a chunk has {full}")

    def _lengths(self, snapshot: Snapshot) -> None:
        """Check that every row has unit length, or is zero; chunks that cannot be read were found already."""
        manifest, codes = snapshot.manifest, self.header.arrays[0]
        generation = snapshot.collection / manifest.folder
        try:
            scale_P = snapshot.column("scale")
        except GradstoreError:
            return
        step = max(1, _DECODED_BYTES // (4 * self.header.dim))
        for chunk in range(codes.chunks(manifest.rows)):
            with suppress(GradstoreError):
                stored = snapshot.codes.chunk(chunk)
                for start in range(0, len(stored), step):
                    first = chunk * codes.chunk_rows + start
                    some, scale = stored[start : start + step], scale_P[first : first + step]
                    decoded = np.empty((len(some), self.header.dim), np.float32)
                    with np.errstate(all="ignore"):
                        decode(some, scale[: len(some)], self.header.dtype, decoded)
                        squares = np.vecdot(decoded, decoded)
                    wrong = ~((np.abs(squares - 1) < 2 * _ROUNDING) | (scale[: len(some)] == 0))
                    if wrong.any():
                        row = first + int(np.argmax(wrong))
                        self._find(
                            generation / codes.name / codes.chunk_file(chunk), chunk, f"row {row} is no unit row"
                        )
                        break

    def _zarr_json(self, folder: Path, manifest: Manifest, array: RowArray) -> None:
        """Check an array's zarr.json; it may show fewer rows while a writer is open, which updates it at its close."""
        path = folder / manifest.folder / array.name / ZARR
        text = self._bytes(path, None, limit=MOST_TEXT)
        if text is None or text == array.zarr_json(manifest.rows):
            return
        newest = read_manifest(folder)
        unfinished = bool(read_holder(folder)) or newest.commit != manifest.commit
        shown = next((n for n in _first_numbers(text) if text == array.zarr_json(n)), None)
        if shown is None:
            self._find(path, None, "not the text that was written")
        elif newest.generation != manifest.generation and shown >= manifest.rows:
            return  # A writer closed, and then a compaction left these files behind.
        elif not (shown == newest.rows or (unfinished and shown < newest.rows)):
            self._find(path, None, f"shows {shown} rows, the collection has {newest.rows}")

    def _parts(self, folder: Path, manifest: Manifest) -> None:
        """Check the problem parts; a missing part may have been merged meanwhile, so it reads the newer manifest."""
        for _ in range(_ATTEMPTS):
            missing = [part for part in manifest.parts if not (manifest.problems_folder(folder) / part.file).exists()]
            newest = read_manifest(folder)
            if not missing or newest.parts == manifest.parts or newest.generation != manifest.generation:
                break
            manifest = newest
        for part in manifest.parts:
            path = manifest.problems_folder(folder) / part.file
            data = self._bytes(path, None, limit=part.bytes + 1)
            if data is not None and (len(data) != part.bytes or crc32c(data) != part.crc32c):
                self._find(path, None, f"bytes do not match their checksum ({part.rows} problems, {part.bytes} bytes)")

    def _additions(self, folder: Path) -> None:
        for name in (PROBES, ROUNDS):
            try:
                for path, data, fault in additions.check_parts(folder / name):
                    self.report.bytes_checked += len(data)
                    if fault:
                        self._find(path, None, fault)
            except GradstoreError as error:
                self._find(folder / name, None, str(error))

    def _projections(self) -> None:
        """Check that the projections named by the fingerprint and the bases are there, with the content they name."""
        fingerprint = self.header.fingerprint
        try:
            bases = [first_basis(fingerprint, self.header.dim), *added_bases(self.root, self.header.dim)]
        except GradstoreError as error:
            self._find(self.root / ATTACHMENTS, None, str(error).removeprefix(f"{self.root / ATTACHMENTS}: "))
            return
        for name in missing_projections(self.root, fingerprint, bases):
            self._find(self.root / ATTACHMENTS / name, None, "missing: rows of the store were made with it")
        try:
            for path, message in changed_projections(self.root, fingerprint, bases):
                self._find(path, None, message)
        except ImportError:
            self.report.notes.append("projections: their digests were not checked, which needs safetensors")

    def _inventory(self, folder: Path) -> Inventory | None:
        try:
            found = read_inventory(folder, self.root)
        except GradstoreError as error:
            self._find(folder / INVENTORY, None, str(error).removeprefix(f"{folder / INVENTORY}: "))
            return None
        self.report.bytes_checked += 0 if found is None else len(found.to_bytes())
        return found

    def _missing(self, folder: Path, kinds: tuple[str, ...], inventory: Inventory | None) -> None:
        """Find the files that an inventory names and that are gone; without one, note that none would be missed."""
        if inventory is None:
            if not (folder / INVENTORY).exists() and any(names_inside(folder / kind, self.root) for kind in kinds):
                self.report.notes.append(
                    f"{(folder / INVENTORY).relative_to(self.root)}: there is none, as in stores of earlier versions: "
                    f"if the newest of the {' or '.join(kinds)} were missing, nothing would show it"
                )
            return
        known = {finding.file for finding in self.report.findings}
        for path in missing_files(folder, self.root, inventory):
            shown = path.relative_to(self.root).as_posix()
            if not any(shown.startswith(file) for file in known):  # A gap in the numbers was found already.
                self._find(path, None, "missing")

    def _ids(self, snapshot: Snapshot) -> None:
        """Check that problem ids are unique; parts that cannot be read were found already."""
        try:
            twice = repeated(snapshot.problems.ids.tolist())
        except GradstoreError:
            return
        if twice is not None:
            self._find(snapshot.collection / MANIFEST, None, f"problem id {twice!r:.80} occurs more than once")

    def _beyond(self, folder: Path) -> None:
        """Check the bytes after the published rows; retries if a writer opens or closes meanwhile."""
        for _ in range(_ATTEMPTS):
            before = read_holder(folder)
            manifest = read_manifest(folder)
            try:
                seen = list(self._unpublished(folder, manifest))
            except FileNotFoundError:
                continue  # A compaction removed the generation.
            if before:
                if seen:
                    self.report.notes.append(
                        f"collection {folder.name}: {len(seen)} files hold bytes that are not published "
                        f"(first: {seen[0].file}); the next writer clears them"
                    )
                return
            if not read_holder(folder) and read_manifest(folder).commit == manifest.commit:
                self.report.findings.extend(seen)
                self._strangers(folder, manifest)
                return
        self.report.notes.append(f"collection {folder.name}: busy; bytes beyond the published rows were not checked")

    def _unpublished(self, folder: Path, manifest: Manifest) -> Iterator[Finding]:
        for array in self.header.arrays:
            chunks, within = array.chunks(manifest.rows), manifest.rows % array.chunk_rows
            place = folder / manifest.folder / array.name
            names = {array.chunk_file(chunk) for chunk in range(chunks)}
            if place.is_dir():
                for path in (place / name for name in names_inside(place, self.root)):
                    if path.name.startswith("c.") and path.name not in names:
                        chunk = path.name.split(".")[1]
                        number = int(chunk) if chunk.isdecimal() else None
                        yield self._finding(path, number, "a chunk file beyond the published rows")
            path = place / array.chunk_file(chunks - 1)
            if within and path.exists():
                with open(open_inside(path, self.root), "rb") as file:
                    file.seek(within * array.row_bytes)
                    tail = file.read(array.chunk_bytes)
                self.report.bytes_checked += len(tail)
                missing = (array.chunk_rows - within) * array.row_bytes - len(tail)
                if missing > 0:
                    yield self._finding(path, chunks - 1, f"truncated: {missing} bytes short of a whole chunk")
                if tail.count(0) != len(tail):
                    yield self._finding(path, chunks - 1, "bytes beyond the published rows are not zero")

    def _strangers(self, folder: Path, manifest: Manifest) -> None:
        """Add a note for each file that does not belong to the store."""
        known = {MANIFEST, LOCK, f"{LOCK}{SUFFIX}", ZARR, INDEXES, INVENTORY, PROBES, ROUNDS}
        known |= set(map(generation_name, generations(folder)))
        strange = [path for path in sorted(folder.iterdir()) if path.name not in known]
        parts = {part.file for part in manifest.parts}
        problems = manifest.problems_folder(folder)
        if problems.is_dir():
            strange += [path for path in sorted(problems.iterdir()) if path.name not in parts]
        strange += additions.strangers(folder / PROBES) + additions.strangers(folder / ROUNDS)
        for path in strange:
            what = "an unfinished file" if path.name.startswith(TEMPORARY) else "not a file of the store"
            self.report.notes.append(f"{path.relative_to(self.root)}: {what}")

    def _text(self, path: Path, expected: bytes) -> None:
        text = self._bytes(path, None, limit=len(expected) + 1)
        if text is not None and text != expected:
            self._find(path, None, "not the text that was written")

    def _bytes(self, path: Path, chunk: int | None, limit: int) -> bytes | None:
        try:
            with open(open_inside(path, self.root), "rb") as file:
                data = file.read(min(limit, os.fstat(file.fileno()).st_size))
        except FileNotFoundError:
            self._find(path, chunk, "missing")
        except GradstoreError as error:
            self._find(path, chunk, str(error).removeprefix(f"{path}: "))
        except OSError as error:
            self._find(path, chunk, f"cannot be read ({error.strerror})")
        else:
            self.report.bytes_checked += len(data)
            return data
        return None

    def _finding(self, path: Path, chunk: int | None, message: str) -> Finding:
        return Finding(path.relative_to(self.root).as_posix(), chunk, message)

    def _find(self, path: Path, chunk: int | None, message: str) -> None:
        self.report.findings.append(self._finding(path, chunk, message))


def _first_numbers(text: bytes) -> Iterator[int]:
    """The row count that a zarr.json shows: the first number of its shape."""
    tail = text.partition(b'"shape": [')[2].lstrip()
    digits = bytes(byte for byte in tail[:24].split(b",")[0].split(b"\n")[0].strip() if 48 <= byte <= 57)
    if digits:
        yield int(digits)
