"""Bounds of what a Parquet file expands to, from the headers of its pages, before pyarrow reads it.

A reader allocates what these headers state: some bytes can stand for gigabytes as a constant, a run of zeros or a text
of a dictionary.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gradstore.errors import RequestError
from gradstore.keepable import MAX_DEPTH, MAX_ROW_BYTES
from gradstore.parquet_headers import BYTE_ARRAY, DICTIONARY_PAGE, Chunk, Page, RowGroup, pages, row_groups
from gradstore.reading.files import open_regular

BATCH_ROWS, BATCH_BYTES = 1024, 128 << 20
MOST_BYTES, MOST_RATIO = 256 << 20, 100
"""A column of a row group may expand to this many bytes, or to this multiple of its size in the file."""
MOST_VALUES = 1 << 17
"""Most values in a row on average, such as the tokens of a response."""


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
            groups = row_groups(file)
        except ValueError as error:
            raise RequestError(f"{path}: not a readable Parquet file: {error}") from None
        rows = [group.rows for group in groups]
        if min(rows, default=0) < 0 or sum(rows) > max(1 << 20, 4 * size):
            raise RequestError(f"{path}: not a readable Parquet file: claims {sum(rows):,} rows in {size:,} bytes")
        longest = max((_longest_row(path, file, size, group) for group in groups), default=1.0)
    return Sizes(rows, int(min(max(BATCH_BYTES / max(longest, 1.0), 1), BATCH_ROWS)))


def _longest_row(path: Path, file: BinaryIO, size: int, group: RowGroup) -> float:
    """Bytes of a row as far as they can be bounded: on average, with each text as long as a dictionary's longest."""
    total = 0.0
    for chunk in group.chunks:
        name = chunk.name
        if len(chunk.path) > 2 * MAX_DEPTH:
            raise RequestError(f"{path}: column {name[:40]!r} is nested more than {MAX_DEPTH} levels deep")
        values = expanded = dictionary = 0
        for page in _readable_pages(file, chunk, 1000 + size // 512):
            if page.size > MOST_BYTES:
                raise RequestError(
                    f"{path}: column {name!r} has a page of {page.size:,} bytes; write the file with pages of usual "
                    "size (1 MB)"
                )
            dictionary = max(dictionary, page.size if page.kind == DICTIONARY_PAGE else 0)
            values += 0 if page.kind == DICTIONARY_PAGE else page.values
            expanded += page.size
        expanded = max(expanded, values * chunk.width)
        rows = max(group.rows, 1)
        too_large = expanded > max(MOST_BYTES, MOST_RATIO * chunk.size) or expanded / rows > MAX_ROW_BYTES
        if too_large or values / rows > MOST_VALUES:
            raise RequestError(
                f"{path}: column {name!r} expands to {expanded >> 20} MiB and {values:,} values in {group.rows:,} rows "
                f"from {chunk.size:,} bytes; leave the column out, or write the file in a usual way"
            )
        repeated = dictionary * max(1.0, values / rows) if chunk.kind == BYTE_ARRAY else 0.0
        if repeated > 16 * MOST_BYTES:
            raise RequestError(
                f"{path}: column {name!r} may have rows of {int(repeated) >> 20} MiB; write it without a dictionary"
            )
        total = max(total, repeated) + expanded / rows
    return total


def _readable_pages(file: BinaryIO, chunk: Chunk, most: int) -> Iterator[Page]:
    """The pages as far as their headers can be read; pyarrow says what is wrong with the rest."""
    with suppress(ValueError):
        yield from pages(file, chunk, most)
