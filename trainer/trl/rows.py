"""Rows of TRL's data sets as problems: their ids, their records for the store, and the way back.

A row's id is its column `id` (or another, as set), or the collection's name and the row's number. Whatever columns the
row has, the reward functions get them as they do in training.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradstore.errors import RequestError
from gradstore.problems import canonical

_TRUTHS = ("ground_truth", "answer", "solution")
"""Columns that may hold the ground truth; the first that is a text is kept in the store."""
_SOURCES = ("source", "data_source")


class Rows:
    """The rows of a pool and of benchmarks, by problem id."""

    def __init__(self, pool: Sequence[Any], name: str, benchmarks: Mapping[str, Sequence[Any]], id_column: str) -> None:
        """name: the pool's collection. RequestError for a row that is no problem, and for an id that occurs twice in a
        collection, or in two of them with other contents."""
        self._row_of: dict[str, dict[str, Any]] = {}
        self.pool = self._records(pool, name, id_column)
        """Canonical records of the pool, in the order of its rows."""
        self.benchmarks = {own: self._records(rows, own, id_column) for own, rows in benchmarks.items()}
        self.place_of = {record["id"]: place for place, record in enumerate(self.pool)}
        """Problem id -> row number in the pool."""
        self.digest = hashlib.sha256("\n".join(self.place_of).encode()).hexdigest()[:16]
        """Hash of the pool's ids in their order."""

    def row(self, problem_id: str) -> dict[str, Any]:
        """A copy of the problem's row."""
        return dict(self._row_of[problem_id])

    def _records(self, rows: Iterable[Any], name: str, id_column: str) -> list[dict[str, Any]]:
        records, seen = [], set[str]()
        for place, row in enumerate(rows):
            where = f"{name}, row {place}"
            if not isinstance(row, Mapping):
                raise RequestError(f"{where}: a {type(row).__name__}, expected a row with named columns")
            given = row.get(id_column)
            record = canonical(
                {
                    "id": f"{name}-{place}" if given is None else str(given),
                    "prompt": row.get("prompt"),
                    "source": _first_text(row, _SOURCES),
                    "ground_truth": _first_text(row, _TRUTHS),
                },
                where,
            )
            if record["id"] in seen:
                raise RequestError(f"{where}: problem id {record['id']!r} occurs before: ids must differ")
            seen.add(record["id"])
            if self._row_of.setdefault(record["id"], dict(row)) != dict(row):
                raise RequestError(
                    f"{where}: problem id {record['id']!r} is also in another collection, with other contents: "
                    "give them different ids"
                )
            records.append(record)
        return records


def _first_text(row: Mapping[str, Any], names: Iterable[str]) -> str:
    return next((row[name] for name in names if isinstance(row.get(name), str)), "")
