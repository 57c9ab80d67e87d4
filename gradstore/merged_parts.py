"""Probes and rounds of a merged collection: parts of several collections, united where that has one meaning.

Probes are united by problem, step, target and objective. Rounds are numbered in the order in which one trainer made
them, so those of several stores can be united only where one store's continue the other's.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradstore import additions
from gradstore.additions import add_part, count_parts
from gradstore.errors import RequestError
from gradstore.inventory import OF_COLLECTION, take_inventory
from gradstore.layout import PROBES, ROUNDS, store_of
from gradstore.parquet import table_bytes
from gradstore.session import Session

if TYPE_CHECKING:
    import pyarrow as pa

_KEY = ("id", "step", "target", "objective")


@dataclass(slots=True)
class UnitedParts:
    """The parts of a merged collection."""

    parts: dict[str, list[bytes]] = field(default_factory=lambda: {PROBES: [], ROUNDS: []})
    """Folder -> its parts, in order."""
    left_out: list[str] = field(default_factory=list)
    """What is not taken, and why."""


def unite_parts(folders: Sequence[Path], ids: set[str]) -> UnitedParts:
    """Unite the probes and rounds of some collections' folders.

    ids: problems of the merged collection. RequestError, naming both stores, for other probes of a problem at a step.
    DamagedError for a part that changed.
    """
    united = UnitedParts()
    _probes(folders, ids, united)
    _rounds(folders, united)
    return united


def write_parts(session: Session, united: UnitedParts) -> None:
    """Write the parts that are missing, and their inventory."""
    if not any(united.parts.values()):
        return
    session.unpublished = True
    for kind, parts in united.parts.items():
        for data in parts[count_parts(session.collection / kind) :]:
            add_part(session.collection / kind, data)
    take_inventory(session.collection, store_of(session.collection), OF_COLLECTION, session.manifest.commit)
    session.unpublished = False


def _probes(folders: Sequence[Path], ids: set[str], united: UnitedParts) -> None:
    import pyarrow as pa

    from gradstore.probes import SCHEMA, read_part

    known: dict[tuple, tuple[Path, list[dict]]] = {}
    dropped = 0
    for folder in folders:
        parts = additions.read_parts(folder / PROBES)
        tables = [read_part(data, folder / PROBES / name) for name, data in parts.items()]
        rows = pa.concat_tables([SCHEMA.empty_table(), *tables]).to_pylist()
        found = defaultdict(list)
        for row in rows:
            if row["id"] in ids:
                # Commits are counted anew in the merged store.
                found[tuple(row[name] for name in _KEY)].append(row | {"target_commit": 0})
            else:
                dropped += 1
        for key in found.keys() & known.keys():
            store, others = known[key]
            if _plain(found[key]) != _plain(others):
                raise RequestError(
                    f"collection {folder.name!r}: problem {key[0]!r} has other probes at step {key[1]} along "
                    f"{key[2]!r} in {store_of(folder)} than in {store}: merge one of them"
                )
        new = [row for key, of_key in found.items() if key not in known for row in of_key]
        known |= {key: (store_of(folder), of_key) for key, of_key in found.items() if key not in known}
        if new:
            united.parts[PROBES].append(table_bytes(_table(new, SCHEMA)))
    if dropped:
        united.left_out.append(f"collection {folders[0].name!r}: {dropped} probes of deleted problems")


def _table(rows: list[dict], schema: "pa.Schema") -> "pa.Table":
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema=schema)


def _plain(rows: list[dict[str, Any]]) -> str:
    """The rows as text, in which nan equals nan."""
    return repr(rows)


def _rounds(folders: Sequence[Path], united: UnitedParts) -> None:
    from gradstore.rounds import read_part

    found = {folder: additions.read_parts(folder / ROUNDS) for folder in folders}
    for folder, parts in found.items():
        for number, (name, data) in enumerate(parts.items()):
            read_part(data, number, folder / ROUNDS / name)
    longest = max(folders, key=lambda folder: len(found[folder]))
    every = list(found[longest].values())
    for folder, parts in found.items():
        pairs = zip(parts.values(), every, strict=False)
        first = next((number for number, (one, other) in enumerate(pairs) if one != other), None)
        if first is not None:
            united.left_out.append(
                f"collection {folder.name!r}: all rounds: {store_of(folder)} and {store_of(longest)} recorded another "
                f"round {first}, and the rounds of a pool are one trainer's, in their order"
            )
            return
    united.parts[ROUNDS] = every
