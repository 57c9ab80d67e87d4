"""Stores at URLs: a local copy (`pull`), or opened in place (`open_url`), with what is read in a local cache."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gradstore import exclusive
from gradstore.durable import writing
from gradstore.outputs import check_output
from gradstore.remote import copy_store, open_in_place
from gradstore.store import Store
from gradstore.travel.cache import ChunkCache, cache_folder
from gradstore.travel.places import Place, place_at
from gradstore.travel.sources import packed_or_plain


@dataclass(frozen=True, slots=True)
class PullReport:
    """What a pull did."""

    path: str
    rows: dict[str, int]
    """Collection -> rows that the copy holds now."""
    bytes: int
    """Bytes that were received."""
    requests: int
    """Requests that were made."""

    def describe(self) -> dict:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def pull(url: str, path: str | Path, collections: list[str] | None = None) -> Store:
    """Bring the local copy at `path` up to date with the store at a URL, and open it for reading.

    The store may have been pushed, or uploaded as a folder. Only what is new is fetched, and every checksum is checked.
    collections: names; None: all. RequestError for a bad URL, or if `path` holds another store; NotAStoreError if the
    URL holds none; DamagedError for bytes that do not match their checksums.
    """
    return pull_from(place_at(url), Path(path), collections)[0]


def pull_from(place: Place, path: Path, collections: list[str] | None = None) -> tuple[Store, PullReport]:
    """`pull` from an open place, with a report."""
    check_output(path)
    store = copy_store(packed_or_plain(place.source), path, collections)
    rows = {name: store._collection(name).snapshot().manifest.rows for name in store.collections}
    received = getattr(place.source, "received", 0)
    return store, PullReport(str(path), rows, received, place.requests)


def open_url(url: str) -> Store:
    """Open the store at a URL in place, for reading, in its current state: `gradstore.open` of a URL."""
    place = place_at(url)
    source = packed_or_plain(place.source)
    root = cache_folder()
    folder = root / "stores" / hashlib.sha256(place.url.encode()).hexdigest()[:24]
    with _alone(folder):
        return open_in_place(source, folder, ChunkCache(root / "codes"))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time brings the copy of a URL up to date."""
    file = path.with_name(f"{path.name}.lock")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        release = exclusive.lock(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), file, wait=True)
    try:
        yield
    finally:
        release()
