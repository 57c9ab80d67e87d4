"""Numbered files that are only ever added: what a collection keeps beside its rows and never changes.

A folder of `part-NNNNNN-XXXXXXXX.parquet`, each named by its number, counted from 0, and the CRC-32C of its bytes. A
part is there when it has its name, so nothing else has to be published; a number that is missing below the last one, or
bytes that do not give the name, are damage. Such a folder belongs to no generation: compaction leaves it as it is.
"""

import re
from collections.abc import Collection
from pathlib import Path

from gradstore.durable import crc32c, make_folder, reading, replace_file
from gradstore.errors import DamagedError

_PART = re.compile(r"part-([0-9]{6,})-([0-9a-f]{8})\.parquet")


def add_part(folder: Path, data: bytes) -> int:
    """Write the next part, durably, and return its number; the caller holds the collection's lock."""
    make_folder(folder)
    number = max((number for number, _, _ in _parts(folder)), default=-1) + 1
    replace_file(folder / f"part-{number:06d}-{crc32c(data):08x}.parquet", data)
    return number


def count_parts(folder: Path) -> int:
    """How many parts there should be: one more than the largest number."""
    return max((number for number, _, _ in _parts(folder)), default=-1) + 1


def read_parts(folder: Path, first: int = 0, stop: int | None = None, skip: Collection[str] = ()) -> dict[str, bytes]:
    """Bytes of the parts from `first` up to `stop` by file name, in order; DamagedError for one that changed or is
    missing. skip: names of parts to leave out, unread."""
    found = {}
    for path, data, fault in check_parts(folder, first, stop, skip):
        if fault:
            raise DamagedError(f"{path}: damaged: {fault}; `gradstore verify` lists all damage")
        found[path.name] = data
    return found


def check_parts(
    folder: Path, first: int = 0, stop: int | None = None, skip: Collection[str] = ()
) -> list[tuple[Path, bytes, str]]:
    """(file, bytes, what is wrong with it or nothing) of every part but those to skip, missing ones too, in order."""
    found = {number: (crc, path) for number, crc, path in _parts(folder)}
    end = max(found, default=-1) + 1
    checked = []
    for number in range(first, end if stop is None else min(stop, end)):
        if number not in found:
            checked.append((folder / f"part-{number:06d}", b"", "missing"))
            continue
        crc, path = found[number]
        if path.name in skip:
            continue
        with reading(path):
            data = path.read_bytes()
        fault = "" if crc32c(data) == crc else f"bytes do not match the checksum in the name ({len(data)} bytes)"
        checked.append((path, data, fault))
    return checked


def strangers(folder: Path) -> list[Path]:
    """What lies in the folder and is no part."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not _PART.fullmatch(path.name))


def _parts(folder: Path) -> list[tuple[int, int, Path]]:
    """(number, checksum, file) of each part."""
    if not folder.is_dir():
        return []
    matches = ((_PART.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), int(match[2], 16), path) for match, path in matches if match)
