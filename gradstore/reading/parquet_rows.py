"""Rows of Parquet files, read by row group and batch, only the requested columns.

`parquet_sizes` bounds what the file expands to; batches have so few rows that they stay small.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradstore.errors import GradstoreError, RequestError, first_line
from gradstore.parquet import plain_table
from gradstore.reading.files import Row, RowFile
from gradstore.reading.parquet_sizes import MOST_BYTES, MOST_RATIO, checked_sizes

CACHE_BYTES = 256 << 20
"""Size of the cache of decoded row groups: bounds memory if rows are read out of order."""
_FEW = 8
"""Up to this number of expected columns, an error names them."""
_FAULTS = (
    pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RecursionError
)  # fmt: skip


class ParquetRows(RowFile):
    """A Parquet file."""

    def __init__(self, path: Path, columns: Sequence[str] | None = None, what: str = "record") -> None:
        super().__init__(path)
        sizes = checked_sizes(path)
        with self._reading("not a readable Parquet file"):
            self._parquet = pq.ParquetFile(path)
            self.names = self._parquet.schema_arrow.names
        self._check_names()
        self._columns = [name for name in self.names if columns is None or name in columns]
        if not self._columns:
            few = f"; expected {', '.join(columns)}" if columns is not None and len(columns) <= _FEW else ""
            raise RequestError(f"{path}: none of a {what}'s columns is there (found: {', '.join(self.names)}{few})")
        self._ends, self._batch_rows = np.cumsum(sizes.rows, dtype=np.int64), sizes.batch_rows
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
