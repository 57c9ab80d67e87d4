"""Adding problems to a collection: records are checked; a stored problem must be equal in every field."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradstore.durable import fsync_folder, writing
from gradstore.errors import RequestError
from gradstore.header import Header
from gradstore.problem_table import ProblemTable, add_to_parts, to_table
from gradstore.problems import canonical
from gradstore.session import Session

if TYPE_CHECKING:
    import pyarrow as pa


def add_problems(header: Header, folder: Path, records: Iterable[dict], known: ProblemTable | None) -> int:
    """Add records to the collection in a folder (created if new); returns the number of new problems.

    known: the problems that a reader sees; None for a new collection. If all records are known, no lock is taken.
    RequestError names id and field of a record that is invalid, given twice, or different from the stored one.
    """
    collection = folder.name
    checked = [canonical(record, f"collection {collection!r}, record {n}") for n, record in enumerate(records)]
    seen = Counter(record["id"] for record in checked)
    if len(seen) < len(checked):
        twice = next(problem_id for problem_id, count in seen.items() if count > 1)
        raise RequestError(f"collection {collection!r}: problem id {twice!r} occurs {seen[twice]} times; keep one")
    table = to_table(checked)
    if known is not None and not len(_new_rows(known, table, collection)):
        return 0
    with Session(header, folder, create=True) as session:
        new = _new_rows(ProblemTable(folder, session.manifest), table, collection)
        if len(new):
            session.unpublished = True
            parts, unneeded = add_to_parts(folder, session.manifest, table.take(new))
            session.publish(parts=parts)
            with writing(folder):
                for file in unneeded:
                    file.unlink()
                for place in {file.parent for file in unneeded}:
                    fsync_folder(place)  # Before the lock file is emptied: empty means nothing is left to clear.
    return len(new)


def _new_rows(known: ProblemTable, table: "pa.Table", collection: str) -> np.ndarray:
    """Rows of `table` whose ids are not known; RequestError if a known one has other content."""
    import pyarrow as pa

    places = np.array([known.index.get(name, -1) for name in table["id"].to_pylist()], dtype=np.int64)
    again = np.flatnonzero(places >= 0)
    offered, stored = table.take(again), known.table.take(places[again]) if len(again) else table.slice(0, 0)
    for field in table.column_names:
        if pa.chunked_array(offered[field]).equals(stored[field]):
            continue
        pairs = zip(offered["id"].to_pylist(), offered[field].to_pylist(), stored[field].to_pylist(), strict=True)
        name, new, old = next(pair for pair in pairs if pair[1] != pair[2])
        field = "prompt" if field == "messages" else field
        raise RequestError(
            f"collection {collection!r}: problem {name!r} is stored with another {field!r}: {_short(old)}, "
            f"now {_short(new)}; give a changed problem a new id"
        )
    return np.flatnonzero(places < 0)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
