"""Append-only numbered Parquet files of a collection, such as probes and rounds; they never change.

A folder of `part-NNNNNN-XXXXXXXX.parquet`. The name has the part's number, counted from 0, and the CRC-32C of its
bytes. The final rename publishes a part; no manifest is involved. A missing number below the last one, or bytes that do
not match the name, are damage. Such a folder belongs to no generation: compaction does not change it.
"""

import re
from collections.abc import Collection
from pathlib import Path

from gradstore.durable import crc32c, make_folder, replace_file
from gradstore.errors import DamagedError, GradstoreError
from gradstore.inside import check_folder, names_inside, read_inside
from gradstore.inventory import check_inventory
from gradstore.layout import store_of

_PART = re.compile(r"part-([0-9]{6,9})-([0-9a-f]{8})\.parquet")
_MOST_MISSING = 100
"""Most missing parts that are listed one by one: a number in a name must not make the list long."""


def checksum_in(name: str) -> int | None:
    """Checksum in the name of a part; None if it is the name of no part."""
    match = _PART.fullmatch(name)
    return None if match is None else int(match[2], 16)


def add_part(folder: Path, data: bytes) -> int:
    """Write the next part, durably, and return its number; the caller holds the collection's lock."""
    check_folder(folder, _store(folder))
    make_folder(folder)
    number = count_parts(folder)
    name = f"part-{number:06d}-{crc32c(data):08x}.parquet"
    if checksum_in(name) is None:
        raise DamagedError(f"{folder}: damaged: the newest part has the number {number - 1}, after which none can come")
    replace_file(folder / name, data)
    return number


def count_parts(folder: Path) -> int:
    """Number of parts there should be: the largest number plus one. DamagedError if the inventory names more."""
    check_inventory(folder.parent, _store(folder), folder.name)
    return max((number for number, _, _ in _parts(folder)), default=-1) + 1


def read_parts(folder: Path, first: int = 0, stop: int | None = None, skip: Collection[str] = ()) -> dict[str, bytes]:
    """File name -> bytes of the parts from `first` up to (not including) `stop`, in order.

    skip: names of parts that are not read. DamagedError if a part changed or is missing.
    """
    check_inventory(folder.parent, _store(folder), folder.name)
    found = {}
    for path, data, fault in check_parts(folder, first, stop, skip):
        if fault:
            raise DamagedError(f"{path}: damaged: {fault}; `gradstore verify` lists all damage")
        found[path.name] = data
    return found


def check_parts(
    folder: Path, first: int = 0, stop: int | None = None, skip: Collection[str] = ()
) -> list[tuple[Path, bytes, str]]:
    """Check every part, missing ones too, except those to skip: (file, bytes, fault, "" if none), in order."""
    found: dict[int, tuple[int, Path]] = {}
    checked = []
    for number, crc, path in _parts(folder):
        if number in found:
            checked.append((path, b"", f"number {number} occurs twice"))
        found[number] = (crc, path)
    numbers = range(max(found, default=-1) + 1)
    if len(numbers) > len(found) + _MOST_MISSING:
        name = folder / f"part-{max(found):06d}"
        return [*checked, (name, b"", f"{len(numbers) - len(found)} parts before it are missing")]
    for number in numbers[first:stop]:
        if number not in found:
            checked.append((folder / f"part-{number:06d}", b"", "missing"))
            continue
        crc, path = found[number]
        if path.name in skip:
            continue
        try:
            data = read_inside(path, _store(folder), crc=crc)
        except GradstoreError as error:
            checked.append((path, b"", str(error).removeprefix(f"{path}: ")))
            continue
        fault = "" if crc32c(data) == crc else f"bytes do not match the checksum in the name ({len(data)} bytes)"
        checked.append((path, data, fault))
    return checked


def missing_part(folder: Path) -> Path | None:
    """The first part that is missing below the largest number; None if there is none. Reads names alone."""
    for number, (found, _, _) in enumerate(_parts(folder)):
        if found > number:
            return folder / f"part-{number:06d}"
    return None


def strangers(folder: Path) -> list[Path]:
    """Files in the folder that are not parts."""
    return [folder / name for name in names_inside(folder, _store(folder)) if not _PART.fullmatch(name)]


def _parts(folder: Path) -> list[tuple[int, int, Path]]:
    """(number, checksum, file) of each part."""
    matches = map(_PART.fullmatch, names_inside(folder, _store(folder)))
    return sorted((int(match[1]), int(match[2], 16), folder / match[0]) for match in matches if match)


def _store(folder: Path) -> Path:
    return store_of(folder.parent)
