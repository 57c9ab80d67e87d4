"""Problem table of a generation: Parquet parts; the array `problem` holds indices into their rows, in order.

The number of parts stays small: a new part merges the parts before it that are at most twice its size. So adding
problems a few at a time rewrites each problem only a logarithmic number of times.
"""

import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.durable import at_once, crc32c, replace_file
from gradstore.errors import DamagedError, RequestError
from gradstore.inside import file_inside
from gradstore.layout import store_of
from gradstore.manifest import Manifest, Part, part_number, read_manifest
from gradstore.parquet import table_bytes
from gradstore.problems import message_text
from gradstore.schema import ANYTHING, Checker, lists, load_json, mapping, record, text
from gradstore.stored_parquet import read_stored, within

if TYPE_CHECKING:
    import pyarrow as pa

_MESSAGES = Checker(lists(record({"role": text(), "content": ANYTHING}, open=True), least=1))
_EXTRA = Checker(mapping(ANYTHING))
_FEW = 500
"""Up to this number of texts, reading them one by one is faster than a call of an Arrow kernel."""
PART_ROWS = 65536
"""Most problems per part; a full part is not merged again."""


def table_schema() -> "pa.Schema":
    """Columns of a part. Large strings, because a million prompts exceed the two gigabytes of 32-bit offsets."""
    import pyarrow as pa

    text = pa.large_string()
    return pa.schema(
        [
            pa.field("id", text, nullable=False),
            pa.field("source", text, nullable=False),
            pa.field("prompt", text, nullable=False),
            pa.field("messages", text),
            pa.field("ground_truth", text, nullable=False),
            pa.field("tags", pa.list_(pa.string()), nullable=False),
            pa.field("extra", text, nullable=False),
        ]
    )


def to_table(records: Sequence[dict]) -> "pa.Table":
    """Convert canonical records to rows; for a chat prompt, `messages` is JSON and `prompt` the last user message."""
    import pyarrow as pa

    columns: dict[str, list] = {name: [] for name in table_schema().names}
    for problem in records:
        prompt = problem["prompt"]
        chat = not isinstance(prompt, str)
        for name in ("id", "source", "ground_truth", "tags"):
            columns[name].append(problem[name])
        columns["prompt"].append(_shown(prompt) if chat else prompt)
        columns["messages"].append(_kept(prompt, problem["id"], "prompt") if chat else None)
        columns["extra"].append(_kept(problem["extra"], problem["id"], "extra") if problem["extra"] else "{}")
    return pa.table(columns, schema=table_schema())


def to_records(table: "pa.Table", where: str) -> list[dict]:
    """Convert rows of a problem table back to canonical records; DamagedError, with `where`, for one that is none."""
    return [
        {
            "id": row["id"],
            "source": row["source"],
            "prompt": row["prompt"] if row["messages"] is None else _stored(_MESSAGES, row, "messages", where),
            "ground_truth": row["ground_truth"],
            "tags": row["tags"],
            "extra": _stored(_EXTRA, row, "extra", where) if row["extra"] != "{}" else {},
        }
        for row in table.to_pylist()
    ]


def _stored(checker: Checker, row: dict, field: str, where: str) -> Any:
    """The value of a column of JSON. NaN and Infinity, which earlier versions stored, become None."""
    value = checker.parse(row[field], f"{where}, problem {row['id']!r:.80}, {field}", nan=True)
    odd = "NaN" in row[field] or "Infinity" in row[field]
    return json.loads(row[field], parse_constant=lambda _: None) if odd else value


class ProblemTable:
    """The problems that one manifest names; loaded on first use."""

    def __init__(self, collection: Path, manifest: Manifest) -> None:
        self._collection = collection
        self._manifest = manifest
        self._part_ids: dict[int, pa.Array] = {}
        self._after = 0  # The row after the last requested ones.

    def __len__(self) -> int:
        return self._manifest.n_problems

    def serves(self, manifest: Manifest) -> bool:
        """Whether another manifest of the collection names the same problems."""
        return (manifest.generation, manifest.parts) == (self._manifest.generation, self._manifest.parts)

    @cached_property
    def id_column(self) -> "pa.Array":
        """Every id, in order of addition."""
        return self._load(["id"])["id"].combine_chunks()

    @cached_property
    def ids(self) -> np.ndarray:
        """Object array of str, in order of addition."""
        return self.id_column.to_numpy(zero_copy_only=False).astype(object)

    def ids_at(self, rows: np.ndarray) -> np.ndarray:
        """Ids of some problems, object array of str; reads only their parts and decodes only these ids."""
        if "id_column" in self.__dict__:
            return _texts(self.id_column, rows)
        ids = np.empty(len(rows), dtype=object)
        starts = np.cumsum([0, *(part.rows for part in self._manifest.parts)])
        part_of = np.searchsorted(starts, rows, side="right") - 1
        numbers = np.unique(part_of).tolist()
        at_once(self._ids_of_part, [number for number in numbers if number not in self._part_ids])
        for number in numbers:
            here = np.flatnonzero(part_of == number)
            ids[here] = _texts(self._ids_of_part(number), rows[here] - starts[number])
        if len(self._part_ids) == len(self._manifest.parts) > 0:
            self._join_parts(starts)
        return ids

    def _join_parts(self, starts: np.ndarray) -> None:
        """Join the ids of all parts into one column; the parts become views of it."""
        import pyarrow as pa

        self.id_column = pa.concat_arrays([self._part_ids[number] for number in range(len(self._part_ids))])
        self._part_ids = {
            number: self.id_column.slice(start, stop - start)
            for number, (start, stop) in enumerate(pairwise(starts.tolist()))
        }

    def _ids_of_part(self, number: int) -> "pa.Array":
        if number not in self._part_ids:
            part = self._manifest.parts[number]
            try:
                table = read_part(self._collection, self._manifest, part, ["id"])
            except DamagedError:
                # A later writer may have merged the part: then read the whole column from the newer parts.
                start = sum(earlier.rows for earlier in self._manifest.parts[:number])
                table = self._load(["id"]).slice(start, part.rows)
            self._part_ids[number] = table["id"].combine_chunks()
        return self._part_ids[number]

    @cached_property
    def index(self) -> dict[str, int]:
        """id -> row."""
        found = {problem_id: row for row, problem_id in enumerate(self.ids)}
        twice = repeated(self.ids.tolist()) if len(found) < len(self) else None
        if twice is not None:
            folder = self._manifest.problems_folder(self._collection)
            raise DamagedError(f"{folder}: damaged: problem id {twice!r:.80} occurs more than once")
        return found

    @cached_property
    def table(self) -> "pa.Table":
        return self._load(None)

    def rows_of(self, ids: Sequence[str], where: str) -> np.ndarray:
        """Rows of the ids, int64; RequestError names the first unknown id."""
        rows = self._after + np.arange(len(ids))
        # Rows are mostly appended in the order of problems, and comparing is ten times faster than a lookup.
        if self.ids[self._after : self._after + len(ids)].tolist() != list(ids):
            rows = self._looked_up(ids, where)
        if len(rows):
            self._after = (int(rows[-1]) + 1) % len(self)
        return rows

    def _looked_up(self, ids: Sequence[str], where: str) -> np.ndarray:
        index = self.index
        try:
            return np.fromiter((index[problem_id] for problem_id in ids), dtype=np.int64, count=len(ids))
        except (KeyError, TypeError):
            unknown = next(name for name in ids if not isinstance(name, str) or name not in index)
            advice = "add its problem first (Store.add_problems)"
            raise RequestError(f"{where}: problem id {unknown!r} is not in the collection; {advice}") from None

    def _load(self, columns: list[str] | None) -> "pa.Table":
        import pyarrow as pa

        try:
            tables = [read_part(self._collection, self._manifest, part, columns) for part in self._manifest.parts]
        except DamagedError:
            # A later writer may have merged small parts. The same problems then lead the newer parts.
            newer = read_manifest(self._collection)
            if newer.generation != self._manifest.generation or newer.parts == self._manifest.parts:
                raise
            tables = [read_part(self._collection, newer, part, columns) for part in newer.parts]
        schema = table_schema()
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns])
        whole = pa.concat_tables(tables) if tables else schema.empty_table()
        return whole.slice(0, len(self))


def repeated(ids: Sequence[str]) -> str | None:
    """The first id that occurs more than once; None if all are different."""
    if len(set(ids)) == len(ids):
        return None
    return next(problem_id for problem_id, count in Counter(ids).items() if count > 1)


def _texts(column: "pa.Array", rows: np.ndarray) -> np.ndarray:
    """Texts at some rows of a large-string column without nulls, object array of str."""
    if len(rows) > _FEW:
        return column.take(rows).to_numpy(zero_copy_only=False).astype(object)
    _, offsets, text = column.buffers()
    starts, bytes_of = np.frombuffer(offsets, np.int64)[column.offset :], memoryview(text or b"")
    ends = zip(starts[rows].tolist(), starts[rows + 1].tolist(), strict=True)
    return np.array([str(bytes_of[start:stop], "utf-8") for start, stop in ends], dtype=object)


def add_to_parts(collection: Path, manifest: Manifest, table: "pa.Table") -> tuple[tuple[Part, ...], list[Path]]:
    """Write new problems after those of a manifest, durably.

    Returns the parts for the next manifest, and the files that are no longer needed once it is published.
    """
    import pyarrow as pa

    parts = list(manifest.parts)
    number = part_number(parts[-1].file) + 1 if parts else 0
    swallowed: list[Part] = []
    rows = table.num_rows
    while parts and parts[-1].rows <= 2 * rows and parts[-1].rows + rows <= PART_ROWS:
        swallowed.insert(0, parts.pop())
        rows += swallowed[0].rows
    if swallowed:
        table = pa.concat_tables([*(read_part(collection, manifest, part, None) for part in swallowed), table])
    folder = manifest.problems_folder(collection)
    for start in range(0, table.num_rows, PART_ROWS):
        parts.append(write_part(folder, number, table.slice(start, PART_ROWS)))
        number += 1
    return tuple(parts), [folder / part.file for part in swallowed]


def write_part(folder: Path, number: int, table: "pa.Table") -> Part:
    """Write one Parquet file durably, with a checksum in every page."""
    data = table_bytes(table, write_page_checksum=True)
    if not within(table.nbytes, len(data)):  # Texts that compress this far would not be read again.
        data = table_bytes(table, write_page_checksum=True, compression="none", use_dictionary=False)
    name = f"part-{number:06d}.parquet"
    replace_file(folder / name, data)
    return Part(name, table.num_rows, len(data), crc32c(data))


def read_part(collection: Path, manifest: Manifest, part: Part, columns: list[str] | None = None) -> "pa.Table":
    """Read columns of a part (None: all); checks the checksum of every page read."""
    path = manifest.problems_folder(collection) / part.file
    with file_inside(path, store_of(collection)) as file:
        size = file.seek(0, 2)
        if size != part.bytes:
            raise DamagedError(f"{path}: damaged: {size} bytes instead of {part.bytes}; see `gradstore verify`")
        return read_stored(file, path, table_schema(), columns=columns, rows=part.rows)


def _shown(messages: list[dict]) -> str:
    users = [message for message in messages if message["role"] == "user"] or messages
    return message_text(users[-1]["content"]) or _json(users[-1]["content"])


def _kept(value: Any, problem_id: str, field: str) -> str:
    """A field as JSON; RequestError if it could not be read again."""
    written = _json(value)
    try:
        load_json(written, field, nan=True)
    except DamagedError as error:
        reason = str(error).removeprefix(f"{field}: damaged: ")
        raise RequestError(f"problem {problem_id!r}: field {field!r} cannot be kept: {reason}") from None
    return written


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
