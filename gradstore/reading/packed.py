"""JSON rows in a file packed by gzip or zstd: unpacked once, to a temporary file, because rows are read twice."""

import tempfile
from pathlib import Path
from typing import BinaryIO, Literal

from gradstore.errors import RequestError, first_line
from gradstore.reading.files import RowFile
from gradstore.reading.json_rows import CHUNK_BYTES, JsonLines, JsonList

MAGIC: dict[bytes, Literal["gzip", "zstd"]] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of a packed file -> how it is packed."""
MOST_RATIO = 200
"""Most bytes that one packed byte may give; JSON Lines of rollouts have 5 to 30."""
_SPARE = 64 << 20


def open_packed(path: Path, packed: Literal["gzip", "zstd"]) -> RowFile:
    """The rows of a packed file of JSON Lines or of a JSON list; RequestError for one of anything else."""
    plain = _unpacked(path, packed)
    with open(plain.name, "rb") as file:
        mark = file.read(CHUNK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if mark not in (b"{", b"["):
        raise RequestError(f"{path}: {packed} of something else than JSON Lines or a JSON list; unpack it first")
    rows = _PackedList(path) if mark == b"[" else _PackedLines(path)
    rows.plain = plain
    return rows


class _PackedLines(JsonLines):
    plain: "tempfile._TemporaryFileWrapper[bytes]"
    """The unpacked file; it goes when this object does."""

    def _open(self) -> BinaryIO:
        return open(self.plain.name, "rb")


class _PackedList(_PackedLines, JsonList):
    pass


def _unpacked(path: Path, packed: Literal["gzip", "zstd"]) -> "tempfile._TemporaryFileWrapper[bytes]":
    import pyarrow as pa

    left = MOST_RATIO * path.stat().st_size + _SPARE
    plain = tempfile.NamedTemporaryFile(prefix="gradstore-", suffix=".json")  # noqa: SIM115 (kept by the rows)
    try:
        with pa.input_stream(str(path), compression=packed) as stream:
            while data := stream.read(CHUNK_BYTES):
                left -= len(data)
                if left < 0:
                    raise RequestError(f"{path}: unpacks to more than {MOST_RATIO} times its size; unpack it first")
                plain.write(data)
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"{path}: cannot be unpacked ({packed}): {first_line(error)}") from None
    plain.flush()
    return plain
