"""Files of rows, read twice: first from start to end to check them, then single rows by their place.

A place is two integers, so an index of millions of rows stays small: byte offset and length in JSON Lines and in a JSON
list, row number (and 0) in Parquet. The first bytes of a file determine its format, not its name.
"""

import codecs
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradstore.errors import RequestError, first_line
from gradstore.keepable import parsed_line
from gradstore.parquet import plain_table

CHUNK_BYTES = 1 << 20
ROW_GROUP_CACHE_BYTES = 256 << 20
"""Size of the cache of decoded Parquet row groups: bounds memory if rows are read out of order."""


class Row(NamedTuple):
    where: str
    """File and row for messages, counted from 1: "rollouts.jsonl, line 3"."""
    place: int
    size: int
    value: Any


class RowFile:
    """A file of rows. Subclasses implement the scan and the fetch by place."""

    unit = "row"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = self._read_stamp()

    def scan(self) -> Iterator[Row]:
        """Yield every row in file order, with a bounded piece of the file in memory at a time."""
        raise NotImplementedError

    def fetch(self, places: Sequence[int], sizes: Sequence[int]) -> list[Any]:
        """The rows at these places."""
        raise NotImplementedError

    def close(self) -> None:
        """Close open files and drop caches; a later fetch opens them again."""

    def where(self, number: int) -> str:
        return f"{self.path}, {self.unit} {number}"

    def check_unchanged(self) -> None:
        """Raise RequestError if the file changed since the scan."""
        if self._read_stamp() != self._stamp:
            raise RequestError(f"{self.path}: the file changed while it was being read; read it again")

    def _read_stamp(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns


class JsonLines(RowFile):
    """One JSON object per line; blank lines are skipped."""

    unit = "line"
    _file: BinaryIO | None = None

    def scan(self) -> Iterator[Row]:
        place = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Row(self.where(number), place, len(line), parsed_line(line, self.where(number)))
                place += len(line)

    def fetch(self, places: Sequence[int], sizes: Sequence[int]) -> list[Any]:
        if self._file is None:
            self._file = self.path.open("rb")
        rows = []
        for place, size in zip(places, sizes, strict=True):
            self._file.seek(place)
            rows.append(parsed_line(self._file.read(size), f"{self.path}, byte {place}"))
        return rows

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class JsonList(JsonLines):
    """One JSON list of objects, parsed object by object."""

    unit = "entry"

    def scan(self) -> Iterator[Row]:
        decoder, to_text = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
        number, place, text, at, wanted = 0, 0, "", 0, CHUNK_BYTES
        with self.path.open("rb") as file:
            if file.read(3) == codecs.BOM_UTF8:
                place = 3
            file.seek(0)

            def more() -> bool:
                nonlocal text, at, place
                data = file.read(wanted)
                place += len(text[:at].encode())
                try:
                    text, at = text[at:] + to_text.decode(data, final=not data), 0
                except UnicodeDecodeError:
                    raise RequestError(f"{self.where(number + 1)}: not UTF-8 text") from None
                return bool(data)

            def next_mark() -> str:
                nonlocal at
                while True:
                    while at < len(text) and text[at] in " \t\r\n":
                        at += 1
                    if at < len(text):
                        return text[at]
                    if not more():
                        return ""

            next_mark()
            at += 1  # the opening bracket, by which the file was recognised as a list
            if next_mark() == "]":
                return
            while True:
                next_mark()
                number, wanted = number + 1, CHUNK_BYTES
                while True:
                    try:
                        value, end = decoder.raw_decode(text, at)
                        break
                    except json.JSONDecodeError as error:
                        if not more():
                            raise RequestError(f"{self.where(number)}: not valid JSON: {error.msg}") from None
                        wanted *= 2  # a long entry is parsed repeatedly: each try gets twice as much text
                    except (RecursionError, ValueError) as error:
                        raise RequestError(f"{self.where(number)}: not usable JSON: {first_line(error)}") from None
                start = place + len(text[:at].encode())
                yield Row(self.where(number), start, len(text[at:end].encode()), value)
                at = end
                mark = next_mark()
                at += 1
                if mark == "]":
                    break
                if mark != ",":
                    found = repr(mark) if mark else "the end of the file"
                    raise RequestError(f"{self.where(number)}: not valid JSON: expected ',' or ']', found {found}")
            if next_mark():
                raise RequestError(f"{self.path}: more text after the closing bracket of the list")


class Parquet(RowFile):
    """A Parquet file, read by row group, only the requested columns."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__(path)
        try:
            self._parquet = pq.ParquetFile(path)
        except pa.ArrowException as error:
            raise RequestError(f"{path}: not a readable Parquet file: {first_line(error)}") from None
        self._columns = [name for name in self._parquet.schema_arrow.names if name in columns]
        if not self._columns:
            found = ", ".join(self._parquet.schema_arrow.names)
            raise RequestError(f"{path}: none of a rollout's columns is there (found: {found})")
        metadata = self._parquet.metadata
        sizes = [metadata.row_group(j).num_rows for j in range(metadata.num_row_groups)]
        self._ends = np.cumsum(sizes)
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    def scan(self) -> Iterator[Row]:
        number = 0
        try:
            for batch in self._parquet.iter_batches(batch_size=1024, columns=self._columns):
                for value in _rows(plain_table(pa.Table.from_batches([batch]))):
                    yield Row(self.where(number + 1), number, 0, value)
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise RequestError(f"{self.where(number + 1)} or later: cannot be read: {first_line(error)}") from None

    def fetch(self, places: Sequence[int], sizes: Sequence[int]) -> list[Any]:
        rows: list[Any] = [None] * len(places)
        numbers = np.asarray(places)
        groups = np.searchsorted(self._ends, numbers, side="right")
        for group in np.unique(groups):
            mine = np.flatnonzero(groups == group)
            table = self._row_group(int(group))
            first = int(self._ends[group]) - table.num_rows
            taken = table.take(pa.array(numbers[mine] - first))
            for j, value in zip(mine, _rows(taken), strict=True):
                rows[j] = value
        return rows

    def close(self) -> None:
        self._cache.clear()

    def _row_group(self, group: int) -> pa.Table:
        if group not in self._cache:
            self._cache[group] = plain_table(self._parquet.read_row_group(group, columns=self._columns))
            while len(self._cache) > 1 and sum(t.nbytes for t in self._cache.values()) > ROW_GROUP_CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]


def files_at(path: Path) -> list[Path]:
    """The file itself, or the rollout files of a folder, sorted; RequestError without any."""
    if not path.exists():
        raise RequestError(f"{path}: no such file or folder, expected rollouts in JSON Lines, JSON or Parquet")
    if not path.is_dir():
        return [path]
    files = sorted(file for suffix in ("jsonl", "parquet") for file in path.glob(f"*.{suffix}"))
    if not files:
        raise RequestError(f"{path}: no .jsonl or .parquet file in this folder, expected rollouts")
    return files


def open_rows(path: Path, columns: Sequence[str]) -> RowFile:
    """Open a file of rows; its first bytes determine the format. columns: the columns to read of a Parquet file.

    Raises RequestError for an empty file and for one of another format.
    """
    with path.open("rb") as file:
        head = file.read(4)
        if head == b"PAR1":
            return Parquet(path, columns)
        file.seek(0)
        mark = b""
        for line in file:
            if mark := line.removeprefix(codecs.BOM_UTF8).strip()[:1]:
                break
    if not mark:
        raise RequestError(f"{path}: the file is empty, expected at least one rollout")
    if mark == b"[":
        return JsonList(path)
    if mark == b"{":
        return JsonLines(path)
    raise RequestError(f"{path}: neither JSON Lines, nor a JSON list, nor Parquet (starts with {head!r})")


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
