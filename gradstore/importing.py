"""Import of problems and sketches from other tools into a store; a file is checked completely before any write."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradstore.errors import RequestError
from gradstore.problems import read_problems
from gradstore.store import Store, create
from gradstore.store import open as open_store


def import_problems(store_path: Path, collection: str, problems_path: Path) -> int:
    """Add the problems of a JSONL or Parquet file to a collection of an existing store; returns how many were new."""
    return open_store(store_path, mode="a").add_problems(collection, read_problems(problems_path))


def import_sketches(
    store_path: Path,
    collection: str,
    sketches_path: Path,
    step: int,
    problems_path: Path | None = None,
    fingerprint_path: Path | None = None,
    dtype: str = "int8",
) -> tuple[int, int]:
    """Append the rows of a Parquet file (id, sketch; optional: norm, pass_rate, n_rollouts) at a step.

    If there is no store, creates one; this needs fingerprint_path, a JSON object that says how the sketches were made.
    If the store exists, a given fingerprint must equal the store's. Returns the numbers of problems and rows added.
    """
    table = _read_parquet(sketches_path)
    sketches = _matrix(table, sketches_path)
    records = None if problems_path is None else read_problems(problems_path)
    fingerprint = None if fingerprint_path is None else _read_object(fingerprint_path)
    store = _open_or_create(store_path, sketches.shape[1], fingerprint, dtype)
    added = 0 if records is None else store.add_problems(collection, records)
    with store.writer(collection, step=step) as writer:
        writer.append(
            table.column("id").to_pylist(),
            sketches,
            norms=_numbers(table, "norm"),
            pass_rate=_numbers(table, "pass_rate"),
            n_rollouts=_numbers(table, "n_rollouts"),
        )
    return added, len(sketches)


def _open_or_create(path: Path, dim: int, fingerprint: dict | None, dtype: str) -> Store:
    if path.exists():
        return open_store(path, mode="a", fingerprint=fingerprint)
    if fingerprint is None:
        raise RequestError(f"{path}: no store there; to create one, say how the sketches were made: --fingerprint FILE")
    return create(path, dim=dim, fingerprint=fingerprint, dtype=dtype)


def _read_parquet(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except pa.ArrowException as error:
        raise RequestError(f"{path}: not a readable Parquet file: {error}") from None
    for name in ("id", "sketch"):
        if name not in table.column_names:
            raise RequestError(f"{path}: field {name!r} is missing, found {', '.join(table.column_names)}")
    if not len(table):
        raise RequestError(f"{path}: has no rows")
    return table


def _matrix(table: pa.Table, path: Path) -> np.ndarray:
    """The `sketch` column as float32 [rows, D]."""
    column = table.column("sketch").combine_chunks()
    rows = column.to_pylist() if not pa.types.is_list(column.type) else None
    lengths = np.diff(column.offsets.to_numpy()) if rows is None else np.array([len(row or []) for row in rows])
    if (lengths != lengths[0]).any():
        row = int(np.flatnonzero(lengths != lengths[0])[0])
        raise RequestError(f"{path}: row {row}: sketch has {lengths[row]} dimensions, row 0 has {lengths[0]}")
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(len(table), -1)


def _numbers(table: pa.Table, name: str) -> np.ndarray | None:
    return table.column(name).to_numpy() if name in table.column_names else None


def _read_object(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise RequestError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
