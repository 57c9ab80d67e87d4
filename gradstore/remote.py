"""Reading a store from object storage: as a local copy (`mirror`) or in place (`open_remote`).

`mirror`: published rows never change, and every chunk's checksum is in the manifest. A refresh therefore fetches the
manifest and only the chunks and problem parts with new checksums. It checks them and publishes the same manifest
locally. Searches then use mapped local files at full speed, and a refresh costs only what was added.

`open_remote` copies everything except the rows' codes: steps, norms, problems, a few dozen bytes per row. A scan
fetches and checks each chunk of codes that it reads; memory holds a few chunks at a time.

The source is any zarr store: `zarr.storage.ObjectStore` (obstore: S3, Google Cloud, Azure, HTTP),
`zarr.storage.FsspecStore`, `LocalStore`. To put a store there, upload its folder, manifests last.
"""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradstore.appender import create_generation
from gradstore.attachments import ATTACHMENTS
from gradstore.durable import crc32c, make_folder, replace_file, writing
from gradstore.errors import DamagedError, NotAStoreError, RequestError
from gradstore.header import Header, read_header
from gradstore.layout import (
    COLLECTIONS,
    MANIFEST,
    PROBES,
    PROBLEMS,
    ROUNDS,
    WITHOUT_CODES,
    ZARR,
    RowArray,
    check_name,
    group_json,
)
from gradstore.manifest import Manifest, publish_manifest, read_manifest
from gradstore.session import Session
from gradstore.store import Store

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

_AT_ONCE = 16
_CHUNKS_KEPT = 8
_ATTEMPTS = 5


def mirror(source: "ZarrStore", path: str | Path, collections: list[str] | None = None) -> Store:
    """Bring a local copy of a store at `path` up to date with `source`, and open it for reading.

    source: the store's root as a zarr store. collections: names; None: all. Open views do not change. Raises
    NotAStoreError if the source holds no store, RequestError if `path` holds another one, DamagedError for bytes that
    do not match their checksums.
    """
    path = Path(path)
    if (path / WITHOUT_CODES).exists():
        raise RequestError(f"{path}: holds what open_remote keeps, no whole copy; choose another path")
    header = _prepare(source, path)
    for name in _collections(source) if collections is None else collections:
        _bring_up_to_date(source, header, path, check_name(name), header.arrays)
    return Store(path, header, "r")


def open_remote(source: "ZarrStore", path: str | Path, collections: list[str] | None = None) -> Store:
    """Open a remote store in place, for reading, in its current state; copies everything except codes to `path`.

    Arguments and errors as in `mirror`. Every scan fetches the chunks of codes that it reads. Use it for a few searches
    in a store too large to copy. DamagedError if a chunk does not match its checksum or a compaction removed it.
    """
    path = Path(path)
    if (path / ZARR).exists() and not (path / WITHOUT_CODES).exists():
        raise RequestError(f"{path}: holds a store; choose another path for what open_remote keeps")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    replace_file(path / WITHOUT_CODES, b"")
    header = _prepare(source, path)
    codes, *columns = header.arrays
    for name in _collections(source) if collections is None else collections:
        _bring_up_to_date(source, header, path, check_name(name), tuple(columns))

    def codes_of(collection: Path, manifest: Manifest) -> "FetchedRows":
        return FetchedRows(source, f"{COLLECTIONS}/{collection.name}", codes, manifest)

    return Store(path, header, "r", codes_of)


class FetchedRows:
    """The published rows of one array by chunk, fetched on access; the last few chunks are cached."""

    def __init__(self, source: "ZarrStore", collection: str, array: RowArray, manifest: Manifest) -> None:
        self._source, self._collection, self._array, self._manifest = source, collection, array, manifest
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def chunk(self, chunk: int) -> np.ndarray:
        """The published rows of one chunk, shape [rows in it, width], read-only."""
        with self._lock:
            if chunk in self._kept:
                self._kept.move_to_end(chunk)
                return self._kept[chunk]
        array, manifest = self._array, self._manifest
        rows = array.rows_in(chunk, manifest.rows)
        file = f"{self._collection}/{manifest.folder}/{array.name}/{array.chunk_file(chunk)}"
        data = _get(self._source, [file])[0]
        used = rows * array.row_bytes
        if data is None or len(data) < used or crc32c(data[:used]) != manifest.chunks[array.name][chunk]:
            raise DamagedError(
                f"{file}: its bytes at {self._source} are not those of commit {manifest.commit}; open the store again"
            )
        fetched = np.frombuffer(data, array.dtype, count=used // array.dtype.itemsize).reshape(array.shape(rows))
        with self._lock:
            self._kept[chunk] = fetched
            while len(self._kept) > _CHUNKS_KEPT:
                self._kept.popitem(last=False)
        return fetched


def _prepare(source: "ZarrStore", path: Path) -> Header:
    """Prepare the folder of a copy: everything outside the collections."""
    root = _get(source, [ZARR])[0]
    if root is None:
        raise NotAStoreError(f"{source}: there is no gradstore store here (no {ZARR})")
    if (path / ZARR).exists() and (path / ZARR).read_bytes() != root:
        raise RequestError(f"{path}: holds another store than {source}; choose another path")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    make_folder(path / COLLECTIONS)
    replace_file(path / COLLECTIONS / ZARR, group_json({}))
    _copy_named(source, ATTACHMENTS, path / ATTACHMENTS)
    replace_file(path / ZARR, root)
    return read_header(path)


def _copy_named(source: "ZarrStore", where: str, folder: Path) -> None:
    """Copy missing attachments, probes or rounds to a folder; their names contain the checksum of their bytes."""
    missing = [file for file in _listed(source, where) if not (folder / file).exists()]
    if missing:
        make_folder(folder.parent)
        make_folder(folder)
    for file, data in zip(missing, _get(source, [f"{where}/{file}" for file in missing]), strict=True):
        if data is None or f"{crc32c(data):08x}" not in file:
            raise DamagedError(f"{where}/{file}: its bytes at {source} do not match the checksum in its name")
        replace_file(folder / file, data)


def _bring_up_to_date(source: "ZarrStore", header: Header, path: Path, name: str, arrays: tuple[RowArray, ...]) -> None:
    """Update the copy of one collection; if the source publishes or compacts meanwhile, retry with the new manifest."""
    where = f"{COLLECTIONS}/{name}"
    for attempt in range(_ATTEMPTS):
        raw = _get(source, [f"{where}/{MANIFEST}"])[0]
        if raw is None:
            raise RequestError(f"{source}: there is no collection {name!r}")
        manifest = Manifest.from_bytes(raw, Path(f"{where}/{MANIFEST}"))
        try:
            for kind in (PROBES, ROUNDS):
                _copy_named(source, f"{where}/{kind}", path / where / kind)
            _copy(source, header, path / where, where, manifest, arrays)
            return
        except DamagedError:
            if attempt == _ATTEMPTS - 1 or _get(source, [f"{where}/{MANIFEST}"])[0] == raw:
                raise


def _copy(
    source: "ZarrStore", header: Header, folder: Path, where: str, manifest: Manifest, arrays: tuple[RowArray, ...]
) -> None:
    known = read_manifest(folder) if (folder / MANIFEST).exists() else Manifest()
    if known == manifest:
        return
    make_folder(folder)
    replace_file(folder / ZARR, group_json({}))
    generation = folder / manifest.folder
    create_generation(generation, header.arrays)
    wanted = list(_missing(manifest, known, arrays))
    for start in range(0, len(wanted), _AT_ONCE):
        part = wanted[start : start + _AT_ONCE]
        for (file, used, size, crc), data in zip(part, _get(source, [f"{where}/{w[0]}" for w in part]), strict=True):
            if data is None or len(data) < used or crc32c(data[:used]) != crc:
                raise DamagedError(f"{where}/{file}: its bytes at {source} do not match their checksum")
            replace_file(folder / file, data[:used] + bytes(size - used))
    publish_manifest(folder, manifest)
    with Session(header, folder):
        pass  # Shows the rows to other Zarr readers, and removes a generation that a compaction replaced.


def _missing(manifest: Manifest, known: Manifest, arrays: tuple[RowArray, ...]) -> Iterator[tuple[str, int, int, int]]:
    """Files that a manifest names and the copy lacks: (file, published bytes, size of the file, checksum)."""
    same = known.generation == manifest.generation
    for array in arrays:
        before = known.chunks.get(array.name, ()) if same else ()
        for chunk, crc in enumerate(manifest.chunks[array.name]):
            rows, had = array.rows_in(chunk, manifest.rows), array.rows_in(chunk, known.rows)
            if chunk < len(before) and before[chunk] == crc and had == rows:
                continue
            file = f"{manifest.folder}/{array.name}/{array.chunk_file(chunk)}"
            yield file, rows * array.row_bytes, array.chunk_bytes, crc
    for part in manifest.parts:
        if not (same and part in known.parts):
            yield f"{manifest.folder}/{PROBLEMS}/{part.file}", part.bytes, part.bytes, part.crc32c


def _get(source: "ZarrStore", keys: list[str]) -> list[bytes | None]:
    """Fetch the values of several keys concurrently; None for a missing key."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    async def fetch() -> list[bytes | None]:
        found = await asyncio.gather(*(source.get(key, default_buffer_prototype()) for key in keys))
        return [None if buffer is None else buffer.to_bytes() for buffer in found]

    return sync(fetch())


def _collections(source: "ZarrStore") -> list[str]:
    names = [name for name in _listed(source, COLLECTIONS) if name != ZARR]
    return [name for name in names if _get(source, [f"{COLLECTIONS}/{name}/{MANIFEST}"])[0] is not None]


def _listed(source: "ZarrStore", folder: str) -> list[str]:
    """Names in a folder, sorted, without names that begin with a dot."""
    from zarr.core.sync import sync

    async def names() -> list[str]:
        return [key.rstrip("/").split("/")[-1] async for key in source.list_dir(folder)]

    return sorted(name for name in sync(names()) if name and not name.startswith("."))
