"""Header of a store: the settings common to all rows, stored in the attributes of the root Zarr group."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gradstore.durable import canonical_json, crc32c
from gradstore.errors import DamagedError, NotAStoreError, RequestError, check_known
from gradstore.inside import read_inside
from gradstore.layout import (
    COLUMN_ROWS,
    COLUMNS,
    DTYPES,
    FORMAT,
    FORMAT_OF_COLUMN_ROWS,
    FORMAT_OF_COLUMNS,
    MOST_CHUNK_BYTES,
    MOST_CHUNK_ROWS,
    MOST_DIM,
    ZARR,
    RowArray,
    check_whole,
    collection_names,
    default_chunk_rows,
    group_json,
    row_arrays,
)
from gradstore.schema import ANYTHING, Checker, lists, load_json, mapping, one_of, record, row, text, whole

MOST_BYTES = 1 << 26
"""Largest root: fingerprints list the ranges of all layers."""
_BODY = Checker(
    record(
        {
            "format": whole(),
            "dim": whole(1, MOST_DIM),
            "dtype": one_of(*DTYPES),
            "chunk_rows": whole(1, MOST_CHUNK_ROWS),
            "fingerprint": mapping(ANYTHING),
        },
        {"column_rows": whole(1, MOST_CHUNK_ROWS), "columns": lists(one_of(*COLUMNS), least=1, most=len(COLUMNS))},
    )
)
LAYOUT = lists(row(text(), whole(), whole()), least=1)
"""Ranges of the layers: (name, start, stop)."""
_LAYOUT = Checker(record({}, {"layout": LAYOUT}, open=True))


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

    Raises NotAStoreError if there is no store or its format is newer, DamagedError if its bytes changed or a field
    cannot be.
    """
    file = path / ZARR
    if not path.exists():
        raise NotAStoreError(f"{path}: there is nothing here; `gradstore collect` or gradstore.create makes a store")
    if not path.is_dir():
        raise NotAStoreError(f"{path}: not a gradstore store, but a file; a store is a folder")
    was_a_store = bool(collection_names(path))
    if not os.path.lexists(file):
        if was_a_store:
            raise DamagedError(f"{file}: missing, beside collections of a store")
        raise NotAStoreError(f"{path}: not a gradstore store (no {ZARR} in it)")
    return parse_header(read_inside(file, path, MOST_BYTES), path, was_a_store)


def parse_header(raw: bytes, path: Path, was_a_store: bool = False) -> Header:
    """The header from the bytes of the root's zarr.json; errors as of `read_header`."""
    file = path / ZARR
    try:
        root = load_json(raw, file)
        body = dict(root["attributes"]["gradstore"])
        stored = body.pop("crc32c")
    except (DamagedError, ValueError, KeyError, TypeError) as error:
        if was_a_store or b'"gradstore"' in raw:
            fault = error if isinstance(error, DamagedError) else f"{file}: damaged: not the text that was written"
            raise DamagedError(str(fault)) from error
        raise NotAStoreError(f"{path}: not a gradstore store ({ZARR} has no gradstore attributes)") from error
    if stored != f"{crc32c(canonical_json(body)):08x}":
        raise DamagedError(f"{file}: damaged: the attributes do not match their checksum")
    _refuse_newer(body, path)
    settings = _BODY.check(body, file)
    layout_of(settings["fingerprint"], settings["dim"], file)
    given = {name: settings.get(name) for name in Header.__dataclass_fields__}
    header = Header(**given | {"columns": tuple(settings.get("columns", ()))})
    if header.format != settings["format"]:
        raise DamagedError(f"{file}: damaged: field format: {settings['format']}, expected {header.format}")
    _refuse_huge_chunks(header, lambda fault: DamagedError(f"{file}: damaged: {fault}"))
    return header


def layout_of(fingerprint: dict, dim: int, where: Path | str) -> list[tuple[str, int, int]]:
    """(layer, start, stop): each layer's range of dimensions, from a fingerprint or a basis; of one without, one range.

    DamagedError, beginning with `where`, unless the ranges follow each other from 0 to `dim`.
    """
    layout: list[tuple[str, int, int]] = _LAYOUT.check(fingerprint, where).get("layout") or [("all", 0, dim)]
    last = 0
    for name, start, stop in layout:
        if start != last or stop <= start:
            raise DamagedError(f"{where}: damaged: field layout: {name!r:.80} from {start} to {stop} after {last}")
        last = stop
    if last != dim:
        raise DamagedError(f"{where}: damaged: field layout: ends at {last}, expected {dim}, the dimensions of a row")
    return layout


def _refuse_newer(body: dict, path: Path) -> None:
    """NotAStoreError for a format that this version does not know."""
    known, columns = body.get("format"), body.get("columns", ())
    newer = isinstance(known, int) and known > FORMAT_OF_COLUMN_ROWS
    if newer or (isinstance(columns, list) and any(isinstance(name, str) and name not in COLUMNS for name in columns)):
        raise NotAStoreError(
            f"{path}: written in store format {known!r:.40}, this version reads up to {FORMAT_OF_COLUMN_ROWS}: "
            "upgrade gradstore"
        )


def _refuse_huge_chunks(header: Header, error: Callable[[str], Exception]) -> None:
    """Raise the error for chunk files larger than a store may have."""
    for array in header.arrays:
        if array.chunk_bytes > MOST_CHUNK_BYTES:
            raise error(
                f"a chunk of {array.name} would have {array.chunk_bytes} bytes, expected at most {MOST_CHUNK_BYTES}"
            )


def check_fingerprint(fingerprint: object) -> dict:
    """Return the fingerprint as it reads back from disk (tuples become lists); RequestError if JSON cannot hold it."""
    if not isinstance(fingerprint, dict):
        raise RequestError(f"fingerprint must be a dict of settings, not {type(fingerprint).__name__}")
    try:
        restored: dict = load_json(json.dumps(fingerprint, allow_nan=False), "fingerprint")
    except (TypeError, ValueError, RecursionError, DamagedError) as error:
        raise RequestError(f"fingerprint cannot be kept as JSON: {error}") from error
    return restored


def check_layout(layout: object, dim: int, where: str) -> None:
    """RequestError, beginning with `where`, unless a new store's layout has the ranges of `dim` dimensions in order."""
    try:
        layout_of({"layout": layout}, dim, where)
    except DamagedError as error:
        raise RequestError(str(error).replace(f"{where}: damaged: ", f"{where}: ")) from None


def new_header(dim: int, dtype: str, chunk_rows: int | None, column_rows: int | None, fingerprint: dict) -> Header:
    """Header of a new store; RequestError for a setting that cannot be.

    If only chunk_rows is given, it holds for all arrays (column_rows None). If neither is given, both get defaults. If
    the fingerprint's objective uses importance weights, rows have the column `ess`.
    """
    dim = check_whole("dim", dim, 1, most=MOST_DIM)
    check_known("dtype", dtype, DTYPES)
    if column_rows is None and chunk_rows is None:
        column_rows = COLUMN_ROWS
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(dim, dtype)
    chunk_rows = check_whole("chunk_rows", chunk_rows, 1, most=MOST_CHUNK_ROWS)
    column_rows = None if column_rows is None else check_whole("column_rows", column_rows, 1, most=MOST_CHUNK_ROWS)
    fingerprint = check_fingerprint(fingerprint)
    if "layout" in fingerprint:
        check_layout(fingerprint["layout"], dim, "fingerprint")
    objective = fingerprint.get("objective")
    off_policy = isinstance(objective, dict) and bool(objective.get("importance"))
    header = Header(dim, dtype, chunk_rows, fingerprint, ("ess",) if off_policy else (), column_rows)
    _refuse_huge_chunks(header, RequestError)
    return header
