"""Footer and page headers of a Parquet file, read without pyarrow.

A footer repeats what its pages hold, but nothing makes it tell the truth, and Arrow takes the memory that a page asks
for. So readers bound a file by the headers of its pages. pyarrow gives no sizes of pages, and its method
`RowGroupMetaData.column` aborts the process for a broken statistic in the footer (seen with pyarrow 26). Footer and
headers are structs of numbered fields in Thrift's compact protocol; the numbers are Parquet's (parquet.thrift).
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

BYTE_ARRAY = 6
"""Physical type of texts and bytes."""
DICTIONARY_PAGE = 2
_WIDTHS = {0: 1, 1: 4, 2: 8, 3: 12, 4: 4, 5: 8}
"""Bytes of a value in memory, by physical type; a text has at least an offset."""
_FOOTER_BYTES, _HEADER_BYTES, _USUAL_HEADER_BYTES = 32 << 20, 1 << 16, 256
_DEEPEST = 32
_LIST = 9
_FAULTS = (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError, struct.error)
"""What parsing of damaged bytes raises."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A column's part of a row group."""

    path: tuple[str, ...]
    """Name of the column, then of its parts where it is nested."""
    kind: int
    """Physical type, by its number."""
    size: int
    """Bytes in the file."""
    start: int
    """Place of its first page."""
    codec: int = 0
    """Number of its compression; 0: none."""
    index: tuple[int, int] = (0, 0)
    """Place and bytes of its offset index, which lists its pages; (0, 0) without one."""

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def width(self) -> int:
        """Least bytes of a value in memory."""
        return _WIDTHS.get(self.kind, 4)


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows of a Parquet file that are stored together."""

    rows: int
    chunks: list[Chunk]


class Page(NamedTuple):
    """Header of a page."""

    kind: int
    size: int
    """Bytes without compression."""
    values: int


def row_groups(file: BinaryIO) -> list[RowGroup]:
    """The row groups that the footer states; ValueError for a damaged footer."""
    footer = _footer(file)
    with _damaged("its footer is damaged"):
        groups = _struct(footer, 0, _DEEPEST)[0].get(4, [])
        return [RowGroup(group[3] + 0, [_chunk(part) for part in group[1]]) for group in groups]


def version_and_schema(file: BinaryIO) -> bytes:
    """The bytes of the footer that tell version and schema: its first two fields. ValueError for a damaged footer."""
    footer = _footer(file)
    with _damaged("its footer is damaged"):
        return footer[: _value(footer, _integer(footer, 1)[1] + 1, _LIST, _DEEPEST)[1]]


def _footer(file: BinaryIO) -> bytes:
    size = file.seek(0, 2)
    file.seek(max(size - 8, 0))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or not 0 < length <= min(size - 8, _FOOTER_BYTES):
        raise ValueError("its footer is damaged")
    file.seek(size - 8 - length)
    return file.read(length)


def pages(file: BinaryIO, chunk: Chunk, most: int) -> Iterator[Page]:
    """Headers of a column chunk's pages; ValueError for what is no page, and for more than `most` pages."""
    at, stop = chunk.start, chunk.start + chunk.size
    for _ in range(most):
        if at >= stop:
            return
        header, length = _header(file, at, stop - at)
        with _damaged("the header of a page is damaged"):
            about = header.get(5) or header.get(7) or header.get(8) or {}
            page = Page(header[1] + 0, header[2] + 0, about.get(1, 0) + 0)
            compressed = header[3] + 0
        if min(page.size, page.values, compressed) < 0:
            raise ValueError("the header of a page has a negative size")
        yield page
        at += length + compressed
    raise ValueError(f"column {chunk.name[:80]!r} has more than {most} pages")


def _header(file: BinaryIO, at: int, most: int) -> tuple[dict[int, Any], int]:
    """The header of the page at a place, and its length: most are short, one with statistics may hold long texts."""
    for size in (_USUAL_HEADER_BYTES, _HEADER_BYTES):
        file.seek(at)
        with suppress(*_FAULTS):
            return _struct(file.read(min(size, most)), 0, _DEEPEST)
    raise ValueError("the header of a page is damaged")


def _chunk(column: dict[int, Any]) -> Chunk:
    fields = column[3]
    path = tuple(part.decode(errors="replace") for part in fields[3])
    starts = [start for start in (fields[9], fields.get(11)) if isinstance(start, int) and start > 0]
    if fields[7] < 0:
        raise ValueError("negative size")
    index = column.get(4, 0) + 0, column.get(5, 0) + 0
    return Chunk(path, fields[1] + 0, fields[7], min(starts, default=4), fields[4] + 0, index)


@contextmanager
def _damaged(message: str) -> Iterator[None]:
    """_FAULTS as a ValueError."""
    try:
        yield
    except _FAULTS:
        raise ValueError(message) from None


def _struct(data: bytes, at: int, levels: int) -> tuple[dict[int, Any], int]:
    """Fields of a struct by number, and the place after it."""
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        kind, step = head & 15, head >> 4
        at += 1
        if step:
            number += step
        else:
            number, at = _integer(data, at)
        byte = data[at]
        if 4 <= kind <= 6 and byte < 128:  # As `_value` would; most fields are small numbers.
            fields[number], at = byte >> 1 ^ -(byte & 1), at + 1
        else:
            fields[number], at = _value(data, at, kind, levels)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, levels: int) -> tuple[Any, int]:
    if not levels:
        raise ValueError("nested too deeply")
    if 4 <= kind <= 6:
        return _integer(data, at)
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind == 7:
        return struct.unpack_from("<d", data, at)[0], at + 8
    if kind == 8:
        length, at = unsigned(data, at)
        if length > len(data) - at:
            raise ValueError("cut off")
        return data[at : at + length], at + length
    if kind in (_LIST, 10):
        return _list(data, at, levels)
    if kind == 12:
        return _struct(data, at, levels - 1)
    raise ValueError(f"type {kind}")


def _list(data: bytes, at: int, levels: int) -> tuple[list[Any], int]:
    length, kind = data[at] >> 4, data[at] & 15
    at += 1
    if length == 15:
        length, at = unsigned(data, at)
    if length > len(data) - at:
        raise ValueError("cut off")
    parts = []
    for _ in range(length):
        part, at = (data[at] == 1, at + 1) if kind in (1, 2) else _value(data, at, kind, levels - 1)
        parts.append(part)
    return parts, at


def _integer(data: bytes, at: int) -> tuple[int, int]:
    number, at = unsigned(data, at)
    return number >> 1 ^ -(number & 1), at


def unsigned(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first."""
    if data[at] < 128:
        return data[at], at + 1
    number = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
    raise ValueError("a number of too many bytes")
