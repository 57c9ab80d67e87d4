"""Problem table of a generation: Parquet parts; the array `problem` holds indices into their rows, in order.

The number of parts stays small: a new part merges the parts before it that are at most twice its size. So adding
problems a few at a time rewrites each problem only a logarithmic number of times.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from gradstore.durable import crc32c, replace_file
from gradstore.errors import DamagedError, RequestError
from gradstore.id_lookup import IdLookup, hashes_of, id_array
from gradstore.inside import file_inside
from gradstore.kept_ids import LEAST_ROWS, SortedIds, keep_ids, kept_ids
from gradstore.layout import store_of
from gradstore.manifest import Manifest, Part, part_number, read_manifest
from gradstore.parquet import no_rows, table_bytes
from gradstore.parquet_headers import RowGroup
from gradstore.parquet_pages import PAGE_ROWS, ColumnPages, PageFile, column_pages, paged
from gradstore.problem_rows import table_schema
from gradstore.row_digests import DIGEST_ROWS, digests_of, stored_digests
from gradstore.stored_parquet import read_footer, read_metadata, read_stored, within

if TYPE_CHECKING:
    import pyarrow as pa

_FEW = 500
"""Up to this number of texts, reading them one by one is faster than a call of an Arrow kernel."""
_FEW_ROWS = 100
"""Up to this number of rows, cutting them out of a table takes less time than loading what Arrow's kernels need."""
_FEW_CALLS = 16
"""So often are a few ids looked up in the kept lookups; then the column of all ids is read."""
GROUP_ROWS = 2048
"""Rows of a row group where pages cannot be written: what is read to show one problem then."""
GROUP_BYTES = 64 << 20
"""Most bytes of a row group of pages, in memory."""
PART_ROWS = 65536
"""Most problems per part; a full part is not merged again."""


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
        self._sorted: dict[int, SortedIds | None] = {}
        self._few_calls = _FEW_CALLS
        self._digests: dict[int, list[str]] = {}
        self._page_tables: dict[tuple[int, int, tuple[str, ...]], ColumnPages | None] = {}
        self._columns: dict[str, pa.ChunkedArray] = {}
        self.after = 0
        """The row after the last requested ones."""

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
        paged = self._by_pages(rows, ["id"])
        if paged is not None:
            return _texts(paged["id"].combine_chunks(), np.arange(len(rows)))
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
        paged = self._by_pages(rows, names)
        if paged is not None:
            return paged
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
        rows = self._find_few(asked)
        if rows is None:
            # Rows are mostly written and records given again in the order of problems: comparing needs no lookup.
            rows = self.after + np.arange(len(asked))
            if not self._is_run(asked):
                rows = self.lookup.find(asked)
        known = rows[rows >= 0]
        if len(known):
            self.after = (int(known[-1]) + 1) % len(self)
        return rows

    def digest_from(self, row: int) -> tuple[int, str | None]:
        """The row at which the block of digests with this row ends, and its digest if it begins with this row.

        (row, None) where the parts have none.
        """
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        if row >= len(self):
            return row, None
        start, part = int(self._starts[number]), self._manifest.parts[number]
        if number not in self._digests:
            self._digests[number] = []
            with suppress(DamagedError), _opened(self._collection, self._manifest, part) as (file, path):
                self._digests[number] = stored_digests(read_metadata(file, path), part.rows)
        if not self._digests[number]:
            return row, None
        block, within = divmod(row - start, DIGEST_ROWS)
        return start + min((block + 1) * DIGEST_ROWS, part.rows), None if within else self._digests[number][block]

    def rows_of(self, ids: "Sequence[str] | pa.Array", where: str) -> np.ndarray:
        """Rows of the ids, int64; RequestError names the first unknown id."""
        rows = self.find(ids)
        if len(rows) and rows.min() < 0:
            unknown = (list(ids) if isinstance(ids, Sequence) else ids.to_pylist())[int(np.argmax(rows < 0))]
            advice = "add its problem first (Store.add_problems)"
            raise RequestError(f"{where}: problem id {unknown!r} is not in the collection; {advice}")
        return rows

    def _find_few(self, asked: "pa.Array") -> np.ndarray | None:
        """Rows of a few ids, without the column of all ids; None where only that can tell.

        For the first calls alone: somebody who looks up ids again and again is served faster by the whole column. So is
        everybody where that is short.
        """
        short = len(self) < 4 * LEAST_ROWS or "id_column" in self.__dict__
        if short or not 0 < len(asked) <= _FEW or not self._few_calls:
            return None
        self._few_calls -= 1
        hashes, rows = hashes_of(asked), np.full(len(asked), -1)
        try:
            for number, start in enumerate(self._starts[:-1].tolist()):
                own = self._sorted_ids(number)
                if own is None:
                    return None
                proposed = own.propose(hashes)
                if (rows[proposed >= 0] >= 0).any():
                    return None
                rows = np.where(proposed >= 0, start + proposed, rows)
        except DamagedError:
            return None
        return rows if rows.min() >= 0 and self.ids_at(rows).tolist() == asked.to_pylist() else None

    def _sorted_ids(self, number: int) -> SortedIds | None:
        """The kept lookup of a part, or that of its ids if it is small; None without one."""
        if number not in self._sorted:
            part = self._manifest.parts[number]
            found = kept_ids(self._collection, part)
            if found is None and part.rows < LEAST_ROWS:
                table = read_part(self._collection, self._manifest, part, ["id"], footer=self._footer(number))
                found = SortedIds.of(table["id"].combine_chunks())
            self._sorted[number] = found
        return self._sorted[number]

    def _is_run(self, asked: "pa.Array") -> bool:
        """Whether these are the ids after those that were asked for last."""
        stop = self.after + len(asked)
        if not len(asked) or stop > len(self):
            return False
        return bool(asked.equals(self.id_column.slice(self.after, len(asked))))

    def _by_part(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each part that has some of the rows: its number, their places among the rows, and their rows in it."""
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(part_of).tolist():
            here = np.flatnonzero(part_of == number)
            yield number, here, rows[here] - self._starts[number]

    def _by_pages(self, rows: np.ndarray, columns: list[str]) -> "pa.Table | None":
        """Like `take`, from the pages that hold the rows; None where there are no such pages or nearly all would do."""
        if not len(rows) or len(rows) * PAGE_ROWS > len(self):
            return None
        try:
            file, place = None, np.empty(len(rows), np.int64)
            for number, here, row_in in self._by_part(rows):
                with _opened(self._collection, self._manifest, self._manifest.parts[number]) as (part, _):
                    group_of, starts = self._groups(number, row_in)
                    for group in np.unique(group_of).tolist():
                        own = here[group_of == group]
                        within = row_in[group_of == group] - starts[group]
                        found = self._pages(part, number, group, columns)
                        if found is None:
                            return None
                        file = file or PageFile(part, self._footers[number][group].chunks)
                        place[own] = file.add(part, found, within)
            assert file is not None
            made, group = file.made()
            table = read_stored(made, self._collection, table_schema(), columns=columns, rows=file.rows, footer=[group])
        except (DamagedError, ValueError, OSError):
            return None  # Whole row groups tell what is wrong, or come from the parts that a later writer made.
        return _taken(table, place)

    def _pages(self, file: BinaryIO, number: int, group: int, columns: list[str]) -> list[ColumnPages] | None:
        """Pages of some columns of a row group; None if they are not written so. Kept once they were read."""
        found: list[ColumnPages] = []
        for chunk in self._footers[number][group].chunks:
            if chunk.path[0] not in columns:
                continue
            key = number, group, chunk.path
            if key not in self._page_tables:
                self._page_tables[key] = column_pages(file, self._footers[number][group], chunk)
            own = self._page_tables[key]
            if own is None or (found and own.rows != found[0].rows):
                return None
            found.append(own)
        return found or None

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
    table = table.replace_schema_metadata(digests_of(table))
    options = paged()
    group = GROUP_BYTES * len(table) // max(table.nbytes, 1) // PAGE_ROWS * PAGE_ROWS
    group = max(group, PAGE_ROWS) if options else GROUP_ROWS
    data = table_bytes(table, write_page_checksum=True, row_group_size=group, **options)
    if not within(table.nbytes, len(data)):  # Texts that compress this far would not be read again.
        data = table_bytes(
            table, write_page_checksum=True, compression="none", use_dictionary=False, row_group_size=GROUP_ROWS
        )
    name = f"part-{number:06d}.parquet"
    replace_file(folder / name, data)
    part = Part(name, table.num_rows, len(data), crc32c(data))
    keep_ids(folder.parent.parent, part, table["id"].combine_chunks())
    return part


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
