"""Write rollout files: JSON Lines, which can be appended to and resumed, or Parquet, which is smaller.

JSON Lines grows in place: rows are on disk when `append` returns. Parquet has its index at the end, so it is written
beside its final name and renamed when complete.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from gradstore.engine.rollouts.rollout import Rollout
from gradstore.errors import RequestError, check_known

ROW_GROUP_ROWS = 4096
SUFFIXES = (".jsonl", ".parquet")
"""Suffixes of files that are written, which choose their format."""

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_COLUMNS: dict[str, pa.DataType] = {
    "problem_id": pa.string(),
    "prompt": pa.string(),
    "prompt_ids": pa.list_(pa.int32()),
    "response": pa.string(),
    "response_ids": pa.list_(pa.int32()),
    "response_mask": pa.list_(pa.int8()),
    "rollout": pa.string(),
    "reward": pa.float64(),
    "logprobs": pa.list_(pa.float32()),
    "reference_logprobs": pa.list_(pa.float32()),
    "source": pa.string(),
    "ground_truth": pa.string(),
    "tags": pa.list_(pa.string()),
    "finish_reason": pa.string(),
    "extra": pa.string(),
    "step": pa.int64(),
}


class RolloutWriter(Protocol):
    """Writer that `write_rollouts` yields; rows keep the order in which they are appended."""

    def append(self, rollouts: Iterable[Rollout]) -> None: ...


@contextmanager
def write_rollouts(path: str | Path, *, append: bool = False) -> Iterator[RolloutWriter]:
    """Yield a writer of rollouts; the path's suffix sets the format: .jsonl or .parquet.

    append: continue at the end of an existing .jsonl file. Without it, an existing file is replaced.
    An exception inside the context leaves no Parquet file; a JSON Lines file keeps the rows appended so far.
    Raises RequestError for another suffix, or for a folder that does not exist or cannot be written.
    """
    path = Path(path)
    check_known(f"{path}: the suffix", path.suffix, SUFFIXES)
    if append and path.suffix != ".jsonl":
        raise RequestError(f"{path}: only a .jsonl file can be appended to")
    try:
        if path.suffix == ".jsonl":
            with path.open("ab" if append else "wb") as file:
                yield _JsonLinesWriter(file)
        else:
            yield from _parquet(path)
    except OSError as error:
        raise RequestError(f"{error.filename or path}: cannot be written: {error.strerror or error}") from None


def json_line(rollout: Rollout) -> bytes:
    """A rollout as one line of a .jsonl file."""
    return json.dumps(rollout.row(), ensure_ascii=False, allow_nan=False).encode() + b"\n"


class _JsonLinesWriter:
    def __init__(self, file: Any) -> None:
        self._file = file

    def append(self, rollouts: Iterable[Rollout]) -> None:
        self._file.write(b"".join(map(json_line, rollouts)))
        self._file.flush()
        os.fsync(self._file.fileno())


def _parquet(path: Path) -> Iterator[RolloutWriter]:
    unfinished = path.with_name(path.name + ".unfinished")
    writer = _ParquetWriter(unfinished)
    try:
        yield writer
        writer.close()
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        writer.abandon()
        unfinished.unlink(missing_ok=True)


class _ParquetWriter:
    """Buffers rows into row groups of one size, so that a file does not depend on how rows were appended."""

    def __init__(self, path: Path) -> None:
        self._path, self._rows = path, []  # type: Path, list[dict[str, Any]]
        self._writer: pq.ParquetWriter | None = None
        self._schema: pa.Schema | None = None
        path.touch()

    def append(self, rollouts: Iterable[Rollout]) -> None:
        for rollout in rollouts:
            row = rollout.row()
            self._check_prompt(row)
            if "extra" in row:
                row["extra"] = json.dumps(row["extra"], ensure_ascii=False)
            self._rows.append(row)
            if len(self._rows) == ROW_GROUP_ROWS:
                self._flush()

    def close(self) -> None:
        self._flush()
        self.abandon()

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _check_prompt(self, row: dict[str, Any]) -> None:
        prompt = row.get("prompt")
        if self._schema is None:
            columns = _COLUMNS | ({"prompt": _MESSAGES} if isinstance(prompt, list) else {})
            self._schema = pa.schema(list(columns.items()))
        if isinstance(prompt, list) and not all(
            m.keys() == {"role", "content"} and isinstance(m["content"], str) for m in prompt
        ):
            raise RequestError(
                f"problem {row['problem_id']!r}: Parquet keeps messages of role and content text alone; write .jsonl"
            )
        if prompt is not None and isinstance(prompt, list) != (self._schema.field("prompt").type == _MESSAGES):
            raise RequestError(
                f"problem {row['problem_id']!r}: Parquet cannot mix prompts of text and of messages; write .jsonl"
            )

    def _flush(self) -> None:
        schema = self._schema or pa.schema(list(_COLUMNS.items()))
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, schema)
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=schema))
            self._rows = []
