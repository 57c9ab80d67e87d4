"""Adding problems to a collection: records are checked; a stored problem must be equal in every field."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradstore.collection import Collection
from gradstore.durable import fsync_folder, writing
from gradstore.errors import RequestError
from gradstore.layout import MANIFEST
from gradstore.manifest import Part
from gradstore.problem_rows import plain_columns, plain_table, repeated, to_table
from gradstore.problem_table import ProblemTable, add_to_parts
from gradstore.problems import canonical
from gradstore.row_digests import digest_of
from gradstore.session import Session

if TYPE_CHECKING:
    import pyarrow as pa

_AT_ONCE = 8192
"""Records that are compared with the stored ones at once."""


def add_problems(collection: Collection, records: Iterable[dict]) -> int:
    """Add records to a collection (created if new); returns the number of new problems.

    If all records are known, no lock is taken; without records, nothing is created. RequestError names id and field of
    a record that is invalid, given twice, or different from the stored one.
    """
    table = checked_table(collection, records)
    if not len(table) or not len(new_rows(collection, table)):
        return 0
    with Session(collection.header, collection.folder, create=True) as session:
        addition = NewParts.write(session, collection, table)
        if addition.rows:
            session.publish(parts=addition.parts)
            addition.clear()
    return addition.rows


def checked_table(collection: Collection, records: Iterable[dict]) -> "pa.Table":
    """The records as rows of a problem table, without those stored already with the same content.

    RequestError for an invalid record and for an id given twice. Memory: for what is new, and one block of the others.
    """
    import pyarrow as pa

    where, ids = collection.where, []
    known = collection.snapshot().problems if (collection.folder / MANIFEST).exists() else None
    tables, runs = [to_table([])], list[tuple[int, int]]()
    for first, block, run in _blocks(records, known):
        if run is not None:
            runs.append(run)
            continue
        stored = np.zeros(len(block), bool) if known is None else _stored_as_given(known, block)
        rest = np.flatnonzero(~stored).tolist()
        checked = [canonical(block[place], f"{where}, record {first + place}") for place in rest]
        ids += [record["id"] for record in block] if len(rest) < len(block) else [record["id"] for record in checked]
        if checked:
            tables.append(to_table(checked))
    if known is not None and _overlap(known, ids, runs):
        ids += list(chain.from_iterable(known.ids_at(np.arange(*run)).tolist() for run in runs))
    twice = repeated(ids)
    if twice is not None:
        raise RequestError(f"{where}: problem id {twice!r} occurs {ids.count(twice)} times; keep one")
    return pa.concat_tables(tables)


def _blocks(
    records: Iterable[dict], known: ProblemTable | None
) -> Iterator[tuple[int, list[dict], tuple[int, int] | None]]:
    """Blocks of records, each with the number of its first one.

    And the first row and the row after the last one, if the digests of the parts say that these rows have the records'
    content. Records mostly come again in the order in which they were stored.
    """
    remaining, first, row = iter(records), 0, 0
    while True:
        stop, digest = (row, None) if known is None else known.digest_from(row)
        block = list(islice(remaining, stop - row or _AT_ONCE))
        if not block:
            return
        run = None
        if known is not None and digest is not None and len(block) == stop - row and _digest(block) == digest:
            run = row, stop
            known.after = stop % len(known)
        yield first, block, run
        first += len(block)
        row = 0 if known is None else known.after


def _digest(block: list[dict]) -> str | None:
    columns = plain_columns(block)
    try:
        return None if columns is None else digest_of(columns)
    except UnicodeEncodeError:
        return None


def _overlap(known: ProblemTable, ids: list[str], runs: list[tuple[int, int]]) -> bool:
    """Whether a row occurs in two runs, or in one that also holds a problem of these ids."""
    if not runs:
        return False
    starts, stops = np.array(sorted(runs)).T
    if (starts[1:] < stops[:-1]).any():
        return True
    rows = known.find(ids)
    return bool((rows < np.append(0, stops)[np.searchsorted(starts, rows, side="right")]).any())


def _stored_as_given(known: ProblemTable, block: list[dict]) -> np.ndarray:
    """True for records that are stored with the same content, bool [len(block)]; False for those to be checked.

    What is stored was checked when it came. So a record that converts to the stored row needs no check.
    """
    offered = plain_table(block)
    if offered is None:
        return np.zeros(len(block), bool)
    rows = known.find(offered["id"].combine_chunks())
    again = np.flatnonzero(rows >= 0)
    if not len(again):
        return np.zeros(len(block), bool)
    if len(again) < len(block):
        offered = offered.take(again)
    stored = known.take(rows[again])
    same = np.zeros(len(block), bool)
    if all(offered[name].combine_chunks().equals(stored[name].combine_chunks()) for name in offered.column_names):
        same[again] = True
    else:
        pairs = zip(offered.to_pylist(), stored.to_pylist(), strict=True)
        same[again] = [new == old for new, old in pairs]
    return same


def new_rows(collection: Collection, table: "pa.Table") -> np.ndarray:
    """Rows of `table` that the collection does not have yet; RequestError if a known one has other content."""
    if not (collection.folder / MANIFEST).exists():
        return np.arange(len(table))
    return _new_rows(collection.snapshot().problems, table, collection.where)


@dataclass(frozen=True, slots=True)
class NewParts:
    """New problems, written to disk but not yet published."""

    rows: int
    parts: tuple[Part, ...]
    """The parts for the next manifest."""
    _unneeded: list[Path]

    @classmethod
    def write(cls, session: Session, collection: Collection, table: "pa.Table") -> "NewParts":
        """Write the rows of `table` that are new."""
        new = _new_rows(collection.problems(session.manifest), table, collection.where)
        if not len(new):
            return cls(0, session.manifest.parts, [])
        session.unpublished = True
        return cls(len(new), *add_to_parts(collection.folder, session.manifest, table.take(new)))

    def clear(self) -> None:
        """Remove the files that are no longer needed, after the parts were published."""
        if not self._unneeded:
            return
        with writing(self._unneeded[0]):
            for file in self._unneeded:
                file.unlink()
            for place in {file.parent for file in self._unneeded}:
                fsync_folder(place)  # Before the lock file is emptied: empty means nothing is left to clear.


def _new_rows(known: ProblemTable, table: "pa.Table", where: str) -> np.ndarray:
    """Rows of `table` whose ids are not known; RequestError if a known one has other content."""
    import pyarrow as pa

    if not len(table):
        return np.zeros(0, np.int64)
    places = known.find(table["id"].combine_chunks())
    again = np.flatnonzero(places >= 0)
    offered, stored = table.take(again), known.take(places[again])
    for field in table.column_names:
        if pa.chunked_array(offered[field]).equals(stored[field]):
            continue
        pairs = zip(offered["id"].to_pylist(), offered[field].to_pylist(), stored[field].to_pylist(), strict=True)
        name, new, old = next(pair for pair in pairs if pair[1] != pair[2])
        field = "prompt" if field == "messages" else field
        raise RequestError(
            f"{where}: problem {name!r} is stored with another {field!r}: {_short(old)}, "
            f"now {_short(new)}; give a changed problem a new id"
        )
    return np.flatnonzero(places < 0)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
