"""Rows of Parquet files, read by row group and batch, only the requested columns.

Some bytes of Parquet can stand for gigabytes: a constant, a compressed run of zeros, a long text in a dictionary. The
footer and the dictionaries' sizes bound what a column expands to; batches have so few rows that they stay small.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradstore.errors import GradstoreError, RequestError, first_line
from gradstore.keepable import MAX_DEPTH, MAX_ROW_BYTES
from gradstore.parquet import plain_table
from gradstore.reading.files import Row, RowFile, open_regular

CACHE_BYTES = 256 << 20
"""Size of the cache of decoded row groups: bounds memory if rows are read out of order."""
BATCH_ROWS, BATCH_BYTES = 1024, 128 << 20
MOST_BYTES, MOST_RATIO = 256 << 20, 100
"""A column of a row group may expand to this many bytes, or to this multiple of its size in the file."""
MOST_VALUES = 1 << 17
"""Most values in a row on average, such as the tokens of a response."""
_FAULTS = (
    pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RecursionError
)  # fmt: skip


class ParquetRows(RowFile):
    """A Parquet file."""

    def __init__(self, path: Path, columns: Sequence[str] | None = None, what: str = "record") -> None:
        super().__init__(path)
        open_regular(path).close()
        with self._reading("not a readable Parquet file"):
            metadata = pq.read_metadata(path)
            self._check_sizes(metadata)
            self._batch_rows = self._check_dictionaries(metadata)
            self._parquet = pq.ParquetFile(path, metadata=metadata)
            self.names = self._parquet.schema_arrow.names
        self._check_names()
        self._columns = [name for name in self.names if columns is None or name in columns]
        if not self._columns:
            raise RequestError(f"{path}: none of a {what}'s columns is there (found: {', '.join(self.names)})")
        sizes = [metadata.row_group(j).num_rows for j in range(metadata.num_row_groups)]
        self._ends = np.cumsum(sizes)
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    def scan(self) -> Iterator[Row]:
        number = 0
        for table in self._batches():
            with self._reading(f"row {number + 1} or later: cannot be read"):
                values = list(_rows(table))
            for value in values:
                yield Row(self.where(number + 1), number, 0, value)
                number += 1

    def fetch(self, places: Sequence[int], sizes: Sequence[int]) -> list[Any]:
        rows: list[Any] = [None] * len(places)
        numbers = np.asarray(places)
        groups = np.searchsorted(self._ends, numbers, side="right")
        for group in np.unique(groups):
            mine = np.flatnonzero(groups == group)
            with self._reading("cannot be read"):
                table = self._row_group(int(group))
                first = int(self._ends[group]) - table.num_rows
                taken = table.take(pa.array(numbers[mine] - first))
                for j, value in zip(mine, _rows(taken), strict=True):
                    rows[j] = value
        return rows

    def table(self) -> pa.Table:
        """The whole file, with plain types."""
        tables = list(self._batches())
        with self._reading("cannot be read"):
            return pa.concat_tables(tables) if tables else plain_table(self._parquet.read(columns=self._columns))

    def close(self) -> None:
        self._cache.clear()

    def _batches(self) -> Iterator[pa.Table]:
        """The rows in order, with plain types; a row group may not expand beyond all measure."""
        number = 0
        for group in range(len(self._ends)):
            expanded, batches = 0, None
            while True:
                with self._reading(f"row {number + 1} or later: cannot be read"):
                    batches = batches or self._parquet.iter_batches(self._batch_rows, [group], self._columns)
                    batch = next(batches, None)
                    if batch is None:
                        break
                    batch.validate(full=True)  # such as texts that are not UTF-8
                    table = plain_table(pa.Table.from_batches([batch]))
                expanded += table.nbytes
                if expanded > max(2 * MOST_BYTES, MOST_RATIO * self._stamp[0]):
                    raise RequestError(
                        f"{self.path}, row {number + 1} or later: {expanded >> 20} MiB, too much for a file of "
                        f"{self._stamp[0]:,} bytes"
                    )
                number += table.num_rows
                yield table
            if number != self._ends[group]:
                raise RequestError(f"{self.path}: {number} rows instead of {self._ends[group]}")

    def _row_group(self, group: int) -> pa.Table:
        if group not in self._cache:
            self._cache[group] = plain_table(self._parquet.read_row_group(group, columns=self._columns))
            while len(self._cache) > 1 and sum(t.nbytes for t in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]

    def _check_sizes(self, metadata: pq.FileMetaData) -> None:
        """RequestError for a footer that promises more than a file of this size holds."""
        if metadata.num_rows > max(1 << 20, 4 * self._stamp[0]):
            raise RequestError(f"{self.path}: claims {metadata.num_rows:,} rows in {self._stamp[0]:,} bytes")
        for j in range(metadata.num_columns):
            column = metadata.schema.column(j)
            if column.path.count(".") > 2 * MAX_DEPTH:
                raise RequestError(f"{self.path}: a column is nested more than {MAX_DEPTH} levels deep")
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for chunk in map(group.column, range(group.num_columns)):
                width = max(_WIDTHS.get(chunk.physical_type, 4), 1)
                size = max(chunk.total_uncompressed_size, chunk.num_values * width)
                most = max(MOST_BYTES, MOST_RATIO * max(chunk.total_compressed_size, 0))
                each = size / max(group.num_rows, 1)
                if size > most or each > max(MAX_ROW_BYTES, MOST_VALUES * width):
                    raise RequestError(
                        f"{self.path}: column {chunk.path_in_schema!r} expands to {size >> 20} MiB in "
                        f"{group.num_rows} rows from {chunk.total_compressed_size:,} bytes, more than rows of this kind "
                        "hold; leave the column out, or write the file again with more row groups"
                    )

    def _check_dictionaries(self, metadata: pq.FileMetaData) -> int:
        """Rows of a batch, so few that each could repeat the longest text of a dictionary in each of its values."""
        longest, bytes_of_rows = 1.0, 0
        with open_regular(self.path) as file:
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                bytes_of_rows += group.total_byte_size
                for chunk in map(group.column, range(group.num_columns)):
                    is_dictionary, size = _first_page(file, chunk)
                    if size > MOST_BYTES:
                        raise RequestError(f"{self.path}: column {chunk.path_in_schema!r} has a page of {size:,} bytes")
                    if is_dictionary and chunk.physical_type == "BYTE_ARRAY":
                        longest = max(longest, size * max(1.0, chunk.num_values / max(group.num_rows, 1)))
        if longest > 16 * MOST_BYTES:
            raise RequestError(f"{self.path}: rows of up to {int(longest) >> 20} MiB, more than a row of this kind holds")
        mean = max(bytes_of_rows / max(metadata.num_rows, 1), 1)
        return int(min(max(BATCH_BYTES / max(longest, mean), 1), BATCH_ROWS))

    def _check_names(self) -> None:
        twice = [name for name in self.names if self.names.count(name) > 1]
        if twice:
            raise RequestError(f"{self.path}: column {twice[0]!r} occurs twice")

    @contextmanager
    def _reading(self, doing: str) -> Iterator[None]:
        """Convert what pyarrow raises for a broken file to a RequestError that names the file."""
        try:
            yield
        except GradstoreError:
            raise
        except _FAULTS as error:
            comma = "," if doing.startswith("row") else ":"
            raise RequestError(f"{self.path}{comma} {doing}: {first_line(error)}") from None


_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
"""Bytes of a value in memory, by physical type; a text has at least an offset."""
_DICTIONARY_PAGE = 2
"""Number of the page type in Parquet's definition."""


def _first_page(file: BinaryIO, chunk: pq.ColumnChunkMetaData) -> tuple[bool, int]:
    """Whether a column's first page is a dictionary, and the size it is decompressed to, from the page's header.

    Headers are in Thrift's compact protocol: after a byte for each field, numbers of 7 bits a byte, zigzag.
    """
    starts = [chunk.data_page_offset, chunk.dictionary_page_offset or 0]
    file.seek(max(min(start for start in starts if start > 0), 0) if any(start > 0 for start in starts) else 0)
    head, at, fields = file.read(32), 0, []
    for _ in range(2):
        if head[at : at + 1] != b"\x15":
            return False, 0  # no header of a page: pyarrow says what is wrong
        number = shift = 0
        at += 1
        while at < len(head):
            number |= (head[at] & 0x7F) << shift
            shift += 7
            at += 1
            if head[at - 1] < 0x80:
                break
        fields.append(number >> 1 ^ -(number & 1))
    return fields[0] == _DICTIONARY_PAGE, fields[1]


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    names = table.schema.names
    for batch in table.combine_chunks().to_batches():
        columns = [_values(batch.column(j)) for j in range(batch.num_columns)]
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))


def _values(column: pa.Array) -> Sequence[Any]:
    """A column's values as Python objects; lists of numbers become numpy slices, without a copy."""
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if is_list and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)):
        flat = column.flatten()  # omits null lists, whatever their offsets are
        if not flat.null_count:
            numbers = flat.to_numpy()
            ends = np.cumsum(np.nan_to_num(column.value_lengths().to_numpy(zero_copy_only=False))).astype(np.int64)
            starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
            valid = column.is_valid().to_pylist()
            return [numbers[a:b] if ok else None for a, b, ok in zip(starts, ends, valid, strict=True)]
    return column.to_pylist()
