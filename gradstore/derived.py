"""Files derived from a collection's rows, in its folder `indexes/`: whether their bytes are those that were written.

They are no part of the store. A damaged one costs time, because it is built anew, and never changes an answer.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from gradstore.durable import canonical_json, crc32c
from gradstore.errors import GradstoreError
from gradstore.inside import file_inside, read_inside
from gradstore.kept_ids import damaged_ids
from gradstore.layout import INDEXES

_PIECE = 1 << 24
_MOST_BYTES = 1 << 24
"""Largest index.json."""
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def unreadable_indexes(collection: Path, store: Path) -> Iterator[tuple[Path, str]]:
    """Each index and matrix that cannot be used, with the reason."""
    for file in sorted((collection / INDEXES).glob("*/index.json")):
        try:
            fault = _index_fault(file, store)
        except (GradstoreError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            fault = "not the text that was written"
        if fault:
            yield file.parent, fault
    for file in sorted((collection / INDEXES / "fisher").glob("*.f64")):
        try:
            whole = file.stem.endswith(f"-{_checksum(file, store):08x}")
        except (GradstoreError, OSError):
            whole = False
        if not whole:
            yield file, "bytes do not match the checksum in its name"
    for file in damaged_ids(collection, store):
        yield file, "not the bytes that were written"


def _index_fault(file: Path, store: Path) -> str:
    whole = json.loads(read_inside(file, store, _MOST_BYTES))
    if whole["crc32c"] != crc32c(canonical_json(whole["index"])):
        return "index.json does not match its checksum"
    for named in (whole["index"]["files"] or {}).values():
        path = file.parent / named["name"]
        if not _PLAIN.fullmatch(named["name"]) or not path.is_file():
            return f"{named['name']!r:.80} is missing"
        if _checksum(path, store) != named["crc32c"]:
            return f"{path.name} does not match its checksum"
    return ""


def _checksum(path: Path, store: Path) -> int:
    found = 0
    with file_inside(path, store) as file:
        while piece := file.read(_PIECE):
            found = crc32c(piece, found)
    return found
