"""Attachments: immutable files of a store, such as fitted bases: `attachments/<name>.<crc32c>`.

The checksum of the bytes is in the file's name, so a reader and `verify` can detect damage without an index.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradstore.durable import TEMPORARY, alone, crc32c, make_folder, reading, replace_file, writing
from gradstore.errors import DamagedError, RequestError
from gradstore.inventory import OF_STORE, check_inventory, take_inventory

ATTACHMENTS = "attachments"
COVERAGE = "coverage.json"
"""Attachment with the measured coverage of the store's sketches."""
_FILE = re.compile(r"(.+)\.([0-9a-f]{8})")


def write_attachment(store: Path, name: str, data: bytes) -> None:
    """Store bytes under a name, durably; an attachment never changes."""
    make_folder(store / ATTACHMENTS)
    replace_file(store / ATTACHMENTS / f"{name}.{crc32c(data):08x}", data)


def read_attachment(store: Path, name: str) -> bytes:
    """Read the attachment with this name; RequestError if there is none, DamagedError if its bytes changed."""
    path = _find(store, name)
    if path is None:
        raise RequestError(f"{store}: keeps no attachment {name!r}")
    with reading(path):
        data = path.read_bytes()
    if not _is_whole(path, data):
        raise DamagedError(f"{path}: damaged: bytes do not match the checksum in its name")
    return data


@contextmanager
def adding(store: Path) -> Iterator[None]:
    """Lock against other processes that add attachments, so that check and write are one atomic step."""
    folder = store / ATTACHMENTS
    make_folder(folder)
    with writing(folder), alone(folder):
        check_inventory(store)
        yield
        take_inventory(store, OF_STORE)


def keep_coverage(store: Path, data: bytes) -> None:
    """Store the measured coverage of the store's sketches, unless the store has one already."""
    with adding(store):
        if _find(store, COVERAGE) is None:
            write_attachment(store, COVERAGE, data)


def read_coverage(store: Path) -> dict | None:
    """Coverage: the part of the trained gradient that the sketches contain (docs/format.md); None if not measured.

    It was measured when the store was made. DamagedError if the bytes changed.
    """
    return None if _find(store, COVERAGE) is None else json.loads(read_attachment(store, COVERAGE))


def damaged_attachments(store: Path) -> Iterator[tuple[Path, str]]:
    """Each damaged or unknown file among the attachments, with a description of the fault."""
    for path in sorted((store / ATTACHMENTS).glob("*")):
        if path.name.startswith(TEMPORARY):
            continue
        if not _FILE.fullmatch(path.name):
            yield path, "not a file of this store"
        elif not _is_whole(path, path.read_bytes()):
            yield path, "bytes do not match the checksum in its name"


def _find(store: Path, name: str) -> Path | None:
    found = [path for path in (store / ATTACHMENTS).glob(f"{name}.*") if _FILE.fullmatch(path.name)]
    return found[0] if found else None


def _is_whole(path: Path, data: bytes) -> bool:
    match = _FILE.fullmatch(path.name)
    return match is not None and match[2] == f"{crc32c(data):08x}"
