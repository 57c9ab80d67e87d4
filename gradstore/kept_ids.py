"""Kept lookups of ids: for each large problem part a file of sorted hashes, so that a few ids are found among millions.

The file is mapped: a search touches a few of its pages. It only proposes rows. The texts at these rows decide, and an
id that no file proposes is looked for in the column of all ids. So a damaged or foreign file costs time and changes no
answer. The files are no part of the store: `indexes/ids/PART-CHECKSUM.ids`, where PART and CHECKSUM are the name and
the checksum of a part in the manifest. They are written with the parts; a store without them is as good as before.

    8 bytes      b"gs-ids-1"
    n x uint64   hashes of the part's n ids (id_lookup.py), ascending
    n x uint32   row of each in the part
    uint32       CRC-32C of everything before it, for `gradstore verify`
"""

import logging
import mmap
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradstore.durable import crc32c, replace_file, writing
from gradstore.errors import GradstoreError
from gradstore.id_lookup import hashes_of
from gradstore.inside import check_folder, names_inside, open_inside, read_inside, remove_file
from gradstore.layout import INDEXES, store_of
from gradstore.manifest import Part

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

IDS = "ids"
"""Folder of these files in `indexes/`."""
LEAST_ROWS = 4096
"""Parts with fewer rows have no file: their ids are read."""
_MARK = b"gs-ids-1"
_NAME = re.compile(r"part-[0-9]{6,9}-[0-9a-f]{8}\.ids")


@dataclass(frozen=True, slots=True, eq=False)
class SortedIds:
    """Ids of a part by their hashes."""

    hashes: np.ndarray
    """uint64 [n], ascending."""
    rows: np.ndarray
    """Row of each in the part, uint32 [n]."""

    @classmethod
    def of(cls, ids: "pa.Array") -> "SortedIds":
        """ids: large strings, none null."""
        hashes = hashes_of(ids)
        order = np.argsort(hashes, kind="stable")
        return cls(hashes[order], order.astype(np.uint32))

    def propose(self, hashes: np.ndarray) -> np.ndarray:
        """A row that may have the id of each hash, int64; -1 where no row or several rows have this hash."""
        last = len(self.hashes) - 1
        if last < 0:
            return np.full(len(hashes), -1)
        place = np.minimum(np.searchsorted(self.hashes, hashes), last)
        one = (self.hashes[place] == hashes) & ((place == last) | (self.hashes[np.minimum(place + 1, last)] != hashes))
        return np.where(one, np.minimum(self.rows[place], last).astype(np.int64), -1)


def keep_ids(collection: Path, part: Part, ids: "pa.Array") -> None:
    """Write the file of a large part. It only saves time: a failed write is logged and leaves no file."""
    if part.rows < LEAST_ROWS:
        return
    path, found = _path(collection, part), SortedIds.of(ids)
    data = _MARK + found.hashes.astype("<u8").tobytes() + found.rows.astype("<u4").tobytes()
    try:
        check_folder(path.parent, store_of(collection))
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data + crc32c(data).to_bytes(4, "little"))
    except (GradstoreError, OSError) as error:
        log.warning("%s: the lookup of ids is not kept (%s)", path.parent, error)


def kept_ids(collection: Path, part: Part) -> SortedIds | None:
    """The ids of a part, mapped; None without a file of the right size."""
    size = len(_MARK) + 12 * part.rows + 4
    try:
        descriptor = open_inside(_path(collection, part), store_of(collection))
    except (GradstoreError, OSError):
        return None
    try:
        if part.rows < LEAST_ROWS or os.fstat(descriptor).st_size != size:
            return None
        mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    if mapped[: len(_MARK)] != _MARK:
        return None
    hashes = np.frombuffer(mapped, "<u8", part.rows, len(_MARK))
    return SortedIds(hashes, np.frombuffer(mapped, "<u4", part.rows, len(_MARK) + hashes.nbytes))


def drop_other_ids(collection: Path, parts: Iterable[Part]) -> None:
    """Remove the files of parts that are no longer named."""
    folder, store = collection / INDEXES / IDS, store_of(collection)
    known = {_path(collection, part).name for part in parts}
    try:
        for name in names_inside(folder, store):
            if name not in known and _NAME.fullmatch(name):
                remove_file(folder / name, store)
    except (GradstoreError, OSError) as error:
        log.warning("%s: earlier lookups of ids are not removed (%s)", folder, error)


def damaged_ids(collection: Path, store: Path) -> list[Path]:
    """Files whose bytes are not those that were written."""
    damaged = []
    for path in sorted((collection / INDEXES / IDS).glob("*.ids")):
        try:
            data = read_inside(path, store)
            whole = data[: len(_MARK)] == _MARK and crc32c(data[:-4]) == int.from_bytes(data[-4:], "little")
        except (GradstoreError, OSError):
            whole = False
        if not whole:
            damaged.append(path)
    return damaged


def _path(collection: Path, part: Part) -> Path:
    return collection / INDEXES / IDS / f"{part.file.removesuffix('.parquet')}-{part.crc32c:08x}.ids"
