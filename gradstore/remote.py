"""Reading a store from object storage: as a local copy (`mirror`) or in place (`open_remote`).

`mirror`: published rows never change, and every chunk's checksum is in the manifest. A refresh therefore fetches the
manifest and only the chunks and problem parts with new checksums. It checks them and publishes the same manifest
locally. Searches then use mapped local files at full speed, and a refresh costs only what was added.

`open_remote` copies everything except the rows' codes: steps, norms, problems, a few dozen bytes per row. A scan
fetches and checks each chunk of codes that it reads; memory holds a few chunks at a time.

The source is any zarr store: `zarr.storage.ObjectStore` (obstore: S3, Google Cloud, Azure, HTTP),
`zarr.storage.FsspecStore`, `LocalStore`. To put a store there, upload its folder, manifests and then inventories last.
"""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gradstore.appender import create_generation
from gradstore.attachments import ATTACHMENTS
from gradstore.chunks import CodeRows
from gradstore.durable import crc32c, make_folder, replace_file, writing
from gradstore.errors import DamagedError, NotAStoreError, RequestError
from gradstore.header import Header, read_header
from gradstore.inventory import INVENTORY, Inventory
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
from gradstore.lock import WriterLock
from gradstore.manifest import Manifest, publish_manifest, read_manifest
from gradstore.session import Session
from gradstore.store import Store

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

_AT_ONCE = 16
_CHUNKS_KEPT = 8
_ATTEMPTS = 5
_CHECKSUM = re.compile(r"[.-]([0-9a-f]{8})(\.parquet)?$")
"""End of a file name with a checksum: of an attachment, or of a part of probes or rounds."""


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

    def codes_of(collection: Path, manifest: Manifest) -> CodeRows:
        where, fault = f"{COLLECTIONS}/{collection.name}", f"are not those of commit {manifest.commit}; open it again"

        def read(chunk: int) -> np.ndarray:
            (data,) = _fetched(source, where, [_chunk_file(manifest, codes, chunk)], fault)
            return np.frombuffer(data, codes.dtype).reshape(codes.shape(codes.rows_in(chunk, manifest.rows)))

        return CodeRows(read, _CHUNKS_KEPT)

    return Store(path, header, "r", codes_of)


class _File(NamedTuple):
    """A file to fetch."""

    name: str
    """Its path within the folder that is copied."""
    crc32c: int
    """Checksum of its published bytes."""
    used: int | None = None
    """Number of published bytes, at its beginning; None: all."""
    size: int = 0
    """Size of the copy: zeros follow the published bytes."""


def _chunk_file(manifest: Manifest, array: RowArray, chunk: int) -> _File:
    name = f"{manifest.folder}/{array.name}/{array.chunk_file(chunk)}"
    used = array.rows_in(chunk, manifest.rows) * array.row_bytes
    return _File(name, manifest.chunks[array.name][chunk], used, array.chunk_bytes)


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
    inventory = _get(source, [INVENTORY])[0]  # Before the files that it names: there may be more, never fewer.
    _copy_named(source, ATTACHMENTS, path / ATTACHMENTS)
    _keep_inventory(inventory, path)
    replace_file(path / ZARR, root)
    return read_header(path)


def _keep_inventory(inventory: bytes | None, folder: Path) -> None:
    """Copy the inventory of the source, fetched before the files it names; DamagedError if its bytes changed."""
    if inventory is not None:
        Inventory.from_bytes(inventory, folder / INVENTORY)
        replace_file(folder / INVENTORY, inventory)


def _copy_named(source: "ZarrStore", where: str, folder: Path) -> None:
    """Copy the missing files of a folder; their names contain the checksum of their bytes."""
    missing = [name for name in _listed(source, where) if not (folder / name).exists()]
    if missing:
        make_folder(folder.parent)
        make_folder(folder)
    files = [_File(name, int(found[1], 16) if (found := _CHECKSUM.search(name)) else -1) for name in missing]
    for file, data in zip(files, _fetched(source, where, files), strict=True):
        replace_file(folder / file.name, data)


def _bring_up_to_date(source: "ZarrStore", header: Header, path: Path, name: str, arrays: tuple[RowArray, ...]) -> None:
    """Update the copy of one collection; if the source publishes or compacts meanwhile, retry with the new manifest."""
    where = f"{COLLECTIONS}/{name}"
    for attempt in range(_ATTEMPTS):
        inventory = _get(source, [f"{where}/{INVENTORY}"])[0]
        raw = _get(source, [f"{where}/{MANIFEST}"])[0]
        if raw is None:
            raise RequestError(f"{source}: there is no collection {name!r}")
        manifest = Manifest.from_bytes(raw, Path(f"{where}/{MANIFEST}"))
        try:
            for kind in (PROBES, ROUNDS):
                _copy_named(source, f"{where}/{kind}", path / where / kind)
            _copy(source, header, path / where, where, manifest, arrays)
            _keep_inventory(inventory, path / where)
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
    lock = WriterLock(folder)  # While rows are there that no manifest counts, readers must see that somebody writes.
    done = False
    try:
        for file, data in zip(wanted, _fetched(source, where, wanted), strict=True):
            replace_file(folder / file.name, data + bytes(max(0, file.size - len(data))))
        publish_manifest(folder, manifest)
        done = True
    finally:
        lock.release(clean=done)
    with Session(header, folder):
        pass  # Shows the rows to other Zarr readers, and removes a generation that a compaction replaced.


def _missing(manifest: Manifest, known: Manifest, arrays: tuple[RowArray, ...]) -> Iterator[_File]:
    """Files that a manifest names and the copy lacks."""
    same = known.generation == manifest.generation
    for array in arrays:
        before = known.chunks.get(array.name, ()) if same else ()
        for chunk, crc in enumerate(manifest.chunks[array.name]):
            rows, had = array.rows_in(chunk, manifest.rows), array.rows_in(chunk, known.rows)
            if chunk >= len(before) or before[chunk] != crc or had != rows:
                yield _chunk_file(manifest, array, chunk)
    for part in manifest.parts:
        if not (same and part in known.parts):
            yield _File(f"{manifest.folder}/{PROBLEMS}/{part.file}", part.crc32c, part.bytes)


def _fetched(
    source: "ZarrStore", where: str, files: list[_File], fault: str = "do not match their checksum"
) -> Iterator[bytes]:
    """Fetch the published bytes of files below `where`, some at a time; DamagedError for bytes that were changed."""
    for start in range(0, len(files), _AT_ONCE):
        part = files[start : start + _AT_ONCE]
        for file, found in zip(part, _get(source, [f"{where}/{file.name}" for file in part]), strict=True):
            data = None if found is None else found[: file.used]
            if data is None or len(data) < (file.used or 0) or crc32c(data) != file.crc32c:
                raise DamagedError(f"{where}/{file.name}: its bytes at {source} {fault}")
            yield data


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
