"""Rows of a CSV or TSV file with a heading; every cell is text, an empty one is None."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gradstore.errors import RequestError, first_line
from gradstore.reading.files import Row, RowFile, open_regular

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""Suffix -> what is between two cells, unless the heading has none of it and one of the others."""
_OTHERS = ";\t,"
_HEADING_BYTES = 1 << 20
_BLOCK_BYTES = 32 << 20
_NOT_UTF8 = "is not UTF-8 text; save it as UTF-8 (from western Windows: iconv -f windows-1252 -t utf-8)"


class CsvRows(RowFile):
    """A CSV file, which is held in memory whole."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.csv as pacsv

        super().__init__(path)
        separator = SEPARATORS[path.suffix.lower()]
        with open_regular(path) as file:
            self.names = _heading(path, file, separator)
            if len(self.names) == 1 and (other := next((one for one in _OTHERS if one in self.names[0]), "")):
                separator, self.names = other, _heading(path, file, other)
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
                if "UTF8" in str(error):
                    raise RequestError(f"{path}: {_NOT_UTF8}") from None
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
                yield Row(self.where(number), number - 1, 0, value)

    def fetch(self, places: Sequence[int], sizes: Sequence[int]) -> list[Any]:
        rows: list[Any] = self._table.take(list(places)).to_pylist()
        return rows


def _heading(path: Path, file: BinaryIO, separator: str) -> list[str]:
    """The names of the columns; RequestError for a heading that cannot be read or does not name each column once.

    The file stands at its beginning, before and after.
    """
    lines = iter(lambda: file.readline(_HEADING_BYTES), b"")
    try:
        names = next(csv.reader((line.decode("utf-8-sig") for line in lines), delimiter=separator), [])
    except UnicodeDecodeError:
        raise RequestError(f"{path}: {_NOT_UTF8}") from None
    except csv.Error as error:
        raise RequestError(f"{path}: the heading cannot be read: {first_line(error)}") from None
    file.seek(0)
    if not names:
        raise RequestError(f"{path}: the first line is empty, expected a heading that names the columns")
    if len(set(names)) < len(names) or not all(names):
        raise RequestError(f"{path}: the heading names a column twice, or not at all: {separator.join(names)!r:.200}")
    return names
