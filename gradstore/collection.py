"""Collection: one collection as an open store sees it. It keeps the newest snapshot and problem table in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gradstore.chunks import CodeRows
from gradstore.errors import RequestError
from gradstore.header import Header
from gradstore.inventory import OF_COLLECTION, check_inventory, take_inventory
from gradstore.layout import COLLECTIONS, check_collection, check_name
from gradstore.lock import take_lease
from gradstore.manifest import Manifest
from gradstore.problem_table import ProblemTable
from gradstore.session import Session
from gradstore.snapshot import Snapshot, check_manifest, open_snapshot

if TYPE_CHECKING:
    import pyarrow as pa

CodesOf = Callable[[Path, Manifest], CodeRows]
"""(folder of a collection, manifest) -> its codes; for codes that are not files in the folder."""


class Collection:
    """One collection of an open store; it may not exist yet."""

    def __init__(self, store: Path, header: Header, name: str, mode: str, codes_of: CodesOf | None = None) -> None:
        self.folder = store / COLLECTIONS / check_name(name)
        self.header = header
        self.where = f"collection {name!r}"
        """How error messages name the collection."""
        self._store, self._mode, self._codes_of = store, mode, codes_of
        self._snapshot: Snapshot | None = None
        self._problems: ProblemTable | None = None

    def snapshot(self) -> Snapshot:
        """Snapshot of the newest commit; the same one if nothing was published since. RequestError if there is none."""
        check_collection(self.folder)
        snapshot, kept = open_snapshot(self.header, self.folder), self._snapshot
        if kept is not None and kept.manifest == snapshot.manifest:
            return kept
        snapshot.problems = self.problems(snapshot.manifest)
        if self._codes_of is not None:
            snapshot.codes = self._codes_of(self.folder, snapshot.manifest)
        self._snapshot = snapshot
        return snapshot

    def snapshot_of(self, manifest: Manifest) -> Snapshot:
        """Snapshot of an earlier commit that another process still reads; RequestError if its files were replaced."""
        check_collection(self.folder)
        check_manifest(manifest, self.header, self.folder)
        lease = take_lease(self.folder / manifest.folder)
        if lease is None:
            raise RequestError(f"{self.where}: commit {manifest.commit} is gone, it was compacted: take a new view")
        return Snapshot(self.header, self.folder, manifest, lease)

    def problems(self, manifest: Manifest) -> ProblemTable:
        """Problem table of a manifest; the same one while no problems are added or dropped (new rows do not matter)."""
        kept = self._problems
        if kept is None or not kept.serves(manifest):
            kept = self._problems = ProblemTable(self.folder, manifest)
        return kept

    def deleted(self) -> list[str]:
        """Ids of the problems that were deleted and not appended again since."""
        snapshot = self.snapshot()
        return snapshot.problems.ids_at(snapshot.deleted()).tolist()

    def forget(self) -> None:
        """Drop what is kept in memory, and with it the lease on the snapshot's files."""
        self._snapshot = self._problems = None

    def add(self, ids: "list[str] | pa.Array", write: Callable[[], int]) -> int:
        """Write an addition (probes or a round) for known problems, under the lock; returns its number."""
        with Session(self.header, self.folder) as session:
            self.problems(session.manifest).rows_of(ids, self.where)
            check_inventory(self.folder, self._store)  # A new part must not take the number of one that was lost.
            session.unpublished, session.tidies = True, False
            number = write()
            take_inventory(self.folder, self._store, OF_COLLECTION, session.manifest.commit)
            session.unpublished = False
        return number

    def refuse_read_only(self) -> None:
        refuse_read_only(self._store, self._mode)


def refuse_read_only(store: Path, mode: str) -> None:
    """Raise RequestError unless the store was opened for writing."""
    if mode != "a":
        raise RequestError(f"{store}: opened for reading; open it with mode 'a' to write")
