"""Opening regular files only, and the interface of a file of rows: scan all rows, then fetch single ones by place."""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gradstore.errors import RequestError
from gradstore.keepable import MAX_ROW_BYTES, parsed_line

_KINDS = {
    stat.S_IFDIR: "Is a directory",
    stat.S_IFIFO: "it is a pipe, and files are read twice: write it to a file first",
    stat.S_IFSOCK: "it is a socket, not a file",
    stat.S_IFCHR: "it is a device, not a file",
    stat.S_IFBLK: "it is a device, not a file",
}


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; RequestError for anything else, without waiting for a writer of a pipe."""
    try:
        _check_regular(path, os.stat(path))  # before it is opened: opening a device can change it
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _check_regular(path, os.fstat(descriptor))
        except RequestError:
            os.close(descriptor)
            raise
    except FileNotFoundError:
        raise RequestError(f"{path}: the file does not exist") from None
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, most: int) -> str:
    """The text of a regular file of at most `most` bytes; RequestError for another, or if it is not UTF-8."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise RequestError(f"{path}: has more than {most} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that is the whole content of a file."""
    with open_regular(path) as file:
        data = file.read(MAX_ROW_BYTES + 1)
    value = parsed_line(data, str(path))
    if not isinstance(value, dict):
        raise RequestError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class Row(NamedTuple):
    where: str
    """File and row for messages, counted from 1: "rollouts.jsonl, line 3"."""
    place: int
    size: int
    value: Any


class RowFile:
    """A file of rows. Subclasses implement the scan and the fetch by place.

    A place is two integers, so an index of millions of rows stays small: byte offset and length in JSON Lines and in a
    JSON list, row number (and 0) in Parquet.
    """

    unit = "row"
    names: Sequence[str] = ()
    """The columns of a Parquet file, also those that are not read."""

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


def _check_regular(path: Path, status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise RequestError(f"{path}: cannot be read ({_KINDS.get(kind, 'it is not a file')})")
