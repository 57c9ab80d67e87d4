"""Store: collections of problems and the history of their sketches, under one fingerprint."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gradstore.attachments import ATTACHMENTS, write_attachment
from gradstore.bases import Basis, add_basis, added_bases, first_basis
from gradstore.chunks import CodeRows
from gradstore.description import describe
from gradstore.durable import TEMPORARY, make_folder, replace_file, writing
from gradstore.errors import FingerprintError, RequestError
from gradstore.header import Header, check_fingerprint, check_shape, read_header
from gradstore.layout import COLLECTIONS, MANIFEST, WITHOUT_CODES, ZARR, check_name, group_json
from gradstore.manifest import Manifest
from gradstore.new_problems import add_problems
from gradstore.problem_table import ProblemTable, to_records
from gradstore.session import Session
from gradstore.snapshot import Snapshot, open_snapshot
from gradstore.view import View
from gradstore.writer import Writer

if TYPE_CHECKING:
    import pyarrow as pa

    from gradstore.compact import CompactReport
    from gradstore.probes import ProbeParts
    from gradstore.rounds import Round
    from gradstore.verify import Report

Mode = Literal["r", "a"]
CodesOf = Callable[[Path, Manifest], CodeRows]


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
    dim, dtype, chunk_rows, column_rows = check_shape(dim, dtype, chunk_rows, column_rows)
    fingerprint = check_fingerprint(fingerprint)
    if path.exists() and not _is_blank(path):
        raise RequestError(f"{path}: there is something here already; open it, or choose another path")
    settings = fingerprint.get("objective")
    off_policy = isinstance(settings, dict) and bool(settings.get("importance"))
    header = Header(dim, dtype, chunk_rows, fingerprint, ("ess",) if off_policy else (), column_rows)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    make_folder(path)
    make_folder(path / COLLECTIONS)
    replace_file(path / COLLECTIONS / ZARR, group_json({}))
    for name, data in (attachments or {}).items():
        write_attachment(path, name, data)
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
    """A store on disk; create or open it with `gradstore.create` or `gradstore.open`."""

    def __init__(self, path: Path, header: Header, mode: Mode, codes_of: CodesOf | None = None) -> None:
        """codes_of: (folder of a collection, manifest) -> its codes; for codes that are not files in the folder."""
        self.path = path
        self.mode = mode
        self._header = header
        self._codes_of = codes_of
        self._snapshots: dict[str, Snapshot] = {}
        self._problem_tables: dict[str, ProblemTable] = {}
        self._probe_parts: dict[str, ProbeParts] = {}

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, dim={self.dim}, dtype={self.dtype!r}, mode={self.mode!r})"

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
        return [first_basis(self.fingerprint, self.dim), *added_bases(self.path)]

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
        self._refuse_read_only()
        if not layout or layout[-1][2] != self.dim:
            raise RequestError(f"{self.path}: the basis does not have the store's {self.dim} dimensions")
        if digest == self.bases[0].digest:
            return 0
        about = check_fingerprint(dict(about or {}))
        return add_basis(self.path, digest, list(layout), about, attachments or {})

    @property
    def collections(self) -> list[str]:
        """Names of the collections, sorted."""
        return sorted(entry.parent.name for entry in (self.path / COLLECTIONS).glob(f"*/{MANIFEST}"))

    def add_problems(self, collection: str, records: Iterable[dict]) -> int:
        """Add problem records (creates the collection if it is new); returns the number of new problems.

        A record that is already stored, equal in every field, is accepted and not counted.
        RequestError names id and field of a record that is invalid or differs from the stored one.
        """
        self._refuse_read_only()
        folder = self._folder(collection)
        known = self._snapshot(collection).problems if (folder / MANIFEST).exists() else None
        return add_problems(self._header, folder, records, known)

    def problems(self, collection: str) -> "pa.Table":
        """Table of every problem ever added (until a compaction drops the deleted ones), in order of addition.

        Columns: id, source, prompt (text to show), messages (JSON, null for a text prompt), ground_truth,
        tags, extra (JSON).
        """
        return self._snapshot(collection).problems.table

    def records(self, collection: str, ids: Sequence[str] | None = None) -> list[dict]:
        """Canonical records of some problems, in the order of ids (None: of all); RequestError for an unknown id."""
        problems = self._snapshot(collection).problems
        if ids is None:
            return to_records(problems.table)
        return to_records(problems.table.take(problems.rows_of(list(ids), f"collection {collection!r}")))

    def deleted(self, collection: str) -> list[str]:
        """Ids of the problems that were deleted and not appended again since."""
        snapshot = self._snapshot(collection)
        return list(snapshot.problems.ids[snapshot.deleted()])

    def writer(self, collection: str, *, step: int) -> Writer:
        """Context manager that appends rows computed at `step`; one writer per collection at a time.

        Entering it raises LockedError, which names the holder, while another writer is open.
        """
        self._refuse_read_only()
        n_bases = len(self.bases)
        folder, where = self._folder(collection), f"collection {collection!r}"
        return Writer(self._header, folder, where, _check_step(step), n_bases, partial(self._problem_table, collection))

    def add_probes(
        self,
        collection: str,
        ids: Sequence[str],
        derivatives: Sequence[np.ndarray],
        rewards: Sequence[np.ndarray],
        lengths: Sequence[np.ndarray],
        *,
        step: int,
        target: str,
        target_commit: int = 0,
        objective: dict[str, Any] | None = None,
    ) -> None:
        """Store probes: each rollout's derivative along a target, with its reward and its length in tokens.

        derivatives, rewards, lengths: one array per problem, one number per rollout; a derivative may be nan (not run).
        step: the policy's step. target, target_commit: the benchmark and its commit. objective: settings of the
        objective that was differentiated. RequestError for an unknown or repeated id, counts that differ, or a reward
        that is not finite.
        """
        from gradstore import probes

        self._refuse_read_only()
        where = f"collection {collection!r}"
        table = probes.to_table(
            ids,
            derivatives,
            rewards,
            lengths,
            step=_check_step(step),
            target=target,
            target_commit=target_commit,
            objective=objective or {},
            where=where,
        )
        self._add(collection, list(ids), where, lambda folder: probes.add_part(folder, table))

    def probes(self, collection: str, *, step: int | None = None, target: str | None = None) -> "pa.Table":
        """Stored probes in order of addition, of problems that are not deleted; step or target None: of all.

        Columns: id, step, target, target_commit, objective (JSON), derivatives, rewards, lengths (lists, one number per
        rollout). DamagedError if a part is damaged or missing.
        """
        from gradstore import probes

        parts = self._probe_parts.setdefault(collection, probes.ProbeParts(self._folder(collection)))
        return parts.read(step, target, without=self.deleted(collection))

    def add_round(self, collection: str, about: Mapping[str, Any], table: "pa.Table") -> int:
        """Record a selection round of a pool and return its number, counted from 0.

        about: settings and results of the round, JSON-compatible. table: one row per candidate, columns as in
        docs/format.md. RequestError for other columns, or an unknown or repeated id.
        """
        from gradstore import rounds

        self._refuse_read_only()
        where = f"collection {collection!r}"
        data = rounds.to_bytes(about, table, where)
        return self._add(collection, table["id"].to_pylist(), where, lambda folder: rounds.add_round(folder, data))

    def rounds(self, collection: str) -> "list[Round]":
        """Every recorded round of a pool, oldest first; DamagedError if one is damaged or missing."""
        from gradstore import rounds

        return rounds.read_rounds(self._folder(collection))

    def count_rounds(self, collection: str) -> int:
        """Number of recorded rounds of a pool; reads none of them."""
        from gradstore import rounds

        return rounds.count_rounds(self._folder(collection))

    def round(self, collection: str, number: int) -> "Round":
        """One recorded round; negative numbers count from the newest. RequestError if there is no such round."""
        from gradstore import rounds

        return rounds.read_round(self._folder(collection), number, f"collection {collection!r}")

    def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Delete all current rows of some problems: later views do not show them. They may be appended again."""
        self._refuse_read_only()
        with Session(self._header, self._folder(collection)) as session:
            problems = self._problem_table(collection, session.manifest)
            doomed = problems.rows_of(list(ids), f"collection {collection!r}").tolist()
            if doomed:
                tombstones = session.manifest.tombstones | dict.fromkeys(doomed, session.manifest.rows)
                session.publish(tombstones=tombstones)

    def view(self, collection: str, at: int | None = None, *, basis: int | None = None) -> View:
        """View of the newest row of each problem at or before step `at` (None: the newest of all).

        basis: use only rows in this basis; None: rows in all bases.
        """
        if at is not None and (isinstance(at, bool) or not hasattr(at, "__index__")):
            raise RequestError(f"at must be a step (a whole number) or None, not {at!r}")
        return View(self, self._snapshot(collection), collection, None if at is None else at.__index__(), basis)

    def steps(self, collection: str) -> dict[int, int]:
        """Step -> number of rows, ascending, without deleted rows."""
        return self._snapshot(collection).rows_by_step()

    def history(self, collection: str, at: int | None = None) -> "pa.Table":
        """Table of all rows at or before step `at` (None: all), oldest first, without deleted rows.

        Columns: id, step, state (live, no_signal, failed), norm, pass_rate (nan: unknown), n_rollouts. Rows of one step
        are in the order of appending. `compact(keep="newest")` drops superseded rows here too.
        """
        from gradstore.history import history_table

        return history_table(self._snapshot(collection), at)

    def commit(self, collection: str) -> int:
        """Number of the collection's newest publication."""
        return self._snapshot(collection).manifest.commit

    def verify(self) -> "Report":
        """Check every stored byte against its checksum; safe while another process writes."""
        from gradstore.verify import verify

        return verify(self.path, self._header)

    def compact(self, collection: str | None = None, *, keep: Literal["all", "newest"] = "all") -> "CompactReport":
        """Rewrite a collection (None: all) without deleted rows and problems; "newest": also without superseded rows.

        Open views do not change; the old files are removed when no reader uses them.
        """
        from gradstore.compact import compact

        self._refuse_read_only()
        if keep not in ("all", "newest"):
            raise RequestError(f"keep {keep!r} is not known; use 'all' or 'newest'")
        names = self.collections if collection is None else [check_name(collection)]
        for name in names:
            self._snapshots.pop(name, None)
            self._problem_tables.pop(name, None)
        return compact(self._header, [self._folder(name) for name in names], keep)

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
            "collections": {name: describe(self._folder(name), self._snapshot(name)) for name in self.collections},
        }

    def _folder(self, collection: str) -> Path:
        return self.path / COLLECTIONS / check_name(collection)

    def _snapshot(self, collection: str) -> Snapshot:
        """Snapshot of the newest commit; returns the cached one if nothing was published since."""
        folder = self._folder(collection)
        if not (folder / MANIFEST).exists():
            known = ", ".join(self.collections) or "none"
            raise RequestError(f"{self.path}: there is no collection {collection!r}; the store has {known}")
        snapshot = open_snapshot(self._header, folder)
        cached = self._snapshots.get(collection)
        if cached is not None and cached.manifest == snapshot.manifest:
            return cached
        snapshot.problems = self._problem_table(collection, snapshot.manifest)
        if self._codes_of is not None:
            snapshot.codes = self._codes_of(folder, snapshot.manifest)
        self._snapshots[collection] = snapshot
        return snapshot

    def _problem_table(self, collection: str, manifest: Manifest) -> ProblemTable:
        """Problem table of a manifest; returns the cached one if the problems are the same (new rows do not matter)."""
        known = self._problem_tables.get(collection)
        if known is None or not known.serves(manifest):
            known = self._problem_tables[collection] = ProblemTable(self._folder(collection), manifest)
        return known

    def _add(self, collection: str, ids: list[str], where: str, write: Callable[[Path], int]) -> int:
        """Write an addition (probes or a round) for known problems, under the lock; returns its number."""
        with Session(self._header, self._folder(collection)) as session:
            self._problem_table(collection, session.manifest).rows_of(ids, where)
            session.unpublished = True
            number = write(session.collection)
            session.unpublished = False
        return number

    def _refuse_read_only(self) -> None:
        if self.mode != "a":
            raise RequestError(f"{self.path}: opened for reading; open it with mode 'a' to write")


def _check_step(step: Any) -> int:
    if isinstance(step, bool) or not hasattr(step, "__index__") or not 0 <= step.__index__() < 2**63:
        raise RequestError(f"step must be a whole number of at least 0 (0 = the base model), not {step!r}")
    return int(step.__index__())


def _is_blank(path: Path) -> bool:
    """Whether this is an empty folder, or one left by an interrupted `create`."""
    if not path.is_dir():
        return False
    ours = {COLLECTIONS, f"{COLLECTIONS}/{ZARR}", ATTACHMENTS}
    names = (entry.relative_to(path) for entry in path.glob("**/*"))
    return all(str(name) in ours or name.parts[0] == ATTACHMENTS or name.name.startswith(TEMPORARY) for name in names)
