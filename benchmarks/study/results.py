"""The file of results: one JSON object per line, one line per finished run, appended durably.

An incomplete last line, left by a kill, is dropped.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.study.bed import StudySettings
from gradstore.durable import writing
from gradstore.errors import LockedError, RequestError

Key = tuple[str, str, int]
"""(arm, method, seed)."""


def plan(arms: Iterable[str], methods: Iterable[str], seeds: Iterable[int]) -> list[Key]:
    """All runs, with seeds as the outer loop, so that a stopped study still compares methods on the same seeds."""
    return [(arm, method, seed) for seed in seeds for arm in arms for method in methods]


def numbers(text: str) -> list[int]:
    """Parse a list of numbers and ranges such as "0-4,7"; ascending, distinct. RequestError for other text."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True) and int(first) <= int(last or first)):
            raise RequestError(f"{text!r} is no list of numbers, expected one as 0-4,7")
        found.update(range(int(first), int(last or first) + 1))
    return sorted(found)


def read_results(path: Path, settings: StudySettings | None = None) -> list[dict[str, Any]]:
    """The rows of a file; empty if there is no file. settings: only rows with these settings; None: all.

    RequestError for a line that is not a row.
    """
    if not path.exists():
        return []
    wanted = None if settings is None else json.loads(json.dumps(asdict(settings)))
    rows = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break  # incomplete because of a kill; the run is repeated
        try:
            row = json.loads(line)
            if wanted is None or row["settings"] == wanted:
                rows.append(row)
        except (ValueError, KeyError, TypeError):
            raise RequestError(f"{path}, line {number}: not a row of results; mend or remove the line") from None
    return rows


def key(row: dict[str, Any]) -> Key:
    return row["arm"], row["method"], row["seed"]


def append_result(path: Path, row: dict[str, Any]) -> None:
    """Append a row durably: it is on the disk when this returns."""
    with writing(path), path.open("ab+") as file:
        _drop_torn(file)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Lock a file of results; LockedError if another study is writing it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(f"{path}: another study is writing it; wait for it, or choose another file") from None
        yield


def _drop_torn(file: Any) -> None:
    file.seek(0, os.SEEK_END)
    end = file.tell()
    while end:
        file.seek(end - 1)
        if file.read(1) == b"\n":
            break
        end -= 1
    file.truncate(end)
    file.seek(0, os.SEEK_END)
