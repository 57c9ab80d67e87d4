"""Single pages of a problem part: a few rows are read without the other rows of their row group.

Parts are written in pages of the same rows in every column, with Parquet's page index (`paged`). The pages that hold
the wanted rows are put together in memory as a small Parquet file (`PageFile`), which Arrow reads with all its checks.
The index is believed only if it is regular: pages follow each other from the column's first byte to its last one, and
each holds equally many rows. Otherwise, as in a part by an older version, `column_pages` gives None and the caller
reads row groups.

In Parquet's encodings (parquet.thrift), a footer is a struct of numbered fields in Thrift's compact protocol.
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, BinaryIO

import numpy as np

from gradstore.parquet_headers import Chunk, RowGroup, pages, unsigned, version_and_schema

PAGE_ROWS = 256
"""Rows of a page: what is read to show one problem."""
_I32, _I64, _TEXT, _LIST, _STRUCT = 5, 6, 8, 9, 12
"""Types of Thrift's compact protocol."""
_PLAIN, _RLE = 0, 3
_MOST_INDEX_BYTES = 1 << 20


@cache
def paged() -> dict[str, Any]:
    """Options of pyarrow's writer for pages of PAGE_ROWS rows with an index; none where it cannot write such pages."""
    import inspect

    import pyarrow.parquet as pq

    if "max_rows_per_page" not in inspect.signature(pq.write_table).parameters:
        return {}
    return {
        "max_rows_per_page": PAGE_ROWS,
        "write_page_index": True,
        "data_page_size": 1 << 24,
        "use_dictionary": False,
    }


class ColumnPages:
    """The pages of one column in a row group, by their index: a list of (place, bytes, first row).

    Each number of the index is decoded when its page is asked for.
    """

    def __init__(self, chunk: Chunk, n_rows: int, index: bytes) -> None:
        """n_rows: of the group. index: an OffsetIndex. ValueError for one that is not regular."""
        self.chunk, self.n_rows = chunk, n_rows
        if len(index) < 3 or index[0] != _LIST | 1 << 4 or index[1] & 15 != _STRUCT:
            raise ValueError("no list of pages")
        self._n, at = index[1] >> 4, 2
        if self._n == 15:
            self._n, at = unsigned(index, at)
        self._index = index
        # A page has seven tokens: the heads of three fields, each before its number, and the end of the struct.
        ends = np.flatnonzero(np.frombuffer(index, np.uint8)[at:] < 128)[: 7 * self._n] + at
        if not self._n or len(ends) < 7 * self._n:
            raise ValueError("the list of pages is cut")
        self._begins = np.append(at, ends[:-1] + 1).reshape(self._n, 7)
        self.rows = self._page(1)[2] if self._n > 1 else n_rows
        """Rows of a page; the last one may have fewer."""
        if self.rows < 1 or -(-n_rows // self.rows) != self._n or self._page(0)[0] != chunk.start:
            raise ValueError("pages of different numbers of rows")

    def span(self, number: int) -> tuple[int, int]:
        """Where a page begins and ends in the file; ValueError if its neighbours say otherwise."""
        start, size, first_row = self._page(number)
        next_start, next_row = self.chunk.start + self.chunk.size, self._n * self.rows
        if number + 1 < self._n:
            next_start, _, next_row = self._page(number + 1)
        if (first_row, next_row) != (number * self.rows, (number + 1) * self.rows) or start + size != next_start:
            raise ValueError("pages of different numbers of rows")
        return start, next_start

    def _page(self, number: int) -> tuple[int, int, int]:
        begins = self._begins[number].tolist()
        if [self._index[begins[token]] for token in (0, 2, 4, 6)] != [_I64 | 1 << 4, _I32 | 1 << 4, _I64 | 1 << 4, 0]:
            raise ValueError("no list of pages")
        start, size, first_row = (unsigned(self._index, begins[token])[0] >> 1 for token in (1, 3, 5))
        return start, size, first_row


def column_pages(file: BinaryIO, group: RowGroup, chunk: Chunk) -> ColumnPages | None:
    """Pages of a column by its index; None without an index, or for one that is not regular."""
    place, length = chunk.index
    if not 0 < length <= _MOST_INDEX_BYTES or place <= 0:
        return None
    file.seek(place)
    try:
        return ColumnPages(chunk, group.rows, file.read(length))
    except (ValueError, IndexError):
        return None


class PageFile:
    """Some pages as a Parquet file in memory, with all columns of a part; only those with pages are to be read."""

    def __init__(self, like: BinaryIO, chunks: Sequence[Chunk]) -> None:
        """like: a part; its columns are those of this file. chunks: those of any of its row groups."""
        self._version_and_schema, self._like = version_and_schema(like), chunks
        self._pages: dict[tuple[str, ...], list[bytes]] = {chunk.path: [] for chunk in chunks}
        self.rows = 0
        """Rows of the pages so far."""

    def add(self, file: BinaryIO, columns: Sequence[ColumnPages], rows: np.ndarray) -> np.ndarray:
        """Add the pages of one row group that hold some of its rows; returns the rows' places in this file, int64.

        columns: those that will be read, with equally many rows in a page. ValueError for pages that are not regular.
        """
        page_of, within = np.divmod(rows, columns[0].rows)
        needed = np.unique(page_of)
        rows_in = np.minimum(columns[0].rows, columns[0].n_rows - needed * columns[0].rows)
        before = self.rows + np.cumsum(rows_in) - rows_in
        for column in columns:
            for number in needed.tolist():
                start, stop = column.span(number)
                file.seek(start)
                self._pages[column.chunk.path].append(file.read(stop - start))
        self.rows += int(rows_in.sum())
        places: np.ndarray = before[np.searchsorted(needed, page_of)] + within
        return places

    def made(self) -> tuple[BinaryIO, RowGroup]:
        """The file and its only row group; ValueError for a damaged header of a page."""
        body, chunks, columns = bytearray(b"PAR1"), [], []
        for like in self._like:
            own = b"".join(self._pages[like.path])
            chunks.append(replace(like, start=len(body), size=len(own)))
            body += own
            values = self.rows
            if len(like.path) > 1:  # of lists
                values = sum(
                    page.values for page in pages(io.BytesIO(own), replace(like, start=0, size=len(own)), 1 << 20)
                )
            columns.append(_column(chunks[-1], values))
        group = _struct(
            (1, _LIST, _list(_STRUCT, columns)), (2, _I64, _number(len(body))), (3, _I64, _number(self.rows))
        )
        more = [(3, _I64, _number(self.rows)), (4, _LIST, _list(_STRUCT, [group]))]
        footer = self._version_and_schema + _struct(*more, after=2)
        body += footer + len(footer).to_bytes(4, "little") + b"PAR1"
        return io.BytesIO(bytes(body)), RowGroup(self.rows, chunks)


def _column(chunk: Chunk, values: int) -> bytes:
    """A ColumnChunk struct; values: of all its pages."""
    metadata = _struct(
        (1, _I32, _number(chunk.kind)),
        (2, _LIST, _list(_I32, [_number(encoding) for encoding in (_PLAIN, _RLE)])),
        (3, _LIST, _list(_TEXT, [_unsigned(len(name.encode())) + name.encode() for name in chunk.path])),
        (4, _I32, _number(chunk.codec)),
        (5, _I64, _number(values)),
        (6, _I64, _number(chunk.size)),  # without compression; nothing depends on it
        (7, _I64, _number(chunk.size)),
        (9, _I64, _number(chunk.start)),
    )
    return _struct((2, _I64, _number(chunk.start)), (3, _STRUCT, metadata))


def _struct(*fields: tuple[int, int, bytes], after: int = 0) -> bytes:
    """A struct, or its rest after a field; fields: (number, type, value), ascending."""
    written = bytearray()
    for number, kind, value in fields:
        written += bytes([(number - after) << 4 | kind]) + value
        after = number
    return bytes(written) + b"\x00"


def _list(kind: int, values: Sequence[bytes]) -> bytes:
    return bytes([0xF0 | kind]) + _unsigned(len(values)) + b"".join(values)


def _number(value: int) -> bytes:
    """A number that is not negative, as a signed one."""
    return _unsigned(value << 1)


def _unsigned(value: int) -> bytes:
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes([*written, value])
