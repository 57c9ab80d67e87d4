"""Attachments: immutable files of a store, such as fitted bases: `attachments/<name>.<crc32c>`.

The checksum of the bytes is in the file's name, so a reader and `verify` can detect damage without an index.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradstore.durable import TEMPORARY, alone, crc32c, make_folder, replace_file, writing
from gradstore.errors import DamagedError, GradstoreError, RequestError
from gradstore.inside import check_folder, names_inside, read_inside
from gradstore.inventory import OF_STORE, check_inventory, take_inventory
from gradstore.layout import is_name
from gradstore.schema import Checker, lists, number, one_of, optional, record, text, whole

ATTACHMENTS = "attachments"
COVERAGE = "coverage.json"
"""Attachment with the measured coverage of the store's sketches."""
WEIGHTS = "weights-{}.json"
"""Attachment with the digest of the weights that the first rows of a step were collected with."""
ORIGIN = "merged.json"
"""Attachment of a merged store: the stores that it was merged from (merging.py)."""
_FILE = re.compile(r"(.+)\.([0-9a-f]{8})")
_SHARE = number(0)
_SHARES = {"parameters": _SHARE, "gradient": optional(_SHARE)}
_LEFT_OUT = record({"name": text(), **_SHARES}, {"is_known": one_of(True, False)})
_COVERAGE = Checker(record({**_SHARES, "n_groups": whole(), "left_out": lists(_LEFT_OUT)}, {"lookups": _SHARE}))


_WEIGHTS = Checker(record({"weights": text()}))


def checksum_in(name: str) -> int | None:
    """Checksum in the name of an attachment's file; None if it is the name of none."""
    match = _FILE.fullmatch(name)
    return int(match[2], 16) if match is not None and is_name(match[1]) else None


def write_attachment(store: Path, name: str, data: bytes) -> None:
    """Store bytes under a name, durably; an attachment never changes."""
    if not is_name(name):
        raise RequestError(f"attachment name {name!r:.80} is not possible: use letters, digits, '.', '_' and '-'")
    check_folder(store / ATTACHMENTS, store)
    make_folder(store / ATTACHMENTS)
    replace_file(store / ATTACHMENTS / f"{name}.{crc32c(data):08x}", data)


def read_attachment(store: Path, name: str) -> bytes:
    """Read the attachment with this name; RequestError if there is none, DamagedError if its bytes changed."""
    path = _find(store, name)
    if path is None:
        raise RequestError(f"{store}: keeps no attachment {name!r}")
    data = read_inside(path, store, crc=checksum_in(path.name))
    if not _is_whole(path, data):
        raise DamagedError(f"{path}: damaged: bytes do not match the checksum in its name")
    return data


def all_attachments(store: Path) -> dict[str, bytes]:
    """Name -> bytes of every attachment; DamagedError if one changed, or is none."""
    names = [name for name in names_inside(store / ATTACHMENTS, store) if not name.startswith(TEMPORARY)]
    for name in names:
        if checksum_in(name) is None:
            raise DamagedError(f"{store / ATTACHMENTS / name}: not a file of this store")
    return {name.rpartition(".")[0]: read_attachment(store, name.rpartition(".")[0]) for name in names}


@contextmanager
def adding(store: Path) -> Iterator[None]:
    """Lock against other processes that add attachments, so that check and write are one atomic step."""
    folder = store / ATTACHMENTS
    check_folder(folder, store)
    make_folder(folder)
    with writing(folder), alone(folder):
        check_inventory(store, store)
        yield
        take_inventory(store, store, OF_STORE)


def keep_coverage(store: Path, data: bytes) -> None:
    """Store the measured coverage of the store's sketches, unless the store has one already."""
    with adding(store):
        if _find(store, COVERAGE) is None:
            write_attachment(store, COVERAGE, data)


def read_coverage(store: Path) -> dict | None:
    """Coverage: the part of the trained gradient that the sketches contain (docs/format.md); None if not measured.

    It was measured when the store was made. DamagedError if the bytes changed, or a field cannot be.
    """
    if _find(store, COVERAGE) is None:
        return None
    found: dict = _COVERAGE.parse(read_attachment(store, COVERAGE), store / ATTACHMENTS / COVERAGE)
    return found


def keep_weights(store: Path, step: int, digest: str) -> None:
    """Store the digest of the weights that rows of a step were made with, unless the step has one already."""
    with adding(store):
        if _find(store, WEIGHTS.format(step)) is None:
            write_attachment(store, WEIGHTS.format(step), json.dumps({"weights": digest}).encode())


def read_weights(store: Path, step: int) -> str | None:
    """Digest of the weights that the first rows of a step were collected with; None if it was not kept."""
    name = WEIGHTS.format(step)
    if _find(store, name) is None:
        return None
    found: dict = _WEIGHTS.parse(read_attachment(store, name), store / ATTACHMENTS / name)
    return str(found["weights"])


def damaged_attachments(store: Path) -> Iterator[tuple[Path, str]]:
    """Each damaged or unknown file among the attachments, with a description of the fault."""
    for path in (store / ATTACHMENTS / name for name in names_inside(store / ATTACHMENTS, store)):
        if path.name.startswith(TEMPORARY):
            continue
        if not _FILE.fullmatch(path.name):
            yield path, "not a file of this store"
            continue
        try:
            if not _is_whole(path, read_inside(path, store, crc=checksum_in(path.name))):
                yield path, "bytes do not match the checksum in its name"
        except GradstoreError as error:
            yield path, str(error).removeprefix(f"{path}: ")


def _find(store: Path, name: str) -> Path | None:
    folder = store / ATTACHMENTS
    matches = map(_FILE.fullmatch, names_inside(folder, store))
    found = [match[0] for match in matches if match and match[1] == name]
    if len(found) > 1:
        raise DamagedError(f"{folder}: damaged: {len(found)} attachments have the name {name!r}, expected one")
    return folder / found[0] if found else None


def _is_whole(path: Path, data: bytes) -> bool:
    match = _FILE.fullmatch(path.name)
    return match is not None and match[2] == f"{crc32c(data):08x}"
