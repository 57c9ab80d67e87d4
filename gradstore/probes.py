"""Probes kept beside the rows: each rollout's derivative along a target, with its reward.

Parquet parts in the collection's folder `probes/`, one for each addition, never changed: `part-NNNNNN-XXXXXXXX.parquet`
with the part's number, counted from 0, and the CRC-32C of its bytes. A part is there when it has its name, so nothing
else has to be published; a number that is missing before the last one, or bytes that do not give the name, are damage.
The folder belongs to no generation: compaction leaves it as it is.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradstore.durable import canonical_json, crc32c, make_folder, reading, replace_file
from gradstore.errors import DamagedError, RequestError
from gradstore.layout import PROBES

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("target_commit", pa.int64(), nullable=False),
        pa.field("objective", pa.string(), nullable=False),
        pa.field("derivatives", pa.list_(pa.float32()), nullable=False),
        pa.field("rewards", pa.list_(pa.float32()), nullable=False),
        pa.field("lengths", pa.list_(pa.int32()), nullable=False),
    ]
)
"""One row a problem and addition; docs/format.md says what each column means."""

_PART = re.compile(r"part-([0-9]{6,})-([0-9a-f]{8})\.parquet")


def to_table(
    ids: Sequence[str],
    derivatives: Sequence[np.ndarray],
    rewards: Sequence[np.ndarray],
    lengths: Sequence[np.ndarray],
    *,
    step: int,
    target: str,
    target_commit: int,
    objective: dict[str, Any],
    where: str,
) -> pa.Table:
    """The rows of an addition; RequestError, naming the problem, where counts differ or a reward is not finite."""
    counts = {"derivatives": len(derivatives), "rewards": len(rewards), "lengths": len(lengths)}
    for name, count in counts.items():
        if count != len(ids):
            raise RequestError(f"{where}: {len(ids)} ids but {name} of {count} problems")
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if list(ids).count(name) > 1)
        raise RequestError(f"{where}: problem id {twice!r} occurs more than once; keep one")
    for name, d_G, r_G, T_G in zip(ids, derivatives, rewards, lengths, strict=True):
        if not len(d_G) == len(r_G) == len(T_G):
            raise RequestError(
                f"{where}, problem {name!r}: {len(d_G)} derivatives, {len(r_G)} rewards and {len(T_G)} lengths; "
                "give one of each for every rollout"
            )
        if not np.isfinite(r_G).all():
            raise RequestError(f"{where}, problem {name!r}: a reward is not finite")
    n = len(ids)
    columns = [
        list(ids),
        [step] * n,
        [target] * n,
        [target_commit] * n,
        [canonical_json(objective).decode()] * n,
        [np.asarray(d_G, np.float32) for d_G in derivatives],
        [np.asarray(r_G, np.float32) for r_G in rewards],
        [np.asarray(T_G, np.int32) for T_G in lengths],
    ]
    return pa.table(columns, schema=SCHEMA)


def add_part(collection: Path, table: pa.Table) -> None:
    """Write the next part, durably; the caller holds the collection's lock."""
    folder = collection / PROBES
    make_folder(folder)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue()
    number = max((number for number, _, _ in _parts(folder)), default=-1) + 1
    replace_file(folder / f"part-{number:06d}-{crc32c(data):08x}.parquet", data)


def read_parts(collection: Path) -> pa.Table:
    """All rows, in order of addition; DamagedError for a part that is not as it was written or is missing."""
    tables = []
    for path, data, fault in check_parts(collection):
        if fault:
            raise DamagedError(f"{path}: damaged: {fault}; `gradstore verify` lists all damage")
        tables.append(pq.read_table(io.BytesIO(data)))
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def check_parts(collection: Path) -> list[tuple[Path, bytes, str]]:
    """(file, bytes, what is wrong with it or nothing) of every part, the missing ones too, in order."""
    folder = collection / PROBES
    found = {number: (crc, path) for number, crc, path in _parts(folder)}
    checked = []
    for number in range(max(found, default=-1) + 1):
        if number not in found:
            checked.append((folder / f"part-{number:06d}", b"", "missing"))
            continue
        crc, path = found[number]
        with reading(path):
            data = path.read_bytes()
        fault = "" if crc32c(data) == crc else f"bytes do not match the checksum in the name ({len(data)} bytes)"
        checked.append((path, data, fault))
    return checked


def strangers(collection: Path) -> list[Path]:
    """What lies in the folder and is no part."""
    folder = collection / PROBES
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not _PART.fullmatch(path.name))


def _parts(folder: Path) -> list[tuple[int, int, Path]]:
    """(number, checksum, file) of each part."""
    if not folder.is_dir():
        return []
    matches = ((_PART.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), int(match[2], 16), path) for match, path in matches if match)
