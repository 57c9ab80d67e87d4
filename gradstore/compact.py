"""Compaction: rewrites a collection without its dead rows.

It writes a new generation of files next to the old one, makes it durable, and publishes it like any other change. A
crash before that leaves the old generation in place. Bytes are checked against their checksums during the copy, so
damage never gets a new, valid checksum.
"""

from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np

from gradstore.appender import Appender, create_generation, show_rows
from gradstore.durable import crc32c, folder_bytes
from gradstore.errors import DamagedError
from gradstore.header import Header
from gradstore.layout import PROBLEMS, generation_name, generations
from gradstore.manifest import Part
from gradstore.problem_table import PART_ROWS, write_part
from gradstore.session import Session
from gradstore.snapshot import Snapshot


@dataclass(frozen=True)
class CompactedCollection:
    """Result of compacting one collection."""

    name: str
    rows_before: int
    rows_after: int
    problems_before: int
    problems_after: int
    bytes_before: int
    bytes_after: int
    """Bytes of the published files; old files that a reader still uses are not counted."""
    kept_for_readers: tuple[str, ...]
    """Old generations that a reader still uses; a later writer removes them."""


@dataclass(frozen=True)
class CompactReport:
    """Result of a compaction, per collection."""

    collections: tuple[CompactedCollection, ...]

    @property
    def rows(self) -> dict[str, tuple[int, int]]:
        """Collection -> rows before and after."""
        return {done.name: (done.rows_before, done.rows_after) for done in self.collections}

    def describe(self) -> dict:
        """The report as a dict for JSON."""
        return {done.name: asdict(done) for done in self.collections}


def compact(header: Header, folders: list[Path], keep: Literal["all", "newest"]) -> CompactReport:
    """Compact collections one after the other, each under its own writer's lock."""
    return CompactReport(tuple(_compact(header, folder, keep) for folder in folders))


def _compact(header: Header, folder: Path, keep: str) -> CompactedCollection:
    with Session(header, folder) as session:
        old = session.manifest
        bytes_before = folder_bytes(session.generation)
        snapshot = Snapshot(header, folder, old)
        kept_rows = snapshot.alive()
        if keep == "newest":
            kept_rows = _current(snapshot)
        kept_problems = np.ones(snapshot.n_problems, dtype=bool)
        kept_problems[snapshot.deleted()] = False
        if old.tombstones or not kept_rows.all():
            session.unpublished = True
            _rewrite(session, snapshot, kept_rows, kept_problems)
        return CompactedCollection(
            name=folder.name,
            rows_before=old.rows,
            rows_after=session.manifest.rows,
            problems_before=old.n_problems,
            problems_after=session.manifest.n_problems,
            bytes_before=bytes_before,
            bytes_after=folder_bytes(session.generation),
            kept_for_readers=tuple(session.remove_unused_generations()),
        )


def _current(snapshot: Snapshot) -> np.ndarray:
    """True for each problem's newest rows, bool [rows]: one per basis measured at the problem's newest step."""
    newest = snapshot.newest(None)
    step = snapshot.column("step")
    kept = np.zeros(snapshot.manifest.rows, dtype=bool)
    for basis in np.unique(snapshot.bases()).tolist():
        found = snapshot.newest(None, basis)
        at_newest = (found >= 0) & (step[found] == step[newest])
        kept[found[at_newest]] = True
    return kept


def _rewrite(session: Session, snapshot: Snapshot, kept_rows: np.ndarray, kept_problems: np.ndarray) -> None:
    header, folder = session.header, session.collection
    used = {session.manifest.generation, *generations(folder)}
    number = next(n for n in count(session.manifest.generation + 1) if n not in used)
    generation = folder / generation_name(number)
    try:
        create_generation(generation, header.arrays)
        parts = _write_problems(generation / PROBLEMS, snapshot, kept_problems)
        appender = Appender(generation, header.arrays, 0, {})
        try:
            _copy_rows(appender, snapshot, kept_rows, np.cumsum(kept_problems) - 1)
            appender.sync()
        finally:
            appender.close()
        show_rows(generation, header.arrays, appender.rows)
    except BaseException:
        session.remove_unused_generations(newer=True)
        session.unpublished = False  # Nothing was written elsewhere: the published generation stays as it is.
        raise
    session.publish(
        generation=number,
        rows=appender.rows,
        chunks=appender.chunks,
        parts=parts,
        tombstones={},
        bases=runs(snapshot.bases()[kept_rows]),
    )


def runs(basis_of_rows: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Run-length form of the bases for a manifest: (row, basis) at each change."""
    starts = np.flatnonzero(np.diff(basis_of_rows, prepend=0))
    return tuple((int(row), int(basis_of_rows[row])) for row in starts)


def _copy_rows(appender: Appender, snapshot: Snapshot, kept_rows: np.ndarray, new_problem: np.ndarray) -> None:
    header, manifest = snapshot.header, snapshot.manifest
    for chunk, start in enumerate(range(0, manifest.rows, header.chunk_rows)):
        rows = start + np.flatnonzero(kept_rows[start : start + header.chunk_rows])
        if not len(rows):
            continue
        codes = checked_codes(snapshot, chunk)
        columns = {array.name: snapshot.column(array.name)[rows] for array in header.arrays if array.width is None}
        columns["problem"] = new_problem[columns["problem"]]
        appender.write({**columns, "codes": codes[rows - start]})


def checked_codes(snapshot: Snapshot, chunk: int) -> np.ndarray:
    """The published codes of a chunk to be copied, [rows, width]; DamagedError if the mapped bytes changed."""
    codes, manifest = snapshot.codes.chunk(chunk), snapshot.manifest
    if crc32c(codes) != manifest.chunks["codes"][chunk]:
        path = snapshot.collection / manifest.folder / "codes" / snapshot.header.arrays[0].chunk_file(chunk)
        raise DamagedError(
            f"{path}: damaged: its bytes do not match their checksum; nothing was rewritten; see `gradstore verify`"
        )
    return codes


def _write_problems(folder: Path, snapshot: Snapshot, kept: np.ndarray) -> tuple[Part, ...]:
    table = snapshot.problems.table.take(np.flatnonzero(kept))
    starts = range(0, table.num_rows, PART_ROWS)
    return tuple(write_part(folder, number, table.slice(start, PART_ROWS)) for number, start in enumerate(starts))
