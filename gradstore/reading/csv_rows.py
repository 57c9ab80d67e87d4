"""Rows of a CSV or TSV file with a heading; every cell is text, an empty one is no value."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gradstore.errors import RequestError, first_line
from gradstore.reading.files import Row, RowFile, open_regular

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""Suffix -> what is between two cells."""
_HEADING_BYTES = 1 << 20
_BLOCK_BYTES = 32 << 20


class CsvRows(RowFile):
    """A CSV file, which is held in memory whole."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.csv as pacsv

        super().__init__(path)
        separator = SEPARATORS[path.suffix.lower()]
        with open_regular(path) as file:
            self.names = _heading(path, iter(lambda: file.readline(_HEADING_BYTES), b""), separator)
            file.seek(0)
            try:
                self._table = pacsv.read_csv(
                    file,
                    pacsv.ReadOptions(block_size=_BLOCK_BYTES),
                    pacsv.ParseOptions(delimiter=separator, newlines_in_values=True),
                    pacsv.ConvertOptions(
                        column_types=dict.fromkeys(self.names, pa.large_string()),
                        strings_can_be_null=True,
                        null_values=[""],
                    ),
                )
            except (pa.ArrowException, OSError) as error:
                raise RequestError(f"{path}: not a CSV file that can be read: {first_line(error)}") from None
        if self._table.column_names != self.names:
            raise RequestError(f"{path}: its heading cannot be told from its rows: {separator.join(self.names)!r:.200}")
        if not self._table.num_rows:
            raise RequestError(f"{path}: has a heading and no rows")

    def scan(self) -> Iterator[Row]:
        number = 0
        for batch in self._table.to_batches(max_chunksize=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(self.where(number), number - 1, 0, _filled(value))

    def fetch(self, places: Sequence[int], sizes: Sequence[int]) -> list[Any]:
        return [_filled(value) for value in self._table.take(list(places)).to_pylist()]


def _heading(path: Path, lines: Iterator[bytes], separator: str) -> list[str]:
    """The names of the columns; RequestError for a heading that cannot be read or does not name each column once."""
    try:
        names = next(csv.reader((line.decode("utf-8-sig") for line in lines), delimiter=separator), [])
    except (csv.Error, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: the heading cannot be read: {first_line(error)}") from None
    if not names:
        raise RequestError(f"{path}: the first line is empty, expected a heading that names the columns")
    if len(set(names)) < len(names) or not all(names):
        raise RequestError(f"{path}: the heading names a column twice, or not at all: {separator.join(names)!r:.200}")
    return names


def _filled(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}
