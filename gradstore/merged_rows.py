"""One collection of a merged store: the problems and rows of several collections, united, and how they are written.

`unite` compares and decides before a byte is written; `write` copies in a fixed order and publishes after fixed numbers
of rows, so that a write that was interrupted goes on from its last publication and ends with the same bytes.

M collections to be united ("members"), n rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.appender import Appender
from gradstore.compact import checked_codes, runs
from gradstore.errors import RequestError
from gradstore.new_rows import reason_number
from gradstore.problem_rows import table_schema
from gradstore.problem_table import add_to_parts
from gradstore.session import Session
from gradstore.snapshot import Snapshot
from gradstore.stored_rows import StoredRows

if TYPE_CHECKING:
    import pyarrow as pa

PUBLISH_ROWS = 1 << 16
"""Rows between two publications: what an interruption can lose."""
_COMPARED = 4096
"""Rows whose codes are compared at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A collection to be united with others of its name."""

    store: Path
    snapshot: Snapshot

    @property
    def name(self) -> str:
        return self.snapshot.collection.name


@dataclass(frozen=True, slots=True, eq=False)
class United:
    """What the members give to the merged collection."""

    members: list[Member]
    problems: "pa.Table"
    """The problems, in order of addition."""
    numbers: list[np.ndarray]
    """Of each member: its problems' numbers in the merged collection, int64; -1 for one that it left out."""
    rows: list[np.ndarray]
    """Of each member: numbers of its rows that are copied, int64, ascending."""
    reason_of: list[np.ndarray]
    """Of each member: its reasons' numbers in `reasons`, uint16."""
    reasons: tuple[str, ...]
    again: int
    """Rows that an earlier member has too, equal in every byte."""
    deleted: int
    """Rows that are deleted in their store."""
    dropped: int
    """Problems that are deleted in every store that has them."""
    kept: list[str]
    """Ids of problems that are deleted in one store and not in another; the other's rows are taken."""

    @property
    def n_rows(self) -> int:
        return sum(map(len, self.rows))


def unite(members: Sequence[Member]) -> United:
    """Unite collections: problems by id, rows by problem and step.

    RequestError, naming both stores, for a problem with another record, and for a problem whose rows of one step are
    others. DamagedError for bytes that do not match their checksums.
    """
    table, numbers, kept, dropped = _problems(members)
    alive = [member.snapshot.alive() for member in members]
    rows, again = _rows(members, numbers, alive, table)
    reasons, number, reason_of = [""], {"": 0}, []
    for member, mine in zip(members, rows, strict=True):
        texts, used = member.snapshot.manifest.reasons, np.unique(member.snapshot.column("reason")[mine])
        found = np.zeros(len(texts), np.uint16)
        found[used] = [reason_number(texts[one], number, reasons) for one in used.tolist()]
        reason_of.append(found)
    deleted = sum(int((~one).sum()) for one in alive)
    return United(list(members), table, numbers, rows, reason_of, tuple(reasons), again, deleted, dropped, kept)


def write(session: Session, united: United, progress: Callable[[int], None]) -> None:
    """Write what is missing of a united collection; progress is called with numbers of rows, those there first."""
    if united.problems.num_rows and not session.manifest.parts:
        session.unpublished = True
        session.publish(parts=add_to_parts(session.collection, session.manifest, united.problems)[0])
    header, manifest = session.header, session.manifest
    basis_of_rows = np.concatenate(
        [member.snapshot.bases()[mine] for member, mine in zip(united.members, united.rows, strict=True)]
    )
    progress(manifest.rows)
    appender = Appender(session.generation, header.arrays, manifest.rows, manifest.chunks)
    try:
        for start in range(manifest.rows, united.n_rows, PUBLISH_ROWS):
            stop = min(start + PUBLISH_ROWS, united.n_rows)
            session.unpublished = True
            for columns in _columns(session, united, start, stop):
                appender.write(columns)
                progress(len(columns["problem"]))
            appender.settle()
            session.publish(
                rows=stop,
                chunks=appender.chunks,
                reasons=united.reasons,
                bases=runs(basis_of_rows[:stop]),
                syncing=appender.syncing(),
            )
    finally:
        appender.close()


def _columns(session: Session, united: United, start: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
    """Rows `start` to `stop` of the merged collection, in pieces of one chunk of a member."""
    first = 0
    for place, (member, mine) in enumerate(zip(united.members, united.rows, strict=True)):
        wanted = mine[max(0, start - first) : max(0, stop - first)]
        first += len(mine)
        snapshot = member.snapshot
        chunk_of = wanted // snapshot.header.chunk_rows
        for low, high in pairwise([0, *(np.flatnonzero(np.diff(chunk_of)) + 1).tolist(), len(wanted)]):
            if high == low:
                continue
            rows, chunk = wanted[low:high], int(chunk_of[low])
            columns = {one.name: snapshot.column(one.name)[rows] for one in session.header.arrays if one.width is None}
            columns["problem"] = united.numbers[place][columns["problem"]]
            columns["reason"] = united.reason_of[place][columns["reason"]]
            codes = checked_codes(snapshot, chunk)
            yield {**columns, "codes": codes[rows - chunk * snapshot.header.chunk_rows]}


def _problems(members: Sequence[Member]) -> "tuple[pa.Table, list[np.ndarray], list[str], int]":
    """The united problems, each member's numbers in them, ids deleted in some stores only, and deleted in all."""
    import pyarrow as pa

    index: dict[str, int] = {}
    owner: list[int] = []
    pieces, numbers, gone = [table_schema().empty_table()], [], []
    for place, member in enumerate(members):
        problems = member.snapshot.problems
        left = np.zeros(len(problems), bool)
        left[member.snapshot.deleted()] = True
        ids = problems.ids.tolist()
        gone += [name for name, out in zip(ids, left.tolist(), strict=True) if out]
        places = np.array([index.get(name, -1) for name in ids], np.int64)
        known, new = np.flatnonzero((places >= 0) & ~left), np.flatnonzero((places < 0) & ~left)
        if len(known):
            stored = pa.concat_tables(pieces).take(places[known])
            _check_same(problems.table.take(known), stored, member, [members[owner[one]] for one in places[known]])
        pieces.append(problems.table.take(new))
        places[new] = len(index) + np.arange(len(new))
        places[left] = -1
        index |= {ids[one]: int(places[one]) for one in new.tolist()}
        owner += [place] * len(new)
        numbers.append(places)
    kept = sorted({name for name in gone if name in index})
    return pa.concat_tables(pieces).combine_chunks(), numbers, kept, len({*gone} - index.keys())


def _check_same(offered: "pa.Table", stored: "pa.Table", member: Member, owners: Sequence[Member]) -> None:
    """RequestError for the first problem whose record differs, naming id, field, both values and both stores."""
    import pyarrow as pa

    for field in offered.column_names:
        if pa.chunked_array(offered[field]).equals(pa.chunked_array(stored[field])):
            continue
        pairs = list(zip(offered[field].to_pylist(), stored[field].to_pylist(), strict=True))
        place = next(place for place, (new, old) in enumerate(pairs) if new != old)
        new, old = map(_short, pairs[place])
        raise RequestError(
            f"collection {member.name!r}: problem {offered['id'][place].as_py()!r} has another "
            f"{'prompt' if field == 'messages' else field} in {member.store} ({new}) than in {owners[place].store} "
            f"({old}): other problems need other ids"
        )


def _rows(
    members: Sequence[Member], numbers: list[np.ndarray], alive: list[np.ndarray], table: "pa.Table"
) -> tuple[list[np.ndarray], int]:
    """Rows that are taken of each member, and how many others are there already."""
    steps = np.unique(np.concatenate([np.zeros(0, np.int64), *(one.snapshot.column("step") for one in members)]))
    taken = _Taken(members, table, steps)
    chosen, again = [], 0
    for place, member in enumerate(members):
        rows = np.flatnonzero(alive[place])
        problem_n = numbers[place][member.snapshot.column("problem")[rows]]
        keys = problem_n * len(steps) + np.searchsorted(steps, member.snapshot.column("step")[rows])
        known = np.isin(keys, taken.keys)
        taken.check(place, keys[known], rows[known])
        taken.add(place, keys[~known], rows[~known])
        chosen.append(rows[~known])
        again += int(known.sum())
    return chosen, again


class _Taken:
    """The rows taken so far, by key: number of the problem times number of steps, plus place of the step."""

    def __init__(self, members: Sequence[Member], table: "pa.Table", steps: np.ndarray) -> None:
        self.keys = np.zeros(0, np.int64)
        """Ascending; equal keys in the order of their rows."""
        self._member_of, self._rows = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._members, self._table, self._steps = members, table, steps

    def add(self, place: int, keys: np.ndarray, rows: np.ndarray) -> None:
        """Add rows of a member whose keys are new."""
        keys = np.concatenate([self.keys, keys])
        order = np.argsort(keys, kind="stable")
        self.keys = keys[order]
        self._member_of = np.concatenate([self._member_of, np.full(len(rows), place)])[order]
        self._rows = np.concatenate([self._rows, rows])[order]

    def check(self, place: int, keys: np.ndarray, rows: np.ndarray) -> None:
        """RequestError unless a member's rows are those taken under the same keys, in the same order."""
        order = np.argsort(keys, kind="stable")
        keys, rows = keys[order], rows[order]
        wanted, counts = np.unique(keys, return_counts=True)
        first, last = np.searchsorted(self.keys, wanted), np.searchsorted(self.keys, wanted, side="right")
        other = np.flatnonzero(last - first != counts)
        if len(other):
            one = int(other[0])
            values = f"{counts[one]} rows", f"{last[one] - first[one]}"
            self._refuse(place, int(wanted[one]), int(self._member_of[first[one]]), "number of rows", values)
        places = np.repeat(first - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) + np.arange(len(keys))
        for owner in np.unique(self._member_of[places]).tolist():
            of = np.flatnonzero(self._member_of[places] == owner)
            self._compare(place, keys[of], rows[of], owner, self._rows[places[of]])

    def _compare(self, place: int, keys: np.ndarray, rows: np.ndarray, owner: int, others: np.ndarray) -> None:
        ours, theirs = self._members[place].snapshot, self._members[owner].snapshot
        names = [one.name for one in ours.header.arrays if one.width is None and one.name not in ("problem", "reason")]
        columns = [(name, ours.column(name)[rows], theirs.column(name)[others]) for name in names]
        columns.append(("basis", ours.bases()[rows], theirs.bases()[others]))
        columns.append(("reason", _reasons(ours, rows), _reasons(theirs, others)))
        for name, one, other in columns:
            exact = one.dtype.kind != "f"  # As bytes: nan is equal to nan, and 0.0 is not -0.0.
            differs = one != other if exact else one.view(f"u{one.itemsize}") != other.view(f"u{other.itemsize}")
            if differs.any():
                at = int(np.argmax(differs))
                self._refuse(place, int(keys[at]), owner, name, (f"{one[at]}", f"{other[at]}"))
        for start in range(0, len(rows), _COMPARED):
            part = slice(start, start + _COMPARED)
            positions = np.arange(len(rows[part]))
            one = StoredRows(ours, rows[part]).codes(positions)[0]
            other = StoredRows(theirs, others[part]).codes(positions)[0]
            differs = (one.view(np.uint8) != other.view(np.uint8)).any(axis=1)
            if differs.any():
                at = int(np.argmax(differs))
                self._refuse(place, int(keys[start + at]), owner, "sketch", None)

    def _refuse(self, place: int, key: int, owner: int, field: str, values: tuple[str, str] | None) -> None:
        problem, step = divmod(key, len(self._steps))
        ours, theirs = (f" ({value})" for value in values) if values else ("", "")
        raise RequestError(
            f"collection {self._members[place].name!r}: problem {self._table['id'][problem].as_py()!r} has another "
            f"{field} at step {self._steps[step]} in {self._members[place].store}{ours} than in "
            f"{self._members[owner].store}{theirs}: delete it in one of them (Store.delete), or merge one of them"
        )


def _reasons(snapshot: Snapshot, rows: np.ndarray) -> np.ndarray:
    """Reason of each row, object array of str."""
    return np.array(snapshot.manifest.reasons, dtype=object)[snapshot.column("reason")[rows]]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
