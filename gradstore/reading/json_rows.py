"""Rows of JSON Lines files and of JSON lists."""

import codecs
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

from gradstore.errors import RequestError, first_line
from gradstore.keepable import MAX_ROW_BYTES, MAX_ROW_PARTS, check_depth, decoder, n_parts, parsed_line
from gradstore.reading.files import Row, RowFile, open_regular

CHUNK_BYTES = 1 << 20


class JsonLines(RowFile):
    """One JSON object per line; blank lines are skipped."""

    unit = "line"
    _file: BinaryIO | None = None

    def _open(self) -> BinaryIO:
        return open_regular(self.path)

    def scan(self) -> Iterator[Row]:
        place = 0
        with self._open() as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_ROW_BYTES + 1), b""), 1):
                if line.strip():
                    yield Row(self.where(number), place, len(line), parsed_line(line, self.where(number)))
                place += len(line)

    def fetch(self, places: Sequence[int], sizes: Sequence[int]) -> list[Any]:
        if self._file is None:
            self._file = self._open()
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
        with self._open() as file:
            text = _Text(self, file)
            text.mark()
            text.at += 1  # the opening bracket, by which the file was recognised as a list
            number = 0
            mark = "," if text.mark() != "]" else "]"
            while mark != "]":
                number += 1
                text.mark()
                value, start, size = text.entry(self.where(number))
                yield Row(self.where(number), start, size, value)
                mark = text.mark()
                text.at += 1
                if mark not in {",", "]"}:
                    found = repr(mark) if mark else "the end of the file"
                    raise RequestError(f"{self.where(number)}: not valid JSON: expected ',' or ']', found {found}")
            text.at += not number
            if text.mark():
                raise RequestError(f"{self.path}: more text after the closing bracket of the list")


class _Text:
    """A window of a file's text, and the place in it up to which the text was read."""

    def __init__(self, rows: RowFile, file: BinaryIO) -> None:
        self._rows, self._file, self._number = rows, file, 0
        self._to_text = codecs.getincrementaldecoder("utf-8-sig")()
        self._byte = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(0)
        self.text, self.at = "", 0
        self._counted = 0  # characters of the window whose bytes are in _byte

    def mark(self) -> str:
        """The next character that is no blank, not yet passed; "" at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more(CHUNK_BYTES):
                return ""

    def entry(self, where: str) -> tuple[Any, int, int]:
        """The JSON value that begins here, its first byte in the file and its length in bytes."""
        self._number += 1
        wanted = CHUNK_BYTES
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                check_depth(value, n_parts(self.text, self.at, end))
                break
            except json.JSONDecodeError as error:
                if not self._more(wanted):
                    raise RequestError(f"{where}: not valid JSON: {error.msg}") from None
                wanted *= 2  # a long entry is parsed repeatedly: each try gets twice as much text
                if len(self.text) > 2 * MAX_ROW_BYTES or n_parts(self.text) > 2 * MAX_ROW_PARTS:
                    raise RequestError(f"{where}: longer than {MAX_ROW_BYTES >> 20} MiB or of too many parts") from None
            except (RecursionError, ValueError) as error:
                raise RequestError(f"{where}: not usable JSON: {first_line(error)}") from None
        start, self.at = self._count(), end
        return value, start, self._count() - start

    def _count(self) -> int:
        """Bytes of the file before the place."""
        self._byte += len(self.text[self._counted : self.at].encode())
        self._counted = self.at
        return self._byte

    def _more(self, wanted: int) -> bool:
        data = self._file.read(wanted)
        self._count()
        try:
            self.text = self.text[self.at :] + self._to_text.decode(data, final=not data)
            self.at = self._counted = 0
        except UnicodeDecodeError:
            raise RequestError(f"{self._rows.where(self._number or 1)}: not UTF-8 text") from None
        return bool(data)
