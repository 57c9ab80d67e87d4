"""Header of a store: the settings common to all rows, stored in the attributes of the root Zarr group."""

import json
from dataclasses import dataclass
from pathlib import Path

from gradstore.durable import canonical_json, crc32c, reading
from gradstore.errors import DamagedError, NotAStoreError, RequestError, check_known
from gradstore.layout import (
    COLLECTIONS,
    COLUMN_ROWS,
    COLUMNS,
    DTYPES,
    FORMAT,
    FORMAT_OF_COLUMN_ROWS,
    FORMAT_OF_COLUMNS,
    MANIFEST,
    ZARR,
    RowArray,
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
        return _format(self.columns, self.column_rows)

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

    @property
    def arrays(self) -> tuple[RowArray, ...]:
        return row_arrays(self.dim, self.dtype, self.columns, self.chunk_rows, self.column_rows or self.chunk_rows)


def _format(columns: tuple[str, ...], column_rows: int | None) -> int:
    if column_rows is not None:
        return FORMAT_OF_COLUMN_ROWS
    return FORMAT_OF_COLUMNS if columns else FORMAT


def read_header(path: Path) -> Header:
    """Read the header of the store at `path`.

    Raises NotAStoreError if there is no store or its format is newer, DamagedError if its bytes changed.
    """
    file = path / ZARR
    if not path.exists():
        raise NotAStoreError(f"{path}: there is nothing here; `gradstore collect` or gradstore.create makes a store")
    was_a_store = any(path.glob(f"{COLLECTIONS}/*/{MANIFEST}"))
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
    columns = tuple(body.get("columns", ()))
    column_rows = body.get("column_rows")
    if body["format"] != _format(columns, column_rows) or not set(columns) <= set(COLUMNS):
        raise NotAStoreError(
            f"{path}: written in store format {body['format']}, this version reads up to {FORMAT_OF_COLUMN_ROWS}: "
            "upgrade gradstore"
        )
    return Header(body["dim"], body["dtype"], body["chunk_rows"], body["fingerprint"], columns, column_rows)


def check_fingerprint(fingerprint: object) -> dict:
    """Return the fingerprint as it reads back from disk (tuples become lists); RequestError if JSON cannot hold it."""
    if not isinstance(fingerprint, dict):
        raise RequestError(f"fingerprint must be a dict of settings, not {type(fingerprint).__name__}")
    try:
        restored: dict = json.loads(json.dumps(fingerprint, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise RequestError(f"fingerprint cannot be kept as JSON: {error}") from error
    return restored


def check_shape(
    dim: object, dtype: object, chunk_rows: object, column_rows: object
) -> tuple[int, str, int, int | None]:
    """Check and return dim, dtype, chunk_rows (codes) and column_rows (other arrays), or raise RequestError.

    If only chunk_rows is given, it holds for all arrays (column_rows None). If neither is given, both get defaults.
    """
    whole = whole_number("dim", dim)
    check_known("dtype", dtype, DTYPES)
    kind = str(dtype)
    if column_rows is None and chunk_rows is None:
        column_rows = COLUMN_ROWS
    rows = default_chunk_rows(whole, kind) if chunk_rows is None else whole_number("chunk_rows", chunk_rows)
    return whole, kind, rows, None if column_rows is None else whole_number("column_rows", column_rows)


def whole_number(name: str, value: object) -> int:
    """Return an integer of any integer type as int; RequestError unless it is at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or (whole := value.__index__()) < 1:
        raise RequestError(f"{name} must be a whole number of at least 1, not {value!r}")
    return int(whole)
