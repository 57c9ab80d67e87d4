"""Problem table of a generation: Parquet parts; the array `problem` holds indices into their rows, in order.

The number of parts stays small: a new part merges the parts before it that are at most twice its size. So adding
problems a few at a time rewrites each problem only a logarithmic number of times.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from gradstore.durable import crc32c, replace_file
from gradstore.errors import DamagedError, RequestError, check_known
from gradstore.id_lookup import IdLookup, id_array
from gradstore.inside import file_inside
from gradstore.layout import store_of
from gradstore.manifest import Manifest, Part, part_number, read_manifest
from gradstore.parquet import no_rows, table_bytes
from gradstore.parquet_headers import RowGroup
from gradstore.problems import message_text
from gradstore.schema import ANYTHING, Checker, lists, load_json, mapping, record, text
from gradstore.stored_parquet import read_footer, read_stored, within

if TYPE_CHECKING:
    import pyarrow as pa

_MESSAGES = Checker(lists(record({"role": text(), "content": ANYTHING}, open=True), least=1))
_EXTRA = Checker(mapping(ANYTHING))
_FEW = 500
"""Up to this number of texts, reading them one by one is faster than a call of an Arrow kernel."""
_FEW_ROWS = 100
"""Up to this number of rows, cutting them out of a table takes less time than loading what Arrow's kernels need."""
GROUP_ROWS = 2048
"""Rows of a row group: what is read to show one problem."""
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


def plain_table(records: Sequence[Any]) -> "pa.Table | None":
    """Unchecked records as rows, as `to_table` converts them; None if one of them has a field of an unusual type.

    The rows say nothing about whether the records are valid: they are only compared with rows of valid ones.
    """
    import pyarrow as pa

    if set(map(type, records)) != {dict}:
        return None
    names = {"id", "source", "prompt", "ground_truth", "tags", "extra"}
    if not all(record.keys() <= names for record in records):
        return None

    def column(name: str, missing: Any) -> list:
        values = [record.get(name, missing) for record in records]
        return [missing if value is None else value for value in values] if None in values else values

    columns = {name: column(name, "") for name in ("id", "source", "ground_truth")} | {"tags": column("tags", [])}
    prompts, extras = column("prompt", ""), column("extra", {})
    kinds = set(map(type, prompts))
    if (
        not set(map(type, columns["tags"])) <= {list, tuple}
        or not kinds <= {str, list}
        or set(map(type, extras)) != {dict}
    ):
        return None
    texts = chain(columns["id"], columns["source"], columns["ground_truth"], *columns["tags"])
    if set(map(type, texts)) != {str}:
        return None
    try:
        columns["messages"] = [_exact(own) if isinstance(own, list) else None for own in prompts]
        if list in kinds:
            prompts = [_shown(own) if isinstance(own, list) else own for own in prompts]
        columns["prompt"] = prompts
        columns["extra"] = [_exact(extra) if extra else "{}" for extra in extras]
        return pa.table(columns, schema=table_schema())
    except (pa.ArrowException, TypeError, ValueError, AttributeError, KeyError, IndexError, RecursionError):
        return None


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
    """The problems that one manifest names. Problem numbers count its rows; texts are read for the rows asked for.

    Ids and columns are kept once they were read: ids by row group, or all of them as one Arrow column.
    """

    def __init__(self, collection: Path, manifest: Manifest) -> None:
        self._collection = collection
        self._manifest = manifest
        self._starts = np.cumsum([0, *(part.rows for part in manifest.parts)])
        self._footers: dict[int, list[RowGroup]] = {}
        self._group_ids: dict[tuple[int, int], pa.Array] = {}
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._after = 0  # The row after the last requested ones.

    def __len__(self) -> int:
        return self._manifest.n_problems

    def serves(self, manifest: Manifest) -> bool:
        """Whether another manifest of the collection names the same problems."""
        return (manifest.generation, manifest.parts) == (self._manifest.generation, self._manifest.parts)

    @cached_property
    def id_column(self) -> "pa.Array":
        """Every id, in order of addition."""
        import pyarrow as pa

        return pa.concat_arrays(self._load(["id"])["id"].chunks or [pa.array([], pa.large_string())])

    @cached_property
    def ids(self) -> np.ndarray:
        """Object array of str, in order of addition; `ids_at` and `find` need no Python string for each problem."""
        return self.id_column.to_numpy(zero_copy_only=False).astype(object)

    @cached_property
    def lookup(self) -> IdLookup:
        """Rows by id; DamagedError for an id that occurs more than once."""
        found = IdLookup(self.id_column)
        twice = found.repeated()
        if twice is not None:
            folder = self._manifest.problems_folder(self._collection)
            raise DamagedError(f"{folder}: damaged: problem id {twice!r:.80} occurs more than once")
        return found

    def ids_at(self, rows: np.ndarray) -> np.ndarray:
        """Ids of some problems, object array of str; reads only their row groups and decodes only these ids."""
        if "id_column" in self.__dict__ or len(rows) > _FEW:
            return _texts(self.id_column, rows)
        ids = np.empty(len(rows), dtype=object)
        for number, here, row_in in self._by_part(rows):
            group_of, starts = self._groups(number, row_in)
            needed = np.unique(group_of).tolist()
            unread = [group for group in needed if (number, group) not in self._group_ids]
            if unread:
                column = self._read(number, unread, ["id"])["id"].combine_chunks()
                cuts = np.cumsum([0, *(starts[group + 1] - starts[group] for group in unread)])
                for group, (start, stop) in zip(unread, pairwise(cuts.tolist()), strict=True):
                    self._group_ids[number, group] = column.slice(start, stop - start)
            for group in needed:
                own = group_of == group
                ids[here[own]] = _texts(self._group_ids[number, group], row_in[own] - starts[group])
        return ids

    def take(self, rows: np.ndarray, columns: list[str] | None = None) -> "pa.Table":
        """Records of some problems, in their order; reads only the row groups that hold them. columns: None for all."""
        import pyarrow as pa

        names = [name for name in table_schema().names if columns is None or name in columns]
        if all(name in self._columns for name in names):
            return self.table_of(names).take(rows)
        pieces, places = [_nothing(names)], [np.zeros(0, np.int64)]
        for number, here, row_in in self._by_part(rows):
            group_of, starts = self._groups(number, row_in)
            needed = np.unique(group_of)
            table = self._read(number, needed.tolist(), names)
            lengths = np.diff(starts)[needed]
            before = np.cumsum(lengths) - lengths  # of each group in the table
            which = np.searchsorted(needed, group_of)
            pieces.append(_taken(table, row_in - starts[group_of] + before[which]))
            places.append(here)
        found = pa.concat_tables(pieces)
        order = np.concatenate(places)
        if (order[1:] > order[:-1]).all():
            return found
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return _taken(found, back)

    def table_of(self, columns: list[str]) -> "pa.Table":
        """Some columns of every problem; kept in memory."""
        import pyarrow as pa

        unread = [name for name in columns if name not in self._columns]
        if unread:
            table = self._load(unread)
            self._columns |= {name: table[name] for name in unread}
        schema = table_schema()
        return pa.table({name: self._columns[name] for name in columns}, pa.schema([schema.field(n) for n in columns]))

    @property
    def table(self) -> "pa.Table":
        """Every record, with every text."""
        return self.table_of(table_schema().names)

    def find(self, ids: "Iterable[object] | pa.Array") -> np.ndarray:
        """Row of each id, int64; -1 for what is no id of the collection."""
        asked = id_array(ids)
        # Rows are mostly written and records given again in the order of problems: comparing needs no lookup.
        rows = self._after + np.arange(len(asked))
        if not self._is_run(asked):
            rows = self.lookup.find(asked)
        known = rows[rows >= 0]
        if len(known):
            self._after = (int(known[-1]) + 1) % len(self)
        return rows

    def rows_of(self, ids: Sequence[str], where: str) -> np.ndarray:
        """Rows of the ids, int64; RequestError names the first unknown id."""
        rows = self.find(ids)
        if len(rows) and rows.min() < 0:
            unknown = list(ids)[int(np.argmax(rows < 0))]
            advice = "add its problem first (Store.add_problems)"
            raise RequestError(f"{where}: problem id {unknown!r} is not in the collection; {advice}")
        return rows

    def _is_run(self, asked: "pa.Array") -> bool:
        """Whether these are the ids after those that were asked for last."""
        stop = self._after + len(asked)
        if not len(asked) or stop > len(self):
            return False
        return bool(asked.equals(self.id_column.slice(self._after, len(asked))))

    def _by_part(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each part that has some of the rows: its number, their places among the rows, and their rows in it."""
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(part_of).tolist():
            here = np.flatnonzero(part_of == number)
            yield number, here, rows[here] - self._starts[number]

    def _groups(self, number: int, row_in: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row group of each row of a part, and the first row of each of its groups and the end, int64."""
        try:
            footer = self._footer(number)
        except DamagedError:
            # A later writer may have merged the part: `_read` then reads it whole from the newer parts.
            footer = self._footers[number] = [RowGroup(self._manifest.parts[number].rows, [])]
        starts = np.cumsum([0, *(group.rows for group in footer)])
        return np.searchsorted(starts, row_in, side="right") - 1, starts

    def _footer(self, number: int) -> list[RowGroup]:
        """The row groups of a part; kept once they were read."""
        if number not in self._footers:
            part = self._manifest.parts[number]
            with _opened(self._collection, self._manifest, part) as (file, path):
                self._footers[number] = read_footer(file, path, part.rows)
        return self._footers[number]

    def _read(self, number: int, groups: list[int], columns: list[str]) -> "pa.Table":
        """Columns of some row groups of a part, ascending."""
        part, footer = self._manifest.parts[number], self._footers[number]
        try:
            if not footer[0].chunks:
                raise DamagedError(f"{part.file}: was merged")
            return read_part(self._collection, self._manifest, part, columns, groups, footer)
        except DamagedError:
            whole = self._load(columns).slice(int(self._starts[number]), part.rows)
            starts = np.cumsum([0, *(group.rows for group in footer)])
            return whole.take(np.concatenate([np.arange(starts[group], starts[group + 1]) for group in groups]))

    def _load(self, columns: list[str]) -> "pa.Table":
        import pyarrow as pa

        try:
            tables = [
                read_part(self._collection, self._manifest, part, columns, footer=self._footer(number))
                for number, part in enumerate(self._manifest.parts)
            ]
        except DamagedError:
            # A later writer may have merged small parts. The same problems then lead the newer parts.
            newer = read_manifest(self._collection)
            if newer.generation != self._manifest.generation or newer.parts == self._manifest.parts:
                raise
            tables = [read_part(self._collection, newer, part, columns) for part in newer.parts]
        schema = table_schema()
        schema = pa.schema([schema.field(name) for name in schema.names if name in columns])
        whole = pa.concat_tables(tables) if tables else _nothing(schema.names)
        return whole.slice(0, len(self))


def checked_columns(columns: Sequence[str] | None) -> list[str]:
    """Names of columns, in the table's order; None: all. RequestError for an unknown one."""
    names = table_schema().names
    if columns is None:
        return names
    for name in columns:
        check_known("column", name, names)
    return [name for name in names if name in columns]


def repeated(ids: Sequence[str]) -> str | None:
    """The first id that occurs more than once; None if all are different."""
    if len(set(ids)) == len(ids):
        return None
    return next(problem_id for problem_id, count in Counter(ids).items() if count > 1)


def _nothing(columns: list[str]) -> "pa.Table":
    """Some columns without a row."""
    import pyarrow as pa

    schema = table_schema()
    return no_rows(pa.schema([schema.field(name) for name in columns]))


def _taken(table: "pa.Table", rows: np.ndarray) -> "pa.Table":
    """Some rows of a table, in their order. A few are cut out, because Arrow's kernels load pandas with the first."""
    import pyarrow as pa

    if len(rows) > _FEW_ROWS:
        return table.take(rows)
    pieces = [table.slice(row, 1) for row in rows.tolist()]
    return pa.concat_tables(pieces).combine_chunks() if pieces else table.slice(0, 0)


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
    data = table_bytes(table, write_page_checksum=True, row_group_size=GROUP_ROWS)
    if not within(table.nbytes, len(data)):  # Texts that compress this far would not be read again.
        data = table_bytes(
            table, write_page_checksum=True, compression="none", use_dictionary=False, row_group_size=GROUP_ROWS
        )
    name = f"part-{number:06d}.parquet"
    replace_file(folder / name, data)
    return Part(name, table.num_rows, len(data), crc32c(data))


def read_part(
    collection: Path,
    manifest: Manifest,
    part: Part,
    columns: list[str] | None = None,
    groups: list[int] | None = None,
    footer: list[RowGroup] | None = None,
) -> "pa.Table":
    """Read columns of a part (None: all); checks the checksum of every page read.

    groups: the row groups to read (None: all); footer: the part's, where it was read before.
    """
    with _opened(collection, manifest, part) as (file, path):
        return read_stored(file, path, table_schema(), columns=columns, rows=part.rows, groups=groups, footer=footer)


@contextmanager
def _opened(collection: Path, manifest: Manifest, part: Part) -> Iterator[tuple[BinaryIO, Path]]:
    path = manifest.problems_folder(collection) / part.file
    with file_inside(path, store_of(collection)) as file:
        size = file.seek(0, 2)
        if size != part.bytes:
            raise DamagedError(f"{path}: damaged: {size} bytes instead of {part.bytes}; see `gradstore verify`")
        yield file, path


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


def _exact(value: Any) -> str:
    """JSON as `_json` writes it; ValueError for NaN, which is not kept."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
