"""Files derived from a collection's rows, in its folder `indexes/`: whether their bytes are those that were written.

They are no part of the store. A damaged one costs time, because it is built anew, and never changes an answer.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gradstore.durable import canonical_json, crc32c
from gradstore.layout import INDEXES

_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def unreadable_indexes(collection: Path) -> Iterator[tuple[Path, str]]:
    """Each index and matrix that cannot be used, with the reason."""
    for file in sorted((collection / INDEXES).glob("*/index.json")):
        try:
            fault = _index_fault(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            fault = "not the text that was written"
        if fault:
            yield file.parent, fault
    for file in sorted((collection / INDEXES / "fisher").glob("*.f64")):
        if not file.stem.endswith(f"-{_checksum(file):08x}"):
            yield file, "bytes do not match the checksum in its name"


def _index_fault(file: Path) -> str:
    whole = json.loads(file.read_bytes())
    if whole["crc32c"] != crc32c(canonical_json(whole["index"])):
        return "index.json does not match its checksum"
    for named in (whole["index"]["files"] or {}).values():
        path = file.parent / named["name"]
        if not _PLAIN.fullmatch(named["name"]) or path.is_symlink() or not path.is_file():
            return f"{named['name']!r:.80} is missing"
        if _checksum(path) != named["crc32c"]:
            return f"{path.name} does not match its checksum"
    return ""


def _checksum(path: Path) -> int:
    return crc32c(np.memmap(path, np.uint8, "r")) if path.stat().st_size else 0
