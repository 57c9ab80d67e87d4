"""Verdicts in a SQLite file, safe for threads and processes.

The file may come from elsewhere. One that holds anything but a table of verdicts is refused and left as it is. A row
whose score no verdict can have is treated as missing.
"""

import os
import sqlite3
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gradstore.errors import RequestError

Row = tuple[str, float, str]
"""(key of a question, score, the judge's reply)."""

_TABLE = "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, score REAL NOT NULL, reply TEXT NOT NULL)"
_POSSIBLE = "typeof(score) = 'real' AND score IN (0.0, 1.0)"
_INSERT = (
    "INSERT INTO verdicts VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET score = excluded.score, "
    "reply = excluded.reply WHERE NOT (typeof(verdicts.score) = 'real' AND verdicts.score IN (0.0, 1.0))"
)
_WAIT_S = 60
"""Seconds to wait for another process that writes."""
_AT_ONCE = 500
"""Keys of one query."""


class Verdicts:
    """Verdict cache in a SQLite file. RequestError, naming the file, wherever it cannot be used."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        with self._told("no cache of verdicts can be kept there"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _make_private(self.path)
            self._connection = sqlite3.connect(path, timeout=_WAIT_S, check_same_thread=False, isolation_level=None)
        try:
            with self._told("no cache of verdicts"):
                self._prepare()
        except RequestError:
            self._connection.close()
            raise

    def get(self, key: str) -> float | None:
        """The score stored under a key, or None."""
        return self.get_many([key]).get(key)

    def get_many(self, keys: Iterable[str]) -> dict[str, float]:
        """Key -> score, for the keys that have one."""
        found: dict[str, float] = {}
        with self._told("the cache of verdicts cannot be read"):
            for some in _pieces(keys):
                places = ", ".join("?" * len(some))
                query = f"SELECT key, score FROM verdicts WHERE key IN ({places}) AND {_POSSIBLE}"
                found.update(self._connection.execute(query, some).fetchall())
        return found

    def put(self, key: str, score: float, reply: str) -> None:
        """Store a verdict; the first one under a key is never replaced."""
        self.put_many([(key, score, reply)])

    def put_many(self, rows: Sequence[Row]) -> None:
        """Store verdicts in one transaction."""
        with self._told("the cache of verdicts cannot be written"):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany(_INSERT, rows)
            except sqlite3.Error:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def _prepare(self) -> None:
        """Make the table in an empty file; refuse a file with anything else in it."""
        self._connection.execute("PRAGMA trusted_schema = OFF")
        held = self._connection.execute("SELECT type, name FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        if not held:
            self._connection.execute(_TABLE)
            return
        columns = [row[1] for row in self._connection.execute("PRAGMA table_info(verdicts)")]
        if held != [("table", "verdicts")] or columns != ["key", "score", "reply"]:
            raise RequestError(f"{self.path}: a database of something else, no cache of verdicts; name another file")

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """One thread at a time; SQLite's and the system's errors become one line that names the file."""
        try:
            with self._lock:
                yield
            return
        except (sqlite3.Error, OSError, OverflowError) as error:
            wrong = f"{self.path}: {what}: {error}; name another file, or delete this one if it is a damaged cache"
        raise RequestError(wrong)


def _make_private(path: Path) -> None:
    """Create the file for its owner alone, if it is missing; OSError for what is no regular file."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
    finally:
        os.close(descriptor)


def _pieces(keys: Iterable[str]) -> Iterator[tuple[str, ...]]:
    wanted = iter(keys)
    while some := tuple(key for _, key in zip(range(_AT_ONCE), wanted, strict=False)):
        yield some
