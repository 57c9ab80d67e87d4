"""Inventory: names of the files that no manifest names, so that a missing one is noticed, the newest too.

Attachments, probes and rounds have their checksum in their name, and parts are numbered. This shows changed bytes and
gaps, but not that the newest file is gone. `inventory.json` lists them: in the store's folder the attachments, in a
collection's folder its probes and rounds. It is replaced after the files are on disk, so a crash leaves files that it
does not name yet, never the reverse. A store of an earlier version has none until something is added.
"""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gradstore.durable import canonical_json, crc32c, reading, replace_file
from gradstore.errors import DamagedError, GradstoreError
from gradstore.layout import PROBES, ROUNDS

log = logging.getLogger(__name__)

INVENTORY = "inventory.json"
FORMAT = 1
OF_STORE = ("attachments",)
OF_COLLECTION = (PROBES, ROUNDS)
_HEAD = b'{"crc32c":"%08x","inventory":'
_HEAD_BYTES = len(_HEAD % 0)
_TAIL = b"}\n"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*[.-][0-9a-f]{8}(\.parquet)?")
"""Names that contain the checksum of their file."""


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
        try:
            value = json.loads(body)
            files = {folder: tuple(value["files"].get(folder, ())) for folder in (*OF_STORE, *OF_COLLECTION)}
            found = cls({folder: names for folder, names in files.items() if names}, value["commit"])
            names_fit = all(_NAME.fullmatch(name) for names in files.values() for name in names)
            fits = value["format"] == FORMAT and type(found.commit) is int and names_fit
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError(f"{file}: damaged: not an inventory ({error})") from error
        if not fits:
            raise DamagedError(f"{file}: damaged: not an inventory of format {FORMAT}, or it has an impossible name")
        return found


def read_inventory(folder: Path) -> Inventory | None:
    """The inventory of a store's or collection's folder; None if it has none."""
    file = folder / INVENTORY
    if not file.exists():
        return None
    with reading(file):
        raw = file.read_bytes()
    return Inventory.from_bytes(raw, file)


def take_inventory(folder: Path, kinds: tuple[str, ...], commit: int = 0) -> None:
    """Write the inventory of the files that are there now, durably; the caller holds the lock of those who add some.

    The files themselves are kept already, so a failed write is a warning: the next addition lists them.
    """
    found = {kind: tuple(sorted(_names(folder / kind))) for kind in kinds}
    data = Inventory({kind: names for kind, names in found.items() if names}, commit).to_bytes()
    file = folder / INVENTORY
    try:
        if not file.exists() or file.read_bytes() != data:
            replace_file(file, data)
    except GradstoreError as error:
        log.warning("%s: the newest files are kept but not listed yet (%s)", folder, error)


def check_inventory(folder: Path, *kinds: str) -> None:
    """DamagedError for the first file that the inventory names and that is gone. kinds: of these folders; none: all."""
    inventory = read_inventory(folder)
    for path in missing_files(folder, inventory, kinds) if inventory is not None else ():
        raise DamagedError(
            f"{path}: the file is missing; restore it, or accept the loss by removing {folder / INVENTORY}; "
            "`gradstore verify` lists all damage"
        )


def missing_files(folder: Path, inventory: Inventory, kinds: tuple[str, ...] = ()) -> Iterator[Path]:
    """Files that an inventory names and that are not there."""
    for kind, names in inventory.files.items():
        if not kinds or kind in kinds:
            there = set(_names(folder / kind))
            yield from (folder / kind / name for name in names if name not in there)


def too_old(inventory: Inventory | None, commit: int) -> str:
    """How an inventory contradicts a manifest of this commit that was read after it; empty if it does not."""
    if inventory is None or inventory.commit <= commit:
        return ""
    return f"is of commit {commit}, but probes or rounds were added at commit {inventory.commit}: an older manifest"


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return [path.name for path in folder.iterdir() if _NAME.fullmatch(path.name)]
