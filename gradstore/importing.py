"""Import of problems and sketches from other tools into a store, all or nothing.

Files are read and checked to their ends before anything is written; problems and rows become visible in one
publication. If that fails, the store is as it was; one that the import created is removed.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gradstore.errors import RequestError
from gradstore.header import Header, check_layout, new_header
from gradstore.keepable import check_keepable
from gradstore.layout import check_name, check_step
from gradstore.new_rows import NewRows
from gradstore.problems import read_problems
from gradstore.reading.columns import check_columns
from gradstore.reading.files import read_object
from gradstore.reading.opening import open_rows
from gradstore.reading.parquet_rows import ParquetRows
from gradstore.store import Store, create
from gradstore.store import open as open_store
from gradstore.undo import undone_on

log = logging.getLogger(__name__)

COLUMNS = ("id", "sketch", "norm", "pass_rate", "n_rollouts")
"""Columns of a file of sketches; the first two are required."""
OF_WRITER = {"norm": "norms", "pass_rate": "pass_rate", "n_rollouts": "n_rollouts"}


def import_problems(store_path: Path, collection: str, problems_path: Path) -> int:
    """Add the problems of a file to a collection of an existing store; returns how many were new."""
    records = read_problems(problems_path)
    return open_store(store_path, mode="a").add_problems(collection, records)


def import_sketches(
    store_path: Path,
    collection: str,
    sketches_path: Path,
    step: int,
    problems_path: Path | None = None,
    fingerprint_path: Path | None = None,
    dtype: str | None = None,
) -> tuple[int, int]:
    """Append the rows of a Parquet file (id, sketch; optional: norm, pass_rate, n_rollouts) at a step.

    If there is no store, creates one; this needs fingerprint_path, a JSON object that says how the sketches were made.
    If the store exists, a given fingerprint and dtype must equal the store's; a new store's dtype is int8 by default.
    Returns the numbers of problems and rows added.
    """
    check_step(step)
    check_name(collection)
    ids, sketches, others = _read_sketches(sketches_path)
    records = [] if problems_path is None else read_problems(problems_path)
    fingerprint = None
    if fingerprint_path is not None:
        fingerprint = read_object(fingerprint_path)
        check_keepable(fingerprint, str(fingerprint_path))
    if store_path.exists():
        store = open_store(store_path, mode="a", fingerprint=fingerprint)
        if dtype not in (None, store.dtype):
            raise RequestError(f"dtype {dtype}: the rows of {store_path} are {store.dtype}; leave it out")
        _check_rows(store._header, ids, sketches, others, str(sketches_path))
        return _append(store, collection, step, records, ids, sketches, others), len(ids)
    if fingerprint is None:
        raise RequestError(
            f"{store_path}: no store there; to create one, say how the sketches were made: --fingerprint FILE"
        )
    dim, dtype = sketches.shape[1], dtype or "int8"
    if "layout" in fingerprint:
        check_layout(fingerprint["layout"], dim, str(fingerprint_path))
    _check_rows(new_header(dim, dtype, None, None, fingerprint), ids, sketches, others, str(sketches_path))
    if not records:
        raise RequestError(f"{store_path}: a new store knows no problem yet: give their records, --problems FILE")
    known = {record["id"] for record in records}
    unknown = next((one for one in ids if one not in known), None)
    if unknown is not None:
        raise RequestError(f"{sketches_path}: problem id {unknown!r} is not in {problems_path}; add its record there")
    store = create(store_path, dim=dim, fingerprint=fingerprint, dtype=dtype)
    with undone_on(BaseException, store):
        return _append(store, collection, step, records, ids, sketches, others), len(ids)


def _append(
    store: Store,
    collection: str,
    step: int,
    records: list[dict],
    ids: list[str],
    sketches: np.ndarray,
    others: dict[str, Any],
) -> int:
    before = store.n_problems(collection) if collection in store.collections else 0
    with store.writer(collection, step=step, records=records) as writer:
        writer.append(ids, sketches, **others)
    return store.n_problems(collection) - before


def _check_rows(
    header: Header, ids: list[str], sketches: np.ndarray, others: dict[str, np.ndarray], where: str
) -> None:
    """What `Writer.append` checks, before anything is written."""
    rows = NewRows(ids, where)
    rows.sketches(sketches, others.get("norms"), None, None, header)
    rows.pass_rates(others.get("pass_rate"))
    rows.counts(others.get("n_rollouts"))


def _read_sketches(path: Path) -> tuple[list[str], np.ndarray, dict[str, np.ndarray]]:
    """The ids, the sketches as float32 [rows, D], and the other columns by their names in `Writer.append`."""
    file = open_rows(path, COLUMNS, "sketch")
    if not isinstance(file, ParquetRows):
        raise RequestError(f"{path}: not a Parquet file, expected one with the columns id and sketch")
    unread = check_columns(file.names, COLUMNS, str(path))
    for name in ("id", "sketch"):
        if name not in file.names:
            raise RequestError(f"{path}: field {name!r} is missing, found {', '.join(file.names)}")
    if unread:
        log.warning("%s: columns that are not read: %s", path, ", ".join(map(repr, unread)))
    table = file.table()
    if not len(table):
        raise RequestError(f"{path}: has no rows")
    others = {OF_WRITER[name]: _numbers(table, name, path) for name in OF_WRITER if name in table.column_names}
    return _ids(table, path), _matrix(table, path), others


def _ids(table: pa.Table, path: Path) -> list[str]:
    column = table.column("id")
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise RequestError(f"{path}: column 'id' is {column.type}, expected text")
    _refuse_null(column, "id", path)
    return column.to_pylist()


def _matrix(table: pa.Table, path: Path) -> np.ndarray:
    """The `sketch` column as float32 [rows, D]."""
    column = table.column("sketch")
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise RequestError(f"{path}: column 'sketch' is {kind}, expected lists of numbers")
    _refuse_null(column, "sketch", path)
    lengths = np.concatenate([_lengths(chunk) for chunk in column.chunks])
    if (lengths != lengths[0]).any():
        row = int(np.flatnonzero(lengths != lengths[0])[0])
        raise RequestError(
            f"{path}, row {row + 1}: sketch has {lengths[row]} dimensions, the one in row 1 has {lengths[0]}"
        )
    if not lengths[0]:
        raise RequestError(f"{path}, row 1: sketch is empty, expected at least one number")
    parts = [chunk.flatten() for chunk in column.chunks]
    for start, part in zip(np.cumsum([0, *map(len, parts)]), parts, strict=False):
        if part.null_count:
            place = int(start) + part.is_null().to_pylist().index(True)
            raise RequestError(
                f"{path}, row {place // lengths[0] + 1}: sketch is null at dimension {place % lengths[0]}, expected "
                "a number"
            )
    numbers = [part.to_numpy(zero_copy_only=False) for part in parts]
    with np.errstate(over="ignore"):
        return np.concatenate([np.asarray(part, np.float32) for part in numbers]).reshape(len(table), -1)


def _lengths(chunk: pa.Array) -> np.ndarray:
    if pa.types.is_fixed_size_list(chunk.type):
        return np.full(len(chunk), chunk.type.list_size)
    return chunk.value_lengths().to_numpy(zero_copy_only=False)


def _numbers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """A column of numbers, float64 [rows]; an unknown pass rate, null, is nan."""
    column = table.column(name)
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise RequestError(f"{path}: column {name!r} is {column.type}, expected numbers")
    if name != "pass_rate":
        _refuse_null(column, name, path)
    return column.to_numpy().astype(np.float64)


def _refuse_null(column: pa.ChunkedArray, name: str, path: Path) -> None:
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise RequestError(f"{path}, row {row + 1}: {name} is null, expected a value")
