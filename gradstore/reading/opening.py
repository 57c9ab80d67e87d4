"""Open a file of rows by its first bytes; CSV, which has none of its own, by its name."""

import codecs
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradstore.errors import RequestError
from gradstore.reading.csv_rows import SEPARATORS, CsvRows
from gradstore.reading.files import RowFile, open_regular
from gradstore.reading.json_rows import CHUNK_BYTES, JsonLines, JsonList
from gradstore.reading.packed import MAGIC, open_packed


def open_rows(path: Path, columns: Sequence[str] | None = None, what: str = "record") -> RowFile:
    """Open a file of rows: JSON Lines or a JSON list, also packed by gzip or zstd; Parquet; CSV or TSV with a heading.

    columns: the columns to read of a Parquet file; None: all. what: one row, for messages.
    Raises RequestError for an empty file, for one of another format, and for what is not a regular file.
    """
    with open_regular(path) as file:
        head = data = file.read(CHUNK_BYTES)
        mark = data.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        while data and not mark:
            data = file.read(CHUNK_BYTES)
            mark = data.lstrip()[:1]
    if head.startswith(b"PAR1"):
        from gradstore.reading.parquet_rows import ParquetRows  # only where it is needed: it imports pyarrow

        return ParquetRows(path, columns, what)
    packed = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)
    if packed is not None:
        return open_packed(path, packed)
    if not mark:
        raise RequestError(f"{path}: the file is empty, expected at least one {what}")
    if mark == b"[":
        return JsonList(path)
    if mark == b"{":
        return JsonLines(path)
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise RequestError(f"{path}: is UTF-16 text; save it as UTF-8 (iconv -f utf-16 -t utf-8)")
    if path.suffix.lower() in SEPARATORS:
        return CsvRows(path)
    raise RequestError(
        f"{path}: neither JSON Lines, nor a JSON list, nor Parquet (starts with {head[:4]!r}); a CSV file's name ends "
        "in .csv or .tsv"
    )


def read_records(
    path: Path, columns: Sequence[str] | None = None, what: str = "record"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, fields) of every row of a file; where is "FILE, line 3". RequestError for a row that is no object."""
    for row in open_rows(path, columns, what).scan():
        if not isinstance(row.value, Mapping):
            raise RequestError(f"{row.where}: expected a JSON object, not {type(row.value).__name__}")
        yield row.where, dict(row.value)


def files_at(path: Path, what: str = "rollouts") -> list[Path]:
    """The file itself, or the .jsonl and .parquet files of a folder, sorted; RequestError without any."""
    if not path.exists():
        raise RequestError(f"{path}: no such file or folder, expected {what} in JSON Lines, JSON or Parquet")
    if not path.is_dir():
        return [path]
    files = sorted(file for suffix in ("jsonl", "parquet") for file in path.glob(f"*.{suffix}"))
    if not files:
        raise RequestError(f"{path}: no .jsonl or .parquet file in this folder, expected {what}")
    return files
