"""Exclusive writing session on one collection: lock, clean up after an interrupted writer, publish, unlock.

Every change of a collection (adding problems, appending rows, deleting, compacting) happens inside a session.
"""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gradstore.appender import MOST_TEXT, clear_beyond, create_generation, show_rows
from gradstore.durable import TEMPORARY, fsync_folder, make_folder, replace_file, writing
from gradstore.errors import DamagedError, GradstoreError
from gradstore.header import Header
from gradstore.inside import check_folder, names_inside, open_inside, read_inside, remove_file, remove_folder
from gradstore.kept_ids import drop_other_ids
from gradstore.layout import (
    IN_USE,
    MANIFEST,
    PROBLEM_PART,
    PROBLEMS,
    ZARR,
    check_collection,
    generation_name,
    generations,
    group_json,
    store_of,
)
from gradstore.lock import WriterLock, claim_for_removal
from gradstore.manifest import Manifest, publish_manifest, read_manifest
from gradstore.snapshot import check_manifest


class Session:
    """Writing session, a context manager; `manifest` is always the newest published one.

    If the block raises and the clean-up also fails, the lock file keeps its text; the next session then cleans up.
    """

    def __init__(self, header: Header, collection: Path, *, create: bool = False) -> None:
        self.header = header
        self.collection = collection
        self.store = store_of(collection)
        check_folder(collection, self.store)
        if create:
            make_folder(collection)
        else:
            check_collection(collection)
        self.tidies = True
        """Whether to update zarr.json and remove what no manifest names at the end; not needed where no rows change."""
        self._seen: Manifest | None = None
        """The manifest whose folders were all found, before the lock was taken."""
        if (collection / MANIFEST).exists():
            self._checked(locked=False)  # Before the lock file is touched: a store that is refused stays as it is.
        self.unpublished = False
        """True if the disk may hold bytes that no manifest names."""
        self._began = False
        self._published = False
        self._in_doubt = False  # True after a failed publication: the disk may show either manifest.
        self._lock = WriterLock(collection)
        try:
            self.manifest = self._recover()
        except BaseException:
            untouched = not self._lock.interrupted and (collection / MANIFEST).exists()
            self._lock.release(clean=untouched)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        self.abandon()

    def abandon(self) -> None:
        """Close after an error: a collection that began in this session and has no publication is removed.

        The first error is the one to raise; the next writer clears what could not be cleared now.
        """
        with suppress(GradstoreError, OSError):
            if self._began and self.manifest.commit == 1:
                try:
                    (self.collection / MANIFEST).unlink()  # first: without it there is no collection, whatever is left
                    fsync_folder(self.collection)
                    remove_folder(self.collection, store_of(self.collection))
                finally:
                    self._lock.release(clean=False)
            else:
                self._close(tidy=self._published)  # A request that failed repairs nothing.

    @property
    def generation(self) -> Path:
        return self.collection / self.manifest.folder

    def publish(self, *, syncing: AbstractContextManager[None] | None = None, **changes: Any) -> Manifest:
        """Publish the manifest with changed fields, under the next commit number.

        syncing: context manager that syncs the files named by the manifest, in parallel with the manifest itself.
        """
        manifest = replace(self.manifest, commit=self.manifest.commit + 1, **changes)

        @contextmanager
        def beside() -> Iterator[None]:
            with syncing or nullcontext():
                yield
            self._in_doubt = True

        publish_manifest(self.collection, manifest, beside())
        self._in_doubt = False
        self.manifest = manifest
        self.unpublished, self._published = False, True
        return manifest

    def close(self) -> None:
        """Remove unpublished bytes, update zarr.json for other Zarr readers, and unlock."""
        self._close(tidy=self.tidies)

    def _close(self, *, tidy: bool) -> None:
        clean = False
        try:
            if self._in_doubt:
                return
            if self.unpublished:
                self.remove_unused_generations(newer=True)
                self._clear()
            if tidy:
                self._tidy()
            clean = True
        finally:
            self._lock.release(clean=clean)

    def _recover(self) -> Manifest:
        if not (self.collection / MANIFEST).exists():
            return self._first_manifest()
        if self._lock.interrupted:
            # Make the visible manifest durable before removing anything that an older one names.
            with writing(self.collection):
                fsync_folder(self.collection)
        self.manifest = self._checked(locked=True)
        if self._lock.interrupted:
            self._clear()
            self._tidy()
        return self.manifest

    def _checked(self, *, locked: bool) -> Manifest:
        """The newest manifest; DamagedError if it cannot be, or a folder that a writer changes or removes is a link.

        locked: its folders must be there; without the lock a compaction of another writer may just have removed them.
        """
        manifest = read_manifest(self.collection)
        if locked and manifest == self._seen:
            return manifest
        check_manifest(manifest, self.header, self.collection)
        complete = True
        for number in generations(self.collection):
            check_folder(self.collection / generation_name(number), self.store)
        in_use = self.collection / manifest.folder / IN_USE
        if os.path.lexists(in_use):
            os.close(open_inside(in_use, self.store))
        for name in (PROBLEMS, *(array.name for array in self.header.arrays)):
            folder = self.collection / manifest.folder / name
            if not check_folder(folder, self.store):
                if locked:
                    raise DamagedError(f"{folder}: is missing; `gradstore verify` lists all damage")
                complete = False
            if name != PROBLEMS and os.path.lexists(folder / ZARR):
                read_inside(folder / ZARR, self.store, MOST_TEXT)  # A publication ends with its renewal.
        self._seen = manifest if complete else None
        return manifest

    def _first_manifest(self) -> Manifest:
        """Create and publish the first manifest; with it the collection begins to exist."""
        generation = self.collection / generation_name(0)
        for name in (PROBLEMS, *(array.name for array in self.header.arrays)):
            check_folder(generation / name, self.store)
        create_generation(generation, self.header.arrays)
        replace_file(self.collection / ZARR, group_json({}))
        manifest = Manifest(commit=1, chunks={array.name: () for array in self.header.arrays})
        publish_manifest(self.collection, manifest)
        self._began = True
        return manifest

    def _clear(self) -> None:
        manifest, header = self.manifest, self.header
        with writing(self.collection):
            named = {part.file for part in manifest.parts}
            problems = self.generation / PROBLEMS
            left = [
                Path(place, name)
                for place, _, names in os.walk(self.collection)
                for name in names
                if name.startswith(TEMPORARY)
            ]
            left += [
                problems / name
                for name in names_inside(problems, self.store)
                if re.fullmatch(PROBLEM_PART, name) and name not in named
            ]
            for path in left:
                remove_file(path, self.store)
            for folder in {path.parent for path in left}:
                fsync_folder(folder)
        clear_beyond(self.generation, header.arrays, manifest.rows)

    def _tidy(self) -> None:
        show_rows(self.generation, self.header.arrays, self.manifest.rows)
        self.remove_unused_generations()
        drop_other_ids(self.collection, self.manifest.parts)

    def remove_unused_generations(self, *, newer: bool = False) -> list[str]:
        """Remove all generations except the published one, unless a reader uses them; returns those that stay.

        newer: only those that were begun and not published.
        """
        kept = []
        for number in generations(self.collection):
            folder = self.collection / generation_name(number)
            if number == self.manifest.generation or (newer and number < self.manifest.generation):
                continue
            with writing(folder):
                claim = claim_for_removal(folder)
                if claim is None:
                    kept.append(folder.name)
                    continue
                try:
                    # Remove the lease file first, so that no reader starts on a half-removed folder.
                    remove_file(folder / IN_USE, self.store)
                    remove_folder(folder, self.store)
                    fsync_folder(self.collection)
                finally:
                    os.close(claim)
        return kept
