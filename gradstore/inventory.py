"""Inventory: names of the files that no manifest names, so that a missing one is noticed, the newest too.

Attachments, probes and rounds have their checksum in their name, and parts are numbered. This shows changed bytes and
gaps, but not that the newest file is gone. `inventory.json` lists them: in the store's folder the attachments, in a
collection's folder its probes and rounds. It is replaced after the files are on disk, so a crash leaves files that it
does not name yet, never the reverse. A store of an earlier version has none until something is added.
"""

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gradstore.durable import canonical_json, crc32c, replace_file
from gradstore.errors import DamagedError, GradstoreError
from gradstore.inside import names_inside, read_inside
from gradstore.layout import PROBES, ROUNDS
from gradstore.schema import Checker, lists, one_of, record, text, whole

log = logging.getLogger(__name__)

INVENTORY = "inventory.json"
FORMAT = 1
OF_STORE = ("attachments",)
OF_COLLECTION = (PROBES, ROUNDS)
_HEAD = b'{"crc32c":"%08x","inventory":'
_HEAD_BYTES = len(_HEAD % 0)
_TAIL = b"}\n"
_NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]*[.-][0-9a-f]{8}(\.parquet)?"
"""Names that contain the checksum of their file."""
_FILES = record({}, {folder: lists(text(_NAME)) for folder in (*OF_STORE, *OF_COLLECTION)})
_BODY = Checker(record({"format": one_of(FORMAT), "commit": whole(), "files": _FILES}))
MOST_BYTES = 1 << 26
"""Largest inventory: two million names."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """Files of a store or a collection that no manifest names."""

    files: dict[str, tuple[str, ...]]
    """Folder -> names, sorted."""
    commit: int = 0
    """Commit of the collection when the last file was added; 0 for attachments. Its manifest cannot be older."""

    def to_bytes(self) -> bytes:
        body = canonical_json({"format": FORMAT, "commit": self.commit, "files": self.files})
        return _HEAD % crc32c(body) + body + _TAIL

    @classmethod
    def from_bytes(cls, raw: bytes, file: Path) -> "Inventory":
        """Parse an inventory; DamagedError if a byte changed or a name cannot be."""
        body = raw[_HEAD_BYTES : -len(_TAIL)]
        if raw[:_HEAD_BYTES] != _HEAD % crc32c(body) or raw[-len(_TAIL) :] != _TAIL:
            raise DamagedError(f"{file}: damaged: the inventory does not match its checksum")
        value = _BODY.parse(body, file)
        return cls({folder: tuple(names) for folder, names in value["files"].items()}, value["commit"])


def read_inventory(folder: Path, root: Path) -> Inventory | None:
    """The inventory of a folder, the store's (`root`) or a collection's; None if it has none."""
    file = folder / INVENTORY
    if not os.path.lexists(file):
        return None
    return Inventory.from_bytes(read_inside(file, root, MOST_BYTES), file)


def take_inventory(folder: Path, root: Path, kinds: tuple[str, ...], commit: int = 0) -> None:
    """Write the inventory of the files that are there now, durably; the caller holds the lock of those who add some.

    The files themselves are kept already, so a failed write is a warning: the next addition lists them.
    """
    found = {kind: tuple(_names(folder / kind, root)) for kind in kinds}
    data = Inventory({kind: names for kind, names in found.items() if names}, commit).to_bytes()
    file = folder / INVENTORY
    try:
        if not os.path.lexists(file) or read_inside(file, root, MOST_BYTES) != data:
            replace_file(file, data)
    except GradstoreError as error:
        log.warning("%s: the newest files are kept but not listed yet (%s)", folder, error)


def check_inventory(folder: Path, root: Path, *kinds: str) -> None:
    """DamagedError for the first file that the inventory names and that is gone. kinds: of these folders; none: all."""
    inventory = read_inventory(folder, root)
    for path in missing_files(folder, root, inventory, kinds) if inventory is not None else ():
        raise DamagedError(
            f"{path}: the file is missing; restore it, or accept the loss by removing {folder / INVENTORY}; "
            "`gradstore verify` lists all damage"
        )


def missing_files(folder: Path, root: Path, inventory: Inventory, kinds: tuple[str, ...] = ()) -> Iterator[Path]:
    """Files that an inventory names and that are not there."""
    for kind, names in inventory.files.items():
        if not kinds or kind in kinds:
            there = set(_names(folder / kind, root))
            yield from (folder / kind / name for name in names if name not in there)


def too_old(inventory: Inventory | None, commit: int) -> str:
    """How an inventory contradicts a manifest of this commit that was read after it; empty if it does not."""
    if inventory is None or inventory.commit <= commit:
        return ""
    return f"is of commit {commit}, but probes or rounds were added at commit {inventory.commit}: an older manifest"


def _names(folder: Path, root: Path) -> list[str]:
    return [name for name in names_inside(folder, root) if re.fullmatch(_NAME, name)]
