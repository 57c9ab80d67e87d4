"""Store: collections of problems and the history of their sketches, under one fingerprint."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gradstore.attachments import ATTACHMENTS, write_attachment
from gradstore.bases import Basis, add_basis, added_bases, first_basis
from gradstore.collection import CodesOf, Collection, refuse_read_only
from gradstore.description import describe
from gradstore.durable import TEMPORARY, make_folder, replace_file, writing
from gradstore.errors import FingerprintError, RequestError
from gradstore.exclusive import held_file
from gradstore.header import Header, check_fingerprint, check_layout, new_header, read_header
from gradstore.id_lookup import listed
from gradstore.inventory import INVENTORY, OF_STORE, take_inventory
from gradstore.layout import COLLECTIONS, WITHOUT_CODES, ZARR, collection_names, group_json
from gradstore.manifest import Manifest
from gradstore.new_problems import add_problems
from gradstore.outputs import check_output
from gradstore.problem_rows import checked_columns, to_records
from gradstore.session import Session
from gradstore.track import Track
from gradstore.view import MadeBy, View
from gradstore.writer import Writer

if TYPE_CHECKING:
    import pyarrow as pa

    from gradstore.compact import CompactReport
    from gradstore.probes import RecordedProbes
    from gradstore.rounds import RecordedRounds
    from gradstore.verify import Report

Mode = Literal["r", "a"]


def create(
    path: str | Path,
    *,
    dim: int,
    fingerprint: dict,
    dtype: str = "int8",
    chunk_rows: int | None = None,
    column_rows: int | None = None,
    attachments: Mapping[str, bytes] | None = None,
) -> "Store":
    """Create an empty store for sketches of `dim` dimensions and open it for writing.

    fingerprint: every setting that a row depends on, JSON-compatible. If its objective uses importance weights, rows
    also store their effective sample size.
    dtype: how rows are stored: int8, int4, 1bit, fp16 or fp32.
    chunk_rows: rows per chunk file; None: as many as fit in 8 MiB of codes, 65,536 for the other arrays.
    column_rows: rows per chunk file of all arrays except codes, if different.
    attachments: permanent files of the store, by name, such as a fitted projection.
    Raises RequestError if something is already at `path`.
    """
    path = Path(path)
    header = new_header(dim, dtype, chunk_rows, column_rows, fingerprint)
    check_output(path)
    if path.exists() and not is_blank(path):
        raise RequestError(f"{path}: there is something here already; open it, or choose another path")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    make_folder(path)
    make_folder(path / COLLECTIONS)
    replace_file(path / COLLECTIONS / ZARR, group_json({}))
    for name, data in (attachments or {}).items():
        write_attachment(path, name, data)
    if attachments:
        take_inventory(path, path, OF_STORE)
    replace_file(path / ZARR, header.to_bytes())  # Last: with it the folder becomes a store.
    return Store(path, header, "a")


def open(path: str | Path, mode: Mode = "r", fingerprint: dict | None = None) -> "Store":
    """Open the store at `path` for reading ("r") or for reading and writing ("a").

    fingerprint: the settings of the rows that the caller will add; FingerprintError names every field that differs
    from the store's. Raises NotAStoreError if there is no store or its format is newer.
    """
    if mode not in ("r", "a"):
        raise RequestError(f"mode {mode!r} is not known; use 'r' to read or 'a' to read and write")
    path = Path(path)
    header = read_header(path)
    if (path / WITHOUT_CODES).exists():
        raise RequestError(f"{path}: holds what open_remote keeps, no whole store; use open_remote or mirror")
    if fingerprint is not None:
        offered = check_fingerprint(fingerprint)
        if offered != header.fingerprint:
            raise FingerprintError.between(header.fingerprint, offered, str(path))
    return Store(path, header, mode)


class Store:
    """A store on disk; create or open it with `gradstore.create` or `gradstore.open`.

    Methods with a `collection` raise RequestError if there is no collection of that name.
    """

    def __init__(self, path: Path, header: Header, mode: Mode, codes_of: CodesOf | None = None) -> None:
        """codes_of: where codes come from that are not files in the folder (see `CodesOf`)."""
        self.path = path
        self.mode = mode
        self._header = header
        self._codes_of = codes_of
        self._opened: dict[str, Collection] = {}
        self._probes: dict[str, RecordedProbes] = {}

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, dim={self.dim}, dtype={self.dtype!r}, mode={self.mode!r})"

    def _repr_html_(self) -> str:
        from gradstore.notebook import html_table

        about = self.info()["collections"]
        rows = [(name, one["problems"], one["rows"], one["states"]["live"]) for name, one in about.items()]
        columns = ["collection", "problems", "rows", "live"]
        return html_table(repr(self), f"{len(rows)} collections", columns, rows, len(rows))

    @property
    def dim(self) -> int:
        return self._header.dim

    @property
    def dtype(self) -> str:
        """How rows are stored: int8, int4, 1bit, fp16 or fp32."""
        return self._header.dtype

    @property
    def fingerprint(self) -> dict:
        return self._header.fingerprint

    @property
    def row_bytes(self) -> int:
        """Bytes per stored row, summed over all arrays."""
        return sum(array.row_bytes for array in self._header.arrays)

    @property
    def layers(self) -> list[tuple[str, int, int]]:
        """(name, start, stop): each layer's range of dimensions, in the newest basis."""
        return self.bases[-1].layout

    @property
    def bases(self) -> list[Basis]:
        """The projections of the store, oldest first; new rows use the last one."""
        return [first_basis(self.fingerprint, self.dim), *added_bases(self.path, self.dim)]

    @property
    def collections(self) -> list[str]:
        """Names of the collections, sorted."""
        return collection_names(self.path)

    def add_basis(
        self,
        digest: str,
        layout: Sequence[tuple[str, int, int]],
        about: Mapping[str, Any] | None = None,
        attachments: Mapping[str, bytes] | None = None,
    ) -> int:
        """Add a projection with the same number of dimensions, for later rows; returns its number.

        digest: digest of the projection; a known digest returns the existing number. layout: (layer, start, stop), each
        layer's range of dimensions. attachments: the files it needs, by name. RequestError for a layout that does not
        fit the store's dimensions.
        """
        refuse_read_only(self.path, self.mode)
        if not layout or layout[-1][2] != self.dim:
            raise RequestError(f"{self.path}: the basis does not have the store's {self.dim} dimensions")
        check_layout([list(segment) for segment in layout], self.dim, f"{self.path}: the basis")
        if digest == self.bases[0].digest:
            return 0
        about = check_fingerprint(dict(about or {}))
        return add_basis(self.path, self.dim, digest, list(layout), about, attachments or {})

    def add_problems(self, collection: str, records: Iterable[dict]) -> int:
        """Add problem records (creates the collection if it is new); returns the number of new problems.

        A record that is already stored, equal in every field, is accepted and not counted.
        RequestError names id and field of a record that is invalid or differs from the stored one.
        """
        return add_problems(self._writable(collection), records)

    def problems(
        self, collection: str, ids: Sequence[str] | None = None, *, columns: Sequence[str] | None = None
    ) -> "pa.Table":
        """Table of some problems, in the order of ids; RequestError for an unknown id.

        ids None: every problem ever added (until a compaction drops the deleted ones), in order of addition. columns,
        None for all: id, source, prompt (text to show), messages (JSON, null for a text prompt), ground_truth, tags,
        extra (JSON). Only what is asked for is read: ask for few ids or few columns of a large collection.
        """
        known, names = self._collection(collection).snapshot().problems, checked_columns(columns)
        if ids is None:
            return known.table_of(names)
        ids = listed(ids)
        return known.take(known.rows_of(ids, f"collection {collection!r}"), names)

    def n_problems(self, collection: str) -> int:
        """Number of problems ever added (until a compaction drops the deleted ones)."""
        return len(self._collection(collection).snapshot().problems)

    def records(self, collection: str, ids: Sequence[str] | None = None) -> list[dict]:
        """Like `problems`, as canonical records."""
        return to_records(self.problems(collection, ids), f"{self.path}: collection {collection!r}")

    def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Delete all current rows of some problems: later views do not show them. They may be appended again."""
        opened = self._writable(collection)
        with Session(self._header, opened.folder) as session:
            doomed = opened.problems(session.manifest).rows_of(listed(ids), opened.where).tolist()
            if doomed:
                tombstones = session.manifest.tombstones | dict.fromkeys(doomed, session.manifest.rows)
                session.publish(tombstones=tombstones)

    def deleted(self, collection: str) -> list[str]:
        """Ids of the problems that were deleted and not appended again since."""
        return self._collection(collection).deleted()

    def writer(self, collection: str, *, step: int, records: Iterable[dict] = ()) -> Writer:
        """Context manager that appends rows computed at `step`; one writer per collection at a time.

        records: problem records to add as `add_problems` does, but in one publication with the first rows.
        Entering it raises LockedError, which names the holder, while another writer is open.
        """
        return Writer(self._writable(collection), step, len(self.bases), list(records))

    def probes(self, collection: str) -> "RecordedProbes":
        """The stored probes of a collection: `.table(step=..., target=...)` reads them, `.add(...)` adds some."""
        from gradstore.probes import RecordedProbes

        return self._probes.setdefault(collection, RecordedProbes(self._collection(collection)))

    def rounds(self, collection: str) -> "RecordedRounds":
        """The recorded selection rounds of a pool, a sequence of `Round`, oldest first; `.add(...)` records one."""
        from gradstore.rounds import RecordedRounds

        return RecordedRounds(self._collection(collection))

    def view(
        self, collection: str, at: int | None = None, *, basis: int | None = None, since: int | None = None
    ) -> View:
        """View of the newest row of each problem at or before step `at` (None: the newest of all).

        basis: use only rows in this basis; None: rows in all bases. since: use only rows at or after this step.
        """
        for name, step in (("at", at), ("since", since)):
            if step is not None and (isinstance(step, bool) or not hasattr(step, "__index__")):
                raise RequestError(f"{name} must be a step (a whole number) or None, not {step!r}")
        first, last = (None if step is None else step.__index__() for step in (since, at))
        return View(self, self._collection(collection).snapshot(), last, basis, first)

    @staticmethod
    def view_again(path: Path, collection: str, manifest: Manifest, made_by: MadeBy) -> View:
        """A view that was pickled, in another process: of the same commit, whatever was published since."""
        at, basis, since, chosen = made_by
        store = open(path)
        view = View(store, store._collection(collection).snapshot_of(manifest), at, basis, since)
        return view if chosen is None else view.part(chosen)

    def steps(self, collection: str) -> dict[int, int]:
        """Step -> number of rows, ascending, without deleted rows."""
        return self._collection(collection).snapshot().rows_by_step()

    def history(
        self, collection: str, at: int | None = None, *, numbers: bool = False, since: int | None = None
    ) -> "pa.Table":
        """Table of all rows at or before step `at` (None: all), oldest first, without deleted rows.

        Columns: id, step, state (live, no_signal, failed), norm, pass_rate (nan: unknown), n_rollouts. numbers: the
        problem's number (View.problem_numbers) instead of its id. since: only rows at or after this step. Rows of one
        step are in the order of appending. `compact(keep="newest")` drops superseded rows here too.
        """
        from gradstore.history import history_table

        return history_table(self._collection(collection).snapshot(), at, numbers, since)

    def track(self, collection: str, problem_id: str) -> Track:
        """The rows of one problem over all steps; RequestError for an unknown id. Reads no other problem's row."""
        snapshot = self._collection(collection).snapshot()
        return Track(snapshot, int(snapshot.problems.rows_of([problem_id], f"collection {collection!r}")[0]))

    def commit(self, collection: str) -> int:
        """Number of the collection's newest publication."""
        return self._collection(collection).snapshot().manifest.commit

    def check_files(self, *collections: str) -> None:
        """Check that no file of some collections (none named: of all) is missing, cut or of another moment.

        Reads names, sizes, manifests and columns, not codes: those are checked when a chunk is first read. DamagedError
        names the first file at fault. `query`, `select` and `report` do this before anything else.
        """
        from gradstore.presence import check_collection_files, check_store_files

        check_store_files(self.path, self.fingerprint, self.bases)
        for name in collections or self.collections:
            check_collection_files(self._collection(name), len(self.bases), self._codes_of is None)

    def verify(self) -> "Report":
        """Check every stored byte against its checksum; safe while another process writes.

        RequestError for a store that is opened in place at a URL.
        """
        from gradstore.verify import verify

        if self._codes_of is not None:
            raise RequestError(f"{self.path}: keeps a store at a URL without its codes; pull the store to verify it")
        return verify(self.path, self._header)

    def compact(self, collection: str | None = None, *, keep: Literal["all", "newest"] = "all") -> "CompactReport":
        """Rewrite a collection (None: all) without deleted rows and problems; "newest": also without superseded rows.

        Open views do not change; the old files are removed when no reader uses them.
        """
        from gradstore.compact import compact

        refuse_read_only(self.path, self.mode)
        if keep not in ("all", "newest"):
            raise RequestError(f"keep {keep!r} is not known; use 'all' or 'newest'")
        opened = [self._collection(name) for name in (self.collections if collection is None else [collection])]
        for one in opened:
            one.forget()
        return compact(self._header, [one.folder for one in opened], keep)

    def info(self) -> dict[str, Any]:
        """Description of the store's settings and contents, as a dict for JSON."""
        return {
            "path": str(self.path),
            "format": self._header.format,
            "dim": self.dim,
            "dtype": self.dtype,
            "chunk_rows": self._header.chunk_rows,
            "bytes_per_row": self.row_bytes,
            "fingerprint": self.fingerprint,
            "bases": [{"digest": basis.digest, **basis.about} for basis in self.bases],
            "collections": {name: describe(self._collection(name).snapshot()) for name in self.collections},
        }

    def _collection(self, name: str) -> Collection:
        if name not in self._opened:
            self._opened[name] = Collection(self.path, self._header, name, self.mode, self._codes_of)
        return self._opened[name]

    def _writable(self, name: str) -> Collection:
        """The collection; RequestError if the store was opened for reading."""
        refuse_read_only(self.path, self.mode)
        return self._collection(name)


def is_blank(path: Path) -> bool:
    """Whether this is an empty folder, or one left by an interrupted `create`."""
    if not path.is_dir():
        return False
    ours = {COLLECTIONS, f"{COLLECTIONS}/{ZARR}", ATTACHMENTS, INVENTORY, held_file(path).name}
    names = (entry.relative_to(path) for entry in path.glob("**/*"))
    return all(str(name) in ours or name.parts[0] == ATTACHMENTS or name.name.startswith(TEMPORARY) for name in names)
