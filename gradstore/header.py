"""Header of a store: the settings common to all rows, stored in the attributes of the root Zarr group."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gradstore.durable import canonical_json, crc32c, reading
from gradstore.errors import DamagedError, NotAStoreError, RequestError, check_known
from gradstore.layout import (
    COLUMN_ROWS,
    COLUMNS,
    DTYPES,
    FORMAT,
    FORMAT_OF_COLUMN_ROWS,
    FORMAT_OF_COLUMNS,
    ZARR,
    RowArray,
    check_whole,
    collection_names,
    default_chunk_rows,
    group_json,
    row_arrays,
)


@dataclass(frozen=True)
class Header:
    """Settings of a store, fixed at its creation."""

    dim: int
    dtype: str
    chunk_rows: int
    fingerprint: dict
    columns: tuple[str, ...] = ()
    """Optional columns of the rows."""
    column_rows: int | None = None
    """Rows per chunk of every array except codes; None: the same as for codes."""

    @property
    def format(self) -> int:
        """Version of the on-disk format in the root."""
        if self.column_rows is not None:
            return FORMAT_OF_COLUMN_ROWS
        return FORMAT_OF_COLUMNS if self.columns else FORMAT

    def to_bytes(self) -> bytes:
        """The exact bytes of the root zarr.json."""
        body = {
            "format": self.format,
            "dim": self.dim,
            "dtype": self.dtype,
            "chunk_rows": self.chunk_rows,
            **({"column_rows": self.column_rows} if self.column_rows else {}),
            "fingerprint": self.fingerprint,
            **({"columns": list(self.columns)} if self.columns else {}),
        }
        return group_json({"gradstore": {**body, "crc32c": f"{crc32c(canonical_json(body)):08x}"}})

    @cached_property
    def arrays(self) -> tuple[RowArray, ...]:
        """Every array of a collection, codes first."""
        return row_arrays(self.dim, self.dtype, self.columns, self.chunk_rows, self.column_rows or self.chunk_rows)


def read_header(path: Path) -> Header:
    """Read the header of the store at `path`.

    Raises NotAStoreError if there is no store or its format is newer, DamagedError if its bytes changed.
    """
    file = path / ZARR
    if not path.exists():
        raise NotAStoreError(f"{path}: there is nothing here; `gradstore collect` or gradstore.create makes a store")
    was_a_store = bool(collection_names(path))
    if not file.is_file():
        if was_a_store:
            raise DamagedError(f"{file}: missing, beside collections of a store")
        raise NotAStoreError(f"{path}: not a gradstore store (no {ZARR} in it)")
    with reading(file):
        raw = file.read_bytes()
    try:
        body = dict(json.loads(raw)["attributes"]["gradstore"])
        stored = body.pop("crc32c")
    except (ValueError, KeyError, TypeError) as error:
        if was_a_store or b'"gradstore"' in raw:
            raise DamagedError(f"{file}: damaged: not the text that was written ({error})") from error
        raise NotAStoreError(f"{path}: not a gradstore store ({ZARR} has no gradstore attributes)") from error
    if stored != f"{crc32c(canonical_json(body)):08x}":
        raise DamagedError(f"{file}: damaged: the attributes do not match their checksum")
    settings: dict[str, Any] = {name: body.get(name) for name in Header.__dataclass_fields__}
    header = Header(**settings | {"columns": tuple(body.get("columns", ()))})
    if body["format"] != header.format or not set(header.columns) <= set(COLUMNS):
        raise NotAStoreError(
            f"{path}: written in store format {body['format']}, this version reads up to {FORMAT_OF_COLUMN_ROWS}: "
            "upgrade gradstore"
        )
    return header


def check_fingerprint(fingerprint: object) -> dict:
    """Return the fingerprint as it reads back from disk (tuples become lists); RequestError if JSON cannot hold it."""
    if not isinstance(fingerprint, dict):
        raise RequestError(f"fingerprint must be a dict of settings, not {type(fingerprint).__name__}")
    try:
        restored: dict = json.loads(json.dumps(fingerprint, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise RequestError(f"fingerprint cannot be kept as JSON: {error}") from error
    return restored


def new_header(dim: int, dtype: str, chunk_rows: int | None, column_rows: int | None, fingerprint: dict) -> Header:
    """Header of a new store; RequestError for a setting that cannot be.

    If only chunk_rows is given, it holds for all arrays (column_rows None). If neither is given, both get defaults. If
    the fingerprint's objective uses importance weights, rows have the column `ess`.
    """
    dim = check_whole("dim", dim, 1)
    check_known("dtype", dtype, DTYPES)
    if column_rows is None and chunk_rows is None:
        column_rows = COLUMN_ROWS
    chunk_rows = default_chunk_rows(dim, dtype) if chunk_rows is None else check_whole("chunk_rows", chunk_rows, 1)
    column_rows = None if column_rows is None else check_whole("column_rows", column_rows, 1)
    fingerprint = check_fingerprint(fingerprint)
    objective = fingerprint.get("objective")
    off_policy = isinstance(objective, dict) and bool(objective.get("importance"))
    return Header(dim, dtype, chunk_rows, fingerprint, ("ess",) if off_policy else (), column_rows)
