"""Reading a store from object storage: as a local copy (`mirror`) or in place (`open_remote`).

`mirror`: published rows never change, and every chunk's checksum is in the manifest. A refresh therefore fetches the
manifest and only the chunks and problem parts with new checksums. It checks them and publishes the same manifest
locally. Searches then use mapped local files at full speed, and a refresh costs only what was added.

`open_remote` copies everything except the rows' codes: steps, norms, problems, a few dozen bytes per row. A scan
fetches and checks each chunk of codes that it reads; memory holds a few chunks at a time.

Whoever wrote the source may have written anything. Names are those of the format or are refused, sizes are those of the
manifest, and nothing is written outside the copy's folder. A refresh is first made and read beside the copy
(`_rehearsed`): one that fails leaves the copy as it was.

The source is any zarr store: `zarr.storage.ObjectStore` (obstore: S3, Google Cloud, Azure, HTTP),
`zarr.storage.FsspecStore`, `LocalStore`. `gradstore push` puts a store
there, compressed (travel/); a folder that was uploaded, manifests and then inventories last, is read as well.
"""

import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gradstore import additions, attachments, exclusive
from gradstore.appender import create_generation
from gradstore.attachments import ATTACHMENTS
from gradstore.chunks import CodeRows, most_mapped
from gradstore.collection import Collection
from gradstore.durable import TEMPORARY, crc32c, make_folder, replace_file, replacing_file, writing
from gradstore.errors import DamagedError, GradstoreError, NotAStoreError, RequestError
from gradstore.header import MOST_BYTES as MOST_HEADER_BYTES
from gradstore.header import Header, parse_header
from gradstore.inside import check_folder, read_inside, remove_folder
from gradstore.inventory import INVENTORY, Inventory
from gradstore.inventory import MOST_BYTES as MOST_INVENTORY_BYTES
from gradstore.layout import (
    COLLECTIONS,
    IN_USE,
    INDEXES,
    LOCK,
    MANIFEST,
    PROBES,
    PROBLEMS,
    ROUNDS,
    WITHOUT_CODES,
    ZARR,
    RowArray,
    check_name,
    group_json,
    store_of,
)
from gradstore.lock import WriterLock
from gradstore.manifest import MOST_BYTES, Manifest, publish_manifest, read_manifest
from gradstore.presence import check_collection_files, check_store_files
from gradstore.problem_table import read_part
from gradstore.session import Session
from gradstore.snapshot import check_manifest
from gradstore.store import Store
from gradstore.travel.cache import ChunkCache
from gradstore.travel.sources import Source, Wanted, ZarrSource, packed_or_plain

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

_AT_ONCE = 16
_THREADS = 8
"""Threads that read codes ahead of a search."""
_BYTES_AT_ONCE = 256 << 20
_ATTEMPTS = 5
CACHE = "codes-cache"
"""Folder of the cached codes, where `open_remote` is given no other."""


def mirror(source: "ZarrStore", path: str | Path, collections: list[str] | None = None) -> Store:
    """Bring a local copy of a store at `path` up to date with `source`, and open it for reading.

    source: the store's root as a zarr store; an uploaded folder or a pushed store. collections: names; None: all. Open
    views do not change. Raises NotAStoreError if the source holds no store, RequestError if `path` holds another one,
    DamagedError for bytes that do not match their checksums.
    """
    return copy_store(packed_or_plain(ZarrSource(source)), Path(path), collections)


def open_remote(
    source: "ZarrStore", path: str | Path, collections: list[str] | None = None, *, cache_bytes: int | None = None
) -> Store:
    """Open a remote store in place, for reading, in its current state; copies everything except codes to `path`.

    Arguments and errors as in `mirror`. A scan fetches the chunks of codes that it reads, and keeps them in a cache in
    `path`. cache_bytes: its bound; None: GRADSTORE_CACHE_BYTES, or 20 GB. DamagedError if a chunk does not match its
    checksum or a compaction removed it.
    """
    path = Path(path)
    return open_in_place(packed_or_plain(ZarrSource(source)), path, ChunkCache(path / CACHE, cache_bytes), collections)


def copy_store(source: Source, path: Path, collections: list[str] | None = None) -> Store:
    """`mirror` of a source."""
    if (path / WITHOUT_CODES).exists():
        raise RequestError(f"{path}: holds what open_remote keeps, no whole copy; choose another path")
    return Store(path, _refresh(source, path, collections), "r")


def open_in_place(source: Source, path: Path, cache: ChunkCache, collections: list[str] | None = None) -> Store:
    """`open_remote` of a source, with the codes in a cache that other stores may share."""
    if (path / ZARR).exists() and not (path / WITHOUT_CODES).exists():
        raise RequestError(f"{path}: holds a store; choose another path for what open_remote keeps")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    replace_file(path / WITHOUT_CODES, b"")
    header = _refresh(source, path, collections)
    codes = header.arrays[0]
    identity = f"{crc32c(header.to_bytes()):08x}"

    def codes_of(collection: Path, manifest: Manifest) -> CodeRows:
        locks = [threading.Lock() for _ in range(codes.chunks(manifest.rows))]
        where = f"{COLLECTIONS}/{collection.name}"

        def read(chunk: int) -> np.ndarray:
            file = _chunk_file(manifest, codes, chunk)
            name = hashlib.sha256(f"{identity} {where} {file}".encode()).hexdigest()[:32]
            with locks[chunk]:  # A search and what reads ahead of it fetch a chunk once.
                found = cache.get(name, file.used, file.crc32c)
                if found is None:
                    data = _fetched_anew(source, where, file, manifest)
                    cache.put(name, data)
                    found = cache.get(name, file.used, file.crc32c)
                    found = np.frombuffer(data, np.uint8) if found is None else found
            return found.view(codes.dtype).reshape(codes.shape(codes.rows_in(chunk, manifest.rows)))

        # A mapped file takes disk until it is let go, in the cache or not.
        kept = max(2, min(most_mapped(), cache.most_bytes // (4 * codes.chunk_bytes)))
        return CodeRows(read, kept, _THREADS)

    return Store(path, header, "r", codes_of)


def _fetched_anew(source: Source, where: str, file: "_File", manifest: Manifest) -> bytes:
    """Fetch a chunk; from the newest state of the source if its last known one no longer has it."""
    fault = f"are not those of commit {manifest.commit}; open it again"
    try:
        return next(_fetched(source, where, [file], fault))
    except DamagedError:
        if not source.renew():
            raise
    return next(_fetched(source, where, [file], fault))


def _refresh(source: Source, path: Path, collections: list[str] | None) -> Header:
    """Bring a copy up to date, without codes where `path` is marked so; returns the header.

    If a push removes what is being copied, it begins again with the new state.
    """
    for _ in range(_ATTEMPTS):
        try:
            return _refresh_once(source, path, collections)
        except DamagedError:
            if not source.renew():
                raise
    return _refresh_once(source, path, collections)


def _refresh_once(source: Source, path: Path, collections: list[str] | None) -> Header:
    from zarr.storage import LocalStore

    names = [check_name(name) for name in (_collections(source) if collections is None else collections)]
    if not (path / ZARR).exists():
        return _copy_store(source, path, names)
    _header_of(source, path)  # Another store than the copied one is refused by the name of the copy.
    with _rehearsed(path) as beside:
        try:
            header = _copy_store(source, beside, names)
            _read(Store(beside, header, "r"), path, names)
        except GradstoreError as error:
            raise type(error)(str(error).replace(str(beside), str(source))) from error
        return _copy_store(ZarrSource(LocalStore(beside, read_only=True)), path, names)


@contextmanager
def _rehearsed(path: Path) -> Iterator[Path]:
    """A folder in which a refresh is tried: a copy of the copy, made of hard links; one process at a time has it."""
    beside = path / f"{TEMPORARY}refresh"
    with writing(path):
        unlock = exclusive.lock(os.open(path, os.O_RDONLY), path, wait=True)
    try:
        with writing(beside):
            with suppress(FileNotFoundError):
                remove_folder(beside, path)  # left by a process that was killed
            shutil.copytree(path, beside, symlinks=True, copy_function=_link, ignore=_NOT_REHEARSED)
        try:
            yield beside
        finally:
            with writing(beside):
                remove_folder(beside, path)
    finally:
        unlock()


_NOT_REHEARSED = shutil.ignore_patterns(f"{TEMPORARY}*", CACHE, LOCK, f"*{exclusive.SUFFIX}", IN_USE, INDEXES)


def _link(there: str, here: str) -> None:
    """A second name of a file; where the file system has none, a copy. No file of a store is changed in place here."""
    try:
        os.link(there, here, follow_symlinks=False)
    except OSError:
        shutil.copy2(there, here, follow_symlinks=False)


def _read(copy: Store, older: Path, names: list[str]) -> None:
    """Read what readers read of the collections that differ from an older copy; their first error is raised."""
    check_store_files(copy.path, copy.fingerprint, copy.bases)
    for name in names:
        opened, before = Collection(copy.path, copy._header, name, "r"), older / COLLECTIONS / name
        if all(_same(opened.folder / file, before / file) for file in (MANIFEST, INVENTORY)):
            continue  # The inventory names what the manifest does not.
        check_collection_files(opened, len(copy.bases), not (copy.path / WITHOUT_CODES).exists())
        manifest = opened.snapshot().manifest
        known = read_manifest(before).parts if (before / MANIFEST).exists() else ()
        for part in manifest.parts:
            if part not in known:
                read_part(opened.folder, manifest, part)
        _ = copy.view(name).ids
        copy.probes(name).table()
        list(copy.rounds(name))


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.read_bytes() == other.read_bytes()


def _copy_store(source: Source, path: Path, names: list[str]) -> Header:
    header = _prepare(source, path)
    arrays = header.arrays[1:] if (path / WITHOUT_CODES).exists() else header.arrays
    for name in names:
        _bring_up_to_date(source, header, path, name, arrays)
    return header


class _File(NamedTuple):
    """A file to fetch."""

    name: str
    """Its path within the folder that is copied."""
    crc32c: int
    """Checksum of its published bytes."""
    used: int = 0
    """Number of published bytes, at its beginning."""
    size: int = 0
    """Size of the copy: zeros follow the published bytes."""


def _chunk_file(manifest: Manifest, array: RowArray, chunk: int) -> _File:
    name = f"{manifest.folder}/{array.name}/{array.chunk_file(chunk)}"
    used = array.rows_in(chunk, manifest.rows) * array.row_bytes
    return _File(name, manifest.chunks[array.name][chunk], used, array.chunk_bytes)


def _header_of(source: Source, path: Path) -> tuple[Header, bytes]:
    """The header of a source and its bytes; RequestError if `path` is the copy of another store."""
    root = source.get([Wanted(ZARR, MOST_HEADER_BYTES)])[0]
    if root is None:
        raise NotAStoreError(f"{source}: there is no gradstore store here (no {ZARR})")
    header = parse_header(root, Path(str(source)))
    if (path / ZARR).exists() and read_inside(path / ZARR, path, MOST_HEADER_BYTES) != root:
        raise RequestError(f"{path}: holds another store than {source}; choose another path")
    return header, root


def _prepare(source: Source, path: Path) -> Header:
    """Prepare the folder of a copy: everything outside the collections."""
    header, root = _header_of(source, path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    _make_folder(path / COLLECTIONS, path)
    replace_file(path / COLLECTIONS / ZARR, group_json({}))
    # Before the files that it names: there may be more of them, never fewer.
    inventory = source.get([Wanted(INVENTORY, MOST_INVENTORY_BYTES)])[0]
    _copy_named(source, ATTACHMENTS, path)
    _keep_inventory(inventory, path)
    replace_file(path / ZARR, root)
    return header


def _keep_inventory(inventory: bytes | None, folder: Path) -> None:
    """Copy the inventory of the source, fetched before the files it names; DamagedError if its bytes changed."""
    if inventory is not None:
        Inventory.from_bytes(inventory, folder / INVENTORY)
        replace_file(folder / INVENTORY, inventory)


def _make_folder(folder: Path, root: Path) -> None:
    check_folder(folder, root)
    make_folder(folder)


def _copy_named(source: Source, where: str, path: Path) -> None:
    """Copy the missing files of a folder; their names contain the checksum of their bytes."""
    kind = attachments if where == ATTACHMENTS else additions
    files = []
    for name in source.listed(where):
        crc = kind.checksum_in(name)
        if crc is None:
            raise DamagedError(f"{source}: {where}/{name!r:.80}: is not the name of a file that a store has there")
        if not (path / where / name).exists():
            files.append(_File(name, crc))
    if files:
        _make_folder((path / where).parent, path)
        _make_folder(path / where, path)
    for file, size in zip(files, source.sizes([f"{where}/{file.name}" for file in files]), strict=True):
        (data,) = _fetched(source, where, [file._replace(used=size)])
        replace_file(path / where / file.name, data)


def _bring_up_to_date(source: Source, header: Header, path: Path, name: str, arrays: tuple[RowArray, ...]) -> None:
    """Update the copy of one collection; if the source publishes or compacts meanwhile, retry with the new manifest."""
    where = f"{COLLECTIONS}/{name}"
    for attempt in range(_ATTEMPTS):
        inventory = source.get([Wanted(f"{where}/{INVENTORY}", MOST_INVENTORY_BYTES)])[0]
        raw = source.get([Wanted(f"{where}/{MANIFEST}", MOST_BYTES)])[0]
        if raw is None:
            raise RequestError(f"{source}: there is no collection {name!r}")
        manifest = Manifest.from_bytes(raw, Path(f"{where}/{MANIFEST}"))
        try:
            if manifest.bases:
                _copy_named(source, ATTACHMENTS, path)  # A basis may be newer than the copy's attachments.
            check_manifest(manifest, header, path / where)
            for kind in (PROBES, ROUNDS):
                _copy_named(source, f"{where}/{kind}", path)
            _copy(source, header, path / where, where, manifest, arrays)
            _keep_inventory(inventory, path / where)
            return
        except DamagedError:
            if attempt == _ATTEMPTS - 1 or source.get([Wanted(f"{where}/{MANIFEST}", MOST_BYTES)])[0] == raw:
                raise


def _copy(
    source: Source, header: Header, folder: Path, where: str, manifest: Manifest, arrays: tuple[RowArray, ...]
) -> None:
    known = read_manifest(folder) if (folder / MANIFEST).exists() else Manifest()
    if known == manifest:
        return
    root = store_of(folder)
    _make_folder(folder, root)
    generation = folder / manifest.folder
    for name in (PROBLEMS, *(array.name for array in header.arrays)):
        check_folder(generation / name, root)
    replace_file(folder / ZARR, group_json({}))
    create_generation(generation, header.arrays)
    wanted = list(_missing(manifest, known, arrays))
    lock = WriterLock(folder)  # While rows are there that no manifest counts, readers must see that somebody writes.
    done = False
    try:
        for file, data in zip(wanted, _fetched(source, where, wanted), strict=True):
            with replacing_file(folder / file.name) as unfinished:
                unfinished.write(data)
                unfinished.truncate(max(file.size, len(data)))
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
    source: Source, where: str, files: list[_File], fault: str = "do not match their checksum"
) -> Iterator[bytes]:
    """Fetch the published bytes of files below `where`, some at a time; DamagedError for bytes that were changed."""
    for part in _some_at_once(files):
        for file, data in zip(
            part, source.get([Wanted(f"{where}/{file.name}", file.used) for file in part]), strict=True
        ):
            if data is None or len(data) != file.used or crc32c(data) != file.crc32c:
                raise DamagedError(f"{where}/{file.name}: its bytes at {source} {fault}")
            yield data


def _some_at_once(files: list[_File]) -> Iterator[list[_File]]:
    """The files in groups that are fetched together: few, and of a bounded size unless it is one file."""
    group: list[_File] = []
    for file in files:
        if group and (len(group) == _AT_ONCE or sum(one.used for one in [*group, file]) > _BYTES_AT_ONCE):
            yield group
            group = []
        group.append(file)
    if group:
        yield group


def _collections(source: Source) -> list[str]:
    names = [name for name in source.listed(COLLECTIONS) if name != ZARR]
    found = source.get([Wanted(f"{COLLECTIONS}/{name}/{MANIFEST}", 1) for name in names])
    return [name for name, first in zip(names, found, strict=True) if first is not None]
