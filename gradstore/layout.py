"""On-disk layout of a store: names, dtypes and Zarr metadata (docs/format.md).

`row_arrays` is the single schema table: an array added there is written, checksummed, verified and compacted without
further code. Every array is a plain Zarr v3 array with only the core codec `bytes`. A chunk file therefore has the
array's memory layout and can be memory-mapped.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.errors import RequestError
from gradstore.inside import names_inside

FORMAT = 1
"""Version of the on-disk format; a reader refuses a newer one."""
FORMAT_OF_BASES = 2
"""Format version in the manifest of a collection that has rows in a later basis than the first."""
FORMAT_OF_COLUMNS = 2
"""Format version in the root of a store with optional columns."""
FORMAT_OF_COLUMN_ROWS = 3
"""Format version in the root of a store whose codes and other arrays have different chunk sizes in rows."""
COLUMNS = {"ess": "float32"}
"""Optional columns, present when listed in the root metadata."""

MANIFEST = "manifest.json"
LOCK = "LOCK"
IN_USE = "IN-USE"
COLLECTIONS = "collections"
PROBLEMS = "problems"
PROBES = "probes"
ROUNDS = "rounds"
WITHOUT_CODES = "without-codes"
"""Empty file that marks a folder made by `open_remote`: it has no codes, so it is not a complete store."""
INDEXES = "indexes"
"""Folder of a collection for data derived from its rows, which can be rebuilt; not part of the format."""
ZARR = "zarr.json"

CHUNK_BYTES = 8 << 20
"""Target size of a chunk of codes: large enough to stream well, small enough to preallocate for a small collection."""
MAX_CHUNK_ROWS = 16384
COLUMN_ROWS = 1 << 16
"""Rows per chunk of the other arrays: 2 MB for all of them together. With as few rows as codes have, there would be
hundreds of files of a few kilobytes to create and sync."""

_CODES = {
    "int8": ("int8", 1.0),
    "int4": ("uint8", 0.5),
    "1bit": ("uint8", 0.125),
    "fp16": ("float16", 1.0),
    "fp32": ("float32", 1.0),
}
DTYPES = tuple(_CODES)

PROBLEM_PART = r"part-[0-9]{6,9}\.parquet"
"""Names of the parts of the problems, as a regular expression."""
MOST_DIM = 1 << 24
MOST_CHUNK_ROWS = 1 << 24
MOST_CHUNK_BYTES = 1 << 32
"""Limits of a store's header: a number alone must not make a reader or writer take memory or disk without end."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_GENERATION = re.compile(r"g(0|[1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True)
class RowArray:
    """An array with one entry (or `width` entries) per row."""

    name: str
    dtype: np.dtype
    """Little-endian element type."""
    width: int | None = None
    """Elements per row; None for a one-dimensional array."""
    chunk_rows: int = 1
    """Rows per chunk file."""

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_rows * self.row_bytes

    def chunks(self, rows: int) -> int:
        """Number of chunk files for `rows` rows."""
        return -(-rows // self.chunk_rows)

    def rows_in(self, chunk: int, rows: int) -> int:
        """How many of `rows` fall in this chunk."""
        return min(self.chunk_rows, rows - chunk * self.chunk_rows)

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * (self.width or 1)

    def shape(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.width is None else (rows, self.width)

    def chunk_file(self, chunk: int) -> str:
        return f"c.{chunk}" if self.width is None else f"c.{chunk}.0"

    def is_chunk_file(self, name: str) -> bool:
        """Whether a file of this name can be a chunk."""
        return re.fullmatch(r"c\.(0|[1-9][0-9]*)" + ("" if self.width is None else r"\.0"), name) is not None

    def zarr_json(self, rows: int) -> bytes:
        """The exact bytes of the array's zarr.json for `rows` rows."""
        return _text(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": list(self.shape(rows)),
                "data_type": self.dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.shape(self.chunk_rows))}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
                "fill_value": 0 if self.dtype.kind in "iu" else 0.0,
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                "attributes": {},
                "storage_transformers": [],
            }
        )


def row_arrays(
    dim: int, dtype: str, columns: tuple[str, ...] = (), chunk_rows: int = 1, column_rows: int = 1
) -> tuple[RowArray, ...]:
    """The schema: every array of a collection for sketches of `dim` dimensions stored as `dtype`, codes first.

    columns: optional columns, from COLUMNS. chunk_rows: rows per chunk of codes. column_rows: of the other arrays.
    """
    code_dtype, share = _CODES[dtype]
    table = (
        ("codes", code_dtype, int(np.ceil(dim * share))),
        ("scale", "float32", None),
        ("norm", "float32", None),
        ("step", "int64", None),
        ("problem", "int32", None),
        ("state", "uint8", None),
        ("pass_rate", "float32", None),
        ("n_rollouts", "int32", None),
        ("reason", "uint16", None),
        *((name, COLUMNS[name], None) for name in columns),
    )
    return tuple(
        RowArray(name, np.dtype(kind).newbyteorder("<"), width, column_rows if width is None else chunk_rows)
        for name, kind, width in table
    )


def default_chunk_rows(dim: int, dtype: str) -> int:
    """Rows per chunk of codes: the largest power of two that fits in `CHUNK_BYTES`, at most `MAX_CHUNK_ROWS`."""
    fitting = max(1, CHUNK_BYTES // row_arrays(dim, dtype)[0].row_bytes)
    return int(min(MAX_CHUNK_ROWS, 1 << (fitting.bit_length() - 1)))


def group_json(attributes: dict) -> bytes:
    """The exact bytes of a group's zarr.json."""
    return _text({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def check_name(name: object) -> str:
    """Check and return a collection's name; RequestError states the rule for names."""
    if not isinstance(name, str):
        raise RequestError(f"a collection is named by its name, a text, not by {type(name).__name__}")
    if not is_name(name):
        rule = "use letters, digits, '.', '_' and '-', not starting with a dot, at most 200 of them"
        raise RequestError(f"collection name {name!r} is not possible: {rule}")
    return name


def check_whole(name: str, value: Any, least: int, note: str = "", most: int = 2**63 - 1) -> int:
    """Check and return a whole number; RequestError names it with `note` if it is another thing or out of bounds."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= value.__index__() <= most:
        limit = "" if most == 2**63 - 1 else f" and at most {most}"
        raise RequestError(f"{name} must be a whole number of at least {least}{limit}{note}, not {value!r}")
    return int(value)


def check_step(step: Any) -> int:
    """Check and return a policy step."""
    return check_whole("step", step, 0, " (0 = the base model)")


HALVES = (".even", ".odd")
"""Suffixes of the collections that hold a collection's even and odd rollouts."""


SOLUTIONS = ".solutions"
"""Suffix of the collection whose rows are of a benchmark's reference solutions: `amc.solutions`."""
DERIVED = (*HALVES, SOLUTIONS)
"""Suffixes of collections that stand beside another one and are no pools."""


def is_half(name: str) -> bool:
    """Whether a collection holds one half of another's rollouts: it is neither a pool nor a benchmark."""
    return name.endswith(HALVES)


def is_name(name: str) -> bool:
    """Whether this can be the name of a collection or of an attachment."""
    return len(name) <= 200 and _NAME.fullmatch(name) is not None


def collection_names(store: Path) -> list[str]:
    """Names of a store's collections, sorted."""
    names = names_inside(store / COLLECTIONS, store)
    return [name for name in names if is_name(name) and (store / COLLECTIONS / name / MANIFEST).exists()]


def store_of(collection: Path) -> Path:
    """The store's folder, from a collection's."""
    return collection.parent.parent


def check_collection(folder: Path) -> None:
    """Raise RequestError, which names the store's collections, if there is none in the folder."""
    if not (folder / MANIFEST).exists():
        store = store_of(folder)
        known = ", ".join(collection_names(store)) or "none"
        raise RequestError(f"{store}: there is no collection {folder.name!r}; the store has {known}")


def generation_name(generation: int) -> str:
    return f"g{generation}"


def generations(collection: Path) -> list[int]:
    """Numbers of the generation folders that exist, published or not."""
    names = names_inside(collection, store_of(collection))
    return sorted(int(match[1]) for match in map(_GENERATION.fullmatch, names) if match)


def _text(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
