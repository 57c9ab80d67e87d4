"""Reading Parquet files of a store within limits.

A file of some kilobytes can stand for many gigabytes: pages compress, runs repeat, and a dictionary holds a long text
once for a million rows. So the sizes in the headers of its pages are checked first (the footer may lie). Then rows are
read in batches small enough that even the longest text in each of them fits in memory, and reading stops when the
columns have become too large.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gradstore.errors import DamagedError, first_line
from gradstore.parquet import no_rows
from gradstore.parquet_headers import RowGroup, pages, row_groups

if TYPE_CHECKING:
    import pyarrow as pa

EXPANSION, ALLOWANCE = 256, 64 << 20
"""Most bytes of columns in memory: EXPANSION times the file's, and ALLOWANCE more."""
_BATCH = 512 << 20
"""Most bytes of one batch, if every text in it is as long as the largest page allows."""
_MOST_PAGES = 100_000
"""Of one column and row group."""


def read_stored(
    file: BinaryIO,
    path: Path,
    schema: "pa.Schema",
    *,
    columns: list[str] | None = None,
    rows: int | None = None,
    groups: Sequence[int] | None = None,
    footer: list[RowGroup] | None = None,
) -> "pa.Table":
    """Read columns (None: all) of an open Parquet file, in the types of `schema`; checks every read page's checksum.

    rows: number of rows the file must have. groups: row groups to read, ascending; None: all. footer: that of this
    file, as `read_footer` gives it, to save reading it again. DamagedError names the path for other columns, types or
    counts, for nulls where the schema has none, for text that is not UTF-8, and for more bytes than a file of its size
    may have.
    """
    import pyarrow as pa

    try:
        return _read(file, schema, columns, rows, groups, row_groups(file) if footer is None else footer)
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
        raise DamagedError(f"{path}: damaged: {first_line(error)}; see `gradstore verify`") from error


def read_footer(file: BinaryIO, path: Path, rows: int) -> list[RowGroup]:
    """The row groups of a file that must have so many rows; DamagedError for other numbers and a damaged footer."""
    try:
        groups = row_groups(file)
        if min((group.rows for group in groups), default=0) < 0 or sum(group.rows for group in groups) != rows:
            raise ValueError(f"its row groups do not have {rows} rows together")
    except ValueError as error:
        raise DamagedError(f"{path}: damaged: {first_line(error)}; see `gradstore verify`") from error
    return groups


def within(nbytes: int, size: int) -> bool:
    """Whether columns of so many bytes may come from a file of this size."""
    return nbytes <= EXPANSION * size + ALLOWANCE


def _read(
    file: BinaryIO,
    schema: "pa.Schema",
    columns: list[str] | None,
    rows: int | None,
    groups: Sequence[int] | None,
    footer: list[RowGroup],
) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = file.seek(0, 2)
    limits: Any = {"thrift_string_size_limit": max(size, 1), "thrift_container_size_limit": max(size, 1)}
    found = pq.ParquetFile(file, page_checksum_verification=True, **limits)
    if found.metadata.num_rows != (found.metadata.num_rows if rows is None else rows):
        raise ValueError(f"{found.metadata.num_rows} rows instead of {rows}")
    if found.schema_arrow.names != schema.names:
        raise ValueError(f"columns {', '.join(found.schema_arrow.names)[:200]}, expected {', '.join(schema.names)}")
    for field, own in zip(schema, found.schema_arrow, strict=True):
        if not _alike(field.type, own.type):
            raise ValueError(f"column {field.name} is {str(own.type)[:80]}, expected {field.type}")
    wanted = pa.schema([field for field in schema if columns is None or field.name in columns])
    asked = footer if groups is None else [footer[number] for number in groups]
    expected = found.metadata.num_rows if groups is None else sum(group.rows for group in asked)
    most_rows, lists = _checked_sizes(file, asked, wanted, size)
    if lists:
        found = pq.ParquetFile(file, page_checksum_verification=True, read_dictionary=lists, **limits)
    taken: list[pa.RecordBatch] = []
    in_memory = n_rows = 0
    numbers = range(len(footer)) if groups is None else groups
    # Group by group: Arrow cannot join dictionaries in lists across groups (seen with pyarrow 26).
    each = [[number] for number in numbers] if lists else [list(numbers)]
    for batch in chain.from_iterable(
        found.iter_batches(most_rows, row_groups=one, columns=wanted.names) for one in each
    ):
        in_memory += batch.nbytes + (sum(map(_hidden_bytes, batch.columns)) if lists else 0)
        n_rows += batch.num_rows
        if not within(in_memory, size):
            raise ValueError(f"more than {in_memory} bytes of columns in a file of {size}")
        taken.append(batch)
    if n_rows != expected:
        raise ValueError(f"{n_rows} rows instead of {expected}")
    table = pa.Table.from_batches(taken, taken[0].schema) if taken else no_rows(wanted)
    for field in wanted:
        if not field.nullable and table[field.name].null_count:
            raise ValueError(f"column {field.name} has nulls")
    table = table.replace_schema_metadata(None)
    if not table.schema.equals(wanted):
        table = table.cast(wanted)
    table.validate(full=True)
    return table


def read_metadata(file: BinaryIO, path: Path) -> dict[bytes, bytes]:
    """Members of the footer's metadata; DamagedError, which names the path, if they cannot be read."""
    import pyarrow as pa

    try:
        return metadata_of(file)
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise DamagedError(f"{path}: damaged: {first_line(error)}; see `gradstore verify`") from error


def metadata_of(file: BinaryIO) -> dict[bytes, bytes]:
    """Members of the footer's metadata."""
    import pyarrow.parquet as pq

    size = file.seek(0, 2)
    read = pq.ParquetFile(file, thrift_string_size_limit=size, thrift_container_size_limit=size)
    return read.metadata.metadata or {}


def _checked_sizes(file: BinaryIO, groups: list[RowGroup], wanted: "pa.Schema", size: int) -> tuple[int, list[str]]:
    """(rows of a batch, leaf columns to read as dictionaries), by the pages' sizes; ValueError if they are too large.

    A text can be as long as the largest page of its column. A row of a list can hold as many texts as the whole
    column, so lists of texts are read as dictionaries, in which a text takes its bytes once.
    """
    total, longest, as_dictionaries = 0, 1, []
    for name, path, values, nbytes, largest in _leaves(file, groups, wanted.names):
        kind = wanted.field(name).type
        if "string" not in str(kind):
            total += max(nbytes, 8 * values)
            continue
        total += nbytes
        if "list" in str(kind):
            as_dictionaries.append(path)
            total += 8 * values
        elif not within(values * largest, size):
            longest = max(longest, largest)
    if not within(total, size):
        raise ValueError(f"{total} bytes of columns in a file of {size}")
    return (max(1, _BATCH // longest) if longest > 1 else max(1, sum(group.rows for group in groups))), as_dictionaries


def _leaves(file: BinaryIO, groups: list[RowGroup], names: list[str]) -> Iterator[tuple[str, str, int, int, int]]:
    """(column, leaf path, values, bytes, bytes of the largest page) of each leaf of the columns, not compressed."""
    for chunks in zip(*(group.chunks for group in groups), strict=True):
        if chunks[0].path[0] in names:
            found = [page for chunk in chunks for page in pages(file, chunk, _MOST_PAGES)]
            values, nbytes = sum(page.values for page in found), sum(page.size for page in found)
            yield chunks[0].path[0], chunks[0].name, values, nbytes, max((page.size for page in found), default=0)


def _alike(ours: "pa.DataType", theirs: "pa.DataType") -> bool:
    """Whether a column of another writer has our type: texts and lists may have offsets of 32 or 64 bits."""
    import pyarrow.types as is_

    if is_.is_large_string(ours) or is_.is_string(ours):
        return bool(is_.is_large_string(theirs) or is_.is_string(theirs))
    if is_.is_list(ours):
        return bool(is_.is_list(theirs) or is_.is_large_list(theirs)) and _alike(ours.value_type, theirs.value_type)
    return bool(ours == theirs)


def _hidden_bytes(column: Any) -> int:
    """Bytes that the texts of a list take once its dictionary is gone."""
    import pyarrow.compute as pc
    import pyarrow.types as is_

    if not (is_.is_list(column.type) or is_.is_large_list(column.type)):
        return 0
    texts = column.flatten()
    if not is_.is_dictionary(texts.type):
        return 0
    return int(pc.sum(pc.binary_length(texts.dictionary).take(texts.indices).cast("int64")).as_py() or 0)
