"""Storage of selection rounds with their pool: the settings, every candidate's score, and the picks.

A round is one Parquet part in the collection's folder `rounds/` (gradstore/additions.py defines naming and durability);
its number is the part's. The table has one row per candidate; the round's settings are JSON in the file's metadata.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from gradstore import additions
from gradstore.collection import Collection
from gradstore.durable import canonical_json
from gradstore.errors import DamagedError, RequestError, check_known
from gradstore.layout import ROUNDS
from gradstore.parquet import table_bytes
from gradstore.problem_rows import repeated
from gradstore.schema import ANYTHING, Checker, lists, load_json, mapping, number, one_of, optional, record, text, whole
from gradstore.stored_parquet import read_metadata, read_stored

STATES = ("live", "no_signal", "failed", "unmeasured")

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("low", pa.float64(), nullable=False),
        pa.field("high", pa.float64(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("pass_rate", pa.float64(), nullable=False),
        pa.field("rolled_out", pa.bool_(), nullable=False),
        pa.field("picked", pa.int64(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("rollouts", pa.int64(), nullable=False),
    ]
)
"""One row per candidate; docs/format.md explains the columns."""

_ABOUT = b"gradstore.round"
_COUNTS = {name: whole() for name in ("number", "n_candidates", "n_rolled_out", "rollouts", "target_rollouts")}
_MEMBERS = Checker(
    record(
        {},
        {
            "step": whole(),
            **_COUNTS,
            "warm_up": one_of(True, False),
            "selector": text(),
            "settings": mapping(ANYTHING),
            "benchmarks": lists(text()),
            "costs": mapping(number(0)),
            "counts": mapping(whole()),
            "pool": record({"problems": whole(1), "seen": whole()}, open=True),
            "probe": optional(mapping(ANYTHING)),
            "refresh": mapping(ANYTHING),
            "selection": mapping(ANYTHING),
            "picked_by": lists(text()),
            "warnings": lists(text()),
        },
        open=True,
    )
)
"""Of `about`; docs/rounds.md lists all members."""


@dataclass(frozen=True, slots=True)
class Round:
    """A recorded selection round."""

    number: int
    """Counted from 0 within the collection."""
    about: dict[str, Any]
    """Step, selector, seed, target, commit, settings, counts, costs, warnings: docs/rounds.md lists the members."""
    table: pa.Table
    """One row per candidate (SCHEMA)."""

    @property
    def step(self) -> int:
        """The policy's step; DamagedError if `about` does not say it."""
        if "step" not in self.about:
            raise DamagedError(f"round {self.number}: its record does not say the step")
        return int(self.about["step"])

    @property
    def picks(self) -> list[str]:
        """Ids of the problems picked, best first."""
        ranks = self.table["picked"].to_numpy()
        chosen = np.flatnonzero(ranks >= 0)
        ids: list[str] = self.table["id"].take(chosen[np.argsort(ranks[chosen], kind="stable")]).to_pylist()
        return ids


class RecordedRounds(Sequence[Round]):
    """The recorded rounds of a pool, oldest first: a sequence that reads a round when it is asked for.

    Reading raises DamagedError if a round changed or is missing.
    """

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._folder = collection.folder / ROUNDS

    def __len__(self) -> int:
        """Number of rounds; lists names, reads no file."""
        return additions.count_parts(self._folder)

    @overload
    def __getitem__(self, number: int) -> Round: ...
    @overload
    def __getitem__(self, number: slice) -> list[Round]: ...
    def __getitem__(self, number: int | slice) -> Round | list[Round]:
        """One round or several; negative numbers count from the newest. RequestError if there is no such round."""
        count = len(self)
        if isinstance(number, slice):
            return [self[one] for one in range(count)[number]]
        if not -count <= number < count:
            raise RequestError(f"{self._collection.where} has {count} rounds, there is no round {number}")
        return self._read(number % count, number % count + 1)[0]

    def __iter__(self) -> Iterator[Round]:
        return iter(self._read())

    def about(self, number: int) -> dict[str, Any]:
        """`Round.about` of one round, without its table. RequestError if there is no such round."""
        count = len(self)
        if not 0 <= number < count:
            raise RequestError(f"{self._collection.where} has {count} rounds, there is no round {number}")
        ((name, data),) = additions.read_parts(self._folder, number, number + 1).items()
        return _about(data, self._folder / name)

    def add(self, about: Mapping[str, Any], table: pa.Table) -> int:
        """Record a round and return its number, counted from 0.

        about: settings and results of the round, JSON-compatible. table: one row per candidate, columns as in
        docs/format.md. RequestError for other columns, or an unknown or repeated id.
        """
        self._collection.refuse_read_only()
        data = _to_bytes(about, table, self._collection.where)
        ids = table["id"].cast(pa.large_string()).combine_chunks()
        return self._collection.add(ids, lambda: additions.add_part(self._folder, data))

    def _read(self, first: int = 0, stop: int | None = None) -> list[Round]:
        """Rounds from `first` up to (not including) `stop`."""
        parts = additions.read_parts(self._folder, first, stop)
        return [read_part(data, place, self._folder / name) for place, (name, data) in enumerate(parts.items(), first)]


def _to_bytes(about: Mapping[str, Any], table: pa.Table, where: str) -> bytes:
    """Check a round and encode it as a Parquet file; RequestError if the table or `about` is invalid."""
    if set(table.column_names) != set(SCHEMA.names):
        missing = sorted(set(SCHEMA.names) - set(table.column_names))
        extra = sorted(set(table.column_names) - set(SCHEMA.names))
        raise RequestError(f"{where}: the round's table lacks {missing or 'nothing'}, has {extra or 'nothing'} more")
    try:
        table = table.select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise RequestError(f"{where}: a round's table has columns of other types: {error}") from None
    if len(table["id"].unique()) < len(table):
        twice = repeated(table["id"].to_pylist())
        raise RequestError(f"{where}: problem id {twice!r} occurs more than once in the round; keep one")
    for state in table["state"].unique().to_pylist():
        check_known(f"{where}: state", state, STATES)
    if not _ranks_are_whole(table):
        raise RequestError(f"{where}: `picked` must count the picks 0, 1, ... and be -1 elsewhere")
    try:
        text = canonical_json(dict(about))
        _MEMBERS.check(load_json(text, where, nan=True), where)
    except DamagedError as error:
        raise RequestError(f"{where}: the round: {str(error).removeprefix(f'{where}: damaged: ')}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{where}: what the round was is not JSON: {error}") from None
    return table_bytes(table.replace_schema_metadata({_ABOUT: text}))


def _ranks_are_whole(table: pa.Table) -> bool:
    """Whether `picked` counts the picks from 0 and is -1 elsewhere."""
    ranks = np.sort(table["picked"].to_numpy())
    ranks = ranks[ranks != -1]
    return np.array_equal(ranks, np.arange(len(ranks)))


def read_part(data: bytes, number: int, path: Path) -> Round:
    """The round of a part; DamagedError names the file and the column for what no round can be."""
    table = read_stored(io.BytesIO(data), path, SCHEMA)
    about = _about(data, path)
    faults = {
        "id: one occurs twice": len(table["id"].unique()) < len(table),
        "state: not one of " + ", ".join(STATES): not set(table["state"].unique().to_pylist()) <= set(STATES),
        "picked: does not count the picks": not _ranks_are_whole(table),
    }
    for fault, wrong in faults.items():
        if wrong:
            raise DamagedError(f"{path}: damaged: {fault}")
    return Round(number, about, table)


def _about(data: bytes, path: Path) -> dict[str, Any]:
    """`Round.about` from the bytes of a part; DamagedError for what no round can be."""
    text = read_metadata(io.BytesIO(data), path).get(_ABOUT)
    if text is None:
        raise DamagedError(f"{path}: is no round: it does not say what the round was")
    about: dict[str, Any] = load_json(text, f"{path}, {_ABOUT.decode()}", nan=True)
    _MEMBERS.check(about, f"{path}, {_ABOUT.decode()}")
    return about
