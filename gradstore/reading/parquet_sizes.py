"""Sizes that a Parquet file states about itself, read without pyarrow, which a broken statistic in the footer aborts.

The footer and the headers of pages are in Thrift's compact protocol: structs of numbered fields. `numbers_of` names the
fields read here, by their numbers in Parquet's definition. A reader allocates what these headers state, so they bound
what a file can expand to: some bytes can stand for gigabytes as a constant, a run of zeros or a text of a dictionary.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gradstore.errors import RequestError
from gradstore.keepable import MAX_DEPTH, MAX_ROW_BYTES
from gradstore.reading.files import open_regular

BATCH_ROWS, BATCH_BYTES = 1024, 128 << 20
MOST_BYTES, MOST_RATIO = 256 << 20, 100
"""A column of a row group may expand to this many bytes, or to this multiple of its size in the file."""
MOST_VALUES = 1 << 17
"""Most values in a row on average, such as the tokens of a response."""
_FOOTER_BYTES, _HEADER_BYTES = 32 << 20, 1 << 16
_WIDTHS = {0: 1, 1: 4, 2: 8, 3: 12, 4: 4, 5: 8}
"""Bytes of a value in memory, by Parquet's number of the physical type; a text has at least an offset."""
_BYTE_ARRAY, _DICTIONARY_PAGE = 6, 2


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is known of a file before it is read."""

    rows: list[int]
    """Rows of each row group."""
    batch_rows: int
    """So few rows that they fit into BATCH_BYTES, also if each repeats the longest text of a dictionary."""


def checked_sizes(path: Path) -> Sizes:
    """The sizes of a Parquet file; RequestError for a file that expands beyond all measure when it is read."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            groups = [_Group.of(group) for group in _footer(file, size).get(4, [])]
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError, struct.error):
            raise RequestError(f"{path}: not a readable Parquet file: its footer is damaged") from None
        rows = [group.rows for group in groups]
        if min(rows, default=0) < 0 or sum(rows) > max(1 << 20, 4 * size):
            raise RequestError(f"{path}: not a readable Parquet file: claims {sum(rows):,} rows in {size:,} bytes")
        longest = max((_longest_row(path, file, size, group) for group in groups), default=1.0)
    return Sizes(rows, int(min(max(BATCH_BYTES / max(longest, 1.0), 1), BATCH_ROWS)))


@dataclass(frozen=True, slots=True)
class _Group:
    """A row group: its rows, and its column chunks by Parquet's field numbers."""

    rows: int
    chunks: list[dict[int, Any]]

    @classmethod
    def of(cls, fields: dict[int, Any]) -> "_Group":
        chunks = [chunk[3] for chunk in fields[1]]
        for chunk in chunks:
            _ = [chunk[number] + 0 for number in (1, 6, 7, 9)], b".".join(chunk[3])
        return cls(fields[3] + 0, chunks)


def _longest_row(path: Path, file: BinaryIO, size: int, group: _Group) -> float:
    """Bytes of a row as far as they can be bounded: on average, with each text as long as a dictionary's longest."""
    total = 0.0
    for chunk in group.chunks:
        name = b".".join(chunk[3]).decode(errors="replace")
        if len(chunk[3]) > 2 * MAX_DEPTH:
            raise RequestError(f"{path}: column {name[:40]!r} is nested more than {MAX_DEPTH} levels deep")
        values = expanded = dictionary = 0
        for page, (kind, uncompressed, n_values) in enumerate(_pages(file, chunk)):
            if uncompressed > MOST_BYTES or page > 1000 + size // 512:
                raise RequestError(
                    f"{path}: column {name!r} has a page of {uncompressed:,} bytes, or too many pages; write the file "
                    "with pages of usual size (1 MB)"
                )
            dictionary = max(dictionary, uncompressed if kind == _DICTIONARY_PAGE else 0)
            values += 0 if kind == _DICTIONARY_PAGE else n_values
            expanded += uncompressed
        width = _WIDTHS.get(chunk[1], 4)
        expanded = max(expanded, values * width)
        rows = max(group.rows, 1)
        too_large = expanded > max(MOST_BYTES, MOST_RATIO * chunk[7]) or expanded / rows > MAX_ROW_BYTES
        if too_large or values / rows > MOST_VALUES:
            raise RequestError(
                f"{path}: column {name!r} expands to {expanded >> 20} MiB and {values:,} values in {group.rows:,} rows "
                f"from {chunk[7]:,} bytes; leave the column out, or write the file in a usual way"
            )
        repeated = dictionary * max(1.0, values / rows) if chunk[1] == _BYTE_ARRAY else 0.0
        if repeated > 16 * MOST_BYTES:
            raise RequestError(
                f"{path}: column {name!r} may have rows of {int(repeated) >> 20} MiB; write it without a dictionary"
            )
        total = max(total, repeated) + expanded / rows
    return total


def _footer(file: BinaryIO, size: int) -> dict[int, Any]:
    file.seek(max(size - 8, 0))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or not 0 < length <= min(size - 8, _FOOTER_BYTES):
        raise ValueError("no footer")
    file.seek(size - 8 - length)
    return _struct(file.read(length), 0)[0]


def _pages(file: BinaryIO, chunk: dict[int, Any]) -> Iterator[tuple[int, int, int]]:
    """(type, decompressed size, values) of each page of a column chunk, as far as its headers can be read."""
    starts = [start for start in (chunk[9], chunk.get(11)) if isinstance(start, int) and start > 0]
    at = min(starts, default=4)
    end = at + chunk[7]
    while at < end:
        file.seek(at)
        try:
            header, length = _struct(file.read(_HEADER_BYTES), 0)
            kind, uncompressed, compressed = header[1] + 0, header[2] + 0, header[3] + 0
            about = header.get(5) or header.get(8) or header.get(7) or {}
            n_values = about.get(1, 0) + 0
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError, struct.error):
            return  # pyarrow says what is wrong with it
        if compressed < 0:
            return
        yield kind, uncompressed, n_values
        at += length + compressed


def _struct(data: bytes, at: int, levels: int = 32) -> tuple[dict[int, Any], int]:
    """Fields of a struct by number, and the place after it."""
    fields: dict[int, Any] = {}
    number = 0
    while data[at]:
        kind, step = data[at] & 15, data[at] >> 4
        at += 1
        if step:
            number += step
        else:
            number, at = _integer(data, at)
        fields[number], at = _value(data, at, kind, levels)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, levels: int) -> tuple[Any, int]:
    if not levels:
        raise ValueError("nested too deeply")
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        return _integer(data, at)
    if kind == 7:
        return struct.unpack_from("<d", data, at)[0], at + 8
    if kind == 8:
        length, at = _unsigned(data, at)
        if length > len(data) - at:
            raise ValueError("cut off")
        return data[at : at + length], at + length
    if kind in (9, 10):
        length, kind = data[at] >> 4, data[at] & 15
        at += 1
        if length == 15:
            length, at = _unsigned(data, at)
        if length > len(data) - at:
            raise ValueError("cut off")
        parts = []
        for _ in range(length):
            part, at = (data[at] == 1, at + 1) if kind in (1, 2) else _value(data, at, kind, levels - 1)
            parts.append(part)
        return parts, at
    if kind == 12:
        return _struct(data, at, levels - 1)
    raise ValueError(f"type {kind}")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    number, at = _unsigned(data, at)
    return number >> 1 ^ -(number & 1), at


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first."""
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of too many bytes")
