"""Digests of problems, so that records given again are known without reading the stored texts.

A part's metadata has the SHA-256 of every block of DIGEST_ROWS rows, counted from its first. It is taken over the
columns in their order: of each the lengths in bytes, then the texts. Lengths are int32; -1 stands for null. `tags` has
the number of tags of each row, then the lengths and texts of all tags.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

DIGEST_ROWS = 8192
KEY = b"gradstore.digests"
COLUMNS = ("id", "source", "prompt", "messages", "ground_truth", "tags", "extra")


def digests_of(table: "pa.Table") -> dict[bytes, bytes]:
    """Metadata for a part with these rows."""
    found = []
    for start in range(0, len(table), DIGEST_ROWS):
        digest = hashlib.sha256()
        for name in COLUMNS:
            column = table[name].slice(start, DIGEST_ROWS).combine_chunks()
            if name == "tags":
                digest.update(column.value_lengths().to_numpy(zero_copy_only=False).astype("<i4").tobytes())
                column = column.flatten().cast("large_string")
            _add(digest, *_lengths_and_text(column))
        found.append(digest.hexdigest())
    return {KEY: json.dumps({"rows": DIGEST_ROWS, "sha256": found}).encode()}


def stored_digests(metadata: Mapping[bytes, bytes], rows: int) -> list[str]:
    """The digests in the metadata of a part with so many rows; none where it has no such ones."""
    try:
        about = json.loads(metadata[KEY])
        found = about["sha256"] if about["rows"] == DIGEST_ROWS else []
        return found if len(found) == -(-rows // DIGEST_ROWS) and all(isinstance(one, str) for one in found) else []
    except (KeyError, ValueError, TypeError, RecursionError):
        return []


def digest_of(columns: Mapping[str, Sequence]) -> str:
    """Digest of a block of rows, by their values in Python: texts, None, and lists of tags.

    UnicodeEncodeError for half a surrogate pair, which no stored text has.
    """
    digest = hashlib.sha256()
    for name in COLUMNS:
        values = columns[name]
        if name == "tags":
            digest.update(np.fromiter(map(len, values), "<i4", len(values)).tobytes())
            values = list(chain.from_iterable(values))
        _add(digest, *_joined(values))
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", lengths: np.ndarray, text: bytes | memoryview) -> None:
    digest.update(lengths.astype("<i4", copy=False).tobytes())
    digest.update(text)


def _joined(values: Sequence) -> tuple[np.ndarray, bytes]:
    """Lengths in bytes of texts, -1 for None, int32, and the texts one after the other."""
    n_missing = values.count(None)
    if n_missing == len(values):
        return np.full(len(values), -1, "<i4"), b""
    joined = "".join([value for value in values if value is not None] if n_missing else values)
    text = joined.encode()
    if len(text) == len(joined) and not n_missing:
        return np.fromiter(map(len, values), "<i4", len(values)), text
    return np.array([-1 if value is None else len(value.encode()) for value in values], "<i4"), text


def _lengths_and_text(column: "pa.Array") -> tuple[np.ndarray, memoryview]:
    """Lengths of large strings, -1 for null, and their bytes one after the other."""
    _, offsets, data = column.buffers()
    if not len(column):
        return np.zeros(0, np.int64), memoryview(b"")
    ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    lengths = np.where(column.is_null().to_numpy(zero_copy_only=False), -1, np.diff(ends))
    return lengths, memoryview(data or b"")[int(ends[0]) : int(ends[-1])]
