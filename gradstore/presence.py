"""Presence: the quick check before a ranking that every file of a store is there, long enough and of one moment.

It reads names, sizes, manifests and columns: a few microseconds per file. Codes are checked when they are first read
(chunks.py). `verify` reads every byte.
"""

from collections.abc import Sequence
from pathlib import Path

from gradstore.additions import missing_part
from gradstore.attachments import ATTACHMENTS
from gradstore.bases import Basis
from gradstore.collection import Collection
from gradstore.errors import DamagedError
from gradstore.inside import file_inside, names_inside
from gradstore.inventory import check_inventory, read_inventory, too_old
from gradstore.layout import COLLECTIONS, MANIFEST, PROBES, ROUNDS, generations, store_of
from gradstore.lock import read_holder
from gradstore.manifest import Manifest, read_manifest
from gradstore.snapshot import Snapshot

_ADVICE = "`gradstore verify` lists all damage"
_TELLING = ("norm", "state")
"""Arrays of which at least one entry of every row is not 0: live rows have a norm, others a state."""


def check_store_files(store: Path, fingerprint: dict, bases: Sequence[Basis]) -> None:
    """DamagedError if an attachment is missing, or the manifest of a collection that has files."""
    check_inventory(store, store)
    for name in missing_projections(store, fingerprint, bases):
        raise DamagedError(f"{store / ATTACHMENTS / name}: the file is missing; {_ADVICE}")
    for folder in sorted((store / COLLECTIONS).glob("*/g*")):
        file = folder.parent / MANIFEST
        if not file.exists() and generations(folder.parent) and not read_holder(folder.parent):
            raise DamagedError(f"{file}: the file is missing; {_ADVICE}")


def missing_projections(store: Path, fingerprint: dict, bases: Sequence[Basis]) -> list[str]:
    """Names of the fitted projections that the fingerprint or a basis names and that the store does not hold."""
    projection = fingerprint.get("projection")
    if not isinstance(projection, dict) or projection.get("kind") != "fitted":
        return []
    folder = store / ATTACHMENTS
    there = {name.rpartition(".")[0] for name in names_inside(folder, store)}
    return [name for basis in bases if (name := f"projection-{basis.digest}.safetensors") not in there]


def check_collection_files(collection: Collection, n_bases: int, with_codes: bool) -> None:
    """DamagedError for the first file of a collection that is missing, too short or of another moment.

    n_bases: bases of the store. with_codes: whether codes are files of this folder.
    """
    folder = collection.folder
    store = store_of(folder)
    inventory = read_inventory(folder, store)  # Before the manifest, which can only be newer.
    snapshot = collection.snapshot()
    manifest = snapshot.manifest
    check_inventory(folder, store)
    for kind in (PROBES, ROUNDS):
        gap = missing_part(folder / kind)
        if gap is not None:
            raise DamagedError(f"{gap}: the file is missing; {_ADVICE}")
    fault = too_old(inventory, manifest.commit) or _unknown_basis(manifest, n_bases) or _rows_beyond(snapshot)
    if fault:
        raise DamagedError(f"{folder / MANIFEST}: {fault}; {_ADVICE}")
    _check_chunks(snapshot, with_codes)
    _check_problems(folder, manifest)


def _check_chunks(snapshot: Snapshot, with_codes: bool) -> None:
    rows = snapshot.manifest.rows
    codes, *columns = snapshot.header.arrays
    for chunk in range(codes.chunks(rows)) if with_codes else ():
        path = snapshot.collection / snapshot.manifest.folder / codes.name / codes.chunk_file(chunk)
        used = codes.rows_in(chunk, rows) * codes.row_bytes
        size = _size(path)
        if size < used:
            raise DamagedError(f"{path}: {'the file is missing' if size < 0 else 'damaged: cut'}; {_ADVICE}")
    for array in columns:
        snapshot.column(array.name)


def _check_problems(folder: Path, manifest: Manifest) -> None:
    for part in manifest.parts:
        path = manifest.problems_folder(folder) / part.file
        size = _size(path)
        if size != part.bytes:
            newer = read_manifest(folder)
            if (newer.generation, newer.parts) != (manifest.generation, manifest.parts):
                return  # A writer merged the parts meanwhile.
            fault = "the file is missing" if size < 0 else f"damaged: {size} bytes, expected {part.bytes}"
            raise DamagedError(f"{path}: {fault}; {_ADVICE}")


def _unknown_basis(manifest: Manifest, n_bases: int) -> str:
    last = max((basis for _, basis in manifest.bases), default=0)
    return (
        f"names basis {last}, but the store's last one is {n_bases - 1}: a basis is missing" if last >= n_bases else ""
    )


def _rows_beyond(snapshot: Snapshot) -> str:
    """Text about rows after the published ones that no writer is at work on: then the manifest is an older one."""
    folder, manifest = snapshot.collection, snapshot.manifest
    for _ in range(2):  # Twice: a writer may come, give up and clear its rows between two reads.
        before = read_holder(folder)
        beyond = _has_rows_beyond(snapshot)
        if before or not beyond or read_holder(folder) or read_manifest(folder).commit != manifest.commit:
            return ""
    return f"has {manifest.rows} rows, but there are more on disk: an older manifest"


def _has_rows_beyond(snapshot: Snapshot) -> bool:
    folder, manifest = snapshot.collection, snapshot.manifest
    for array in snapshot.header.arrays:
        chunk, within = divmod(manifest.rows, array.chunk_rows)
        path = folder / manifest.folder / array.name / array.chunk_file(chunk)
        if array.name not in _TELLING or not path.exists():
            continue
        with file_inside(path, store_of(folder)) as file:
            file.seek(within * array.row_bytes)
            tail = file.read(array.chunk_bytes)
        if tail.count(0) != len(tail):
            return True
    return False


def _size(path: Path) -> int:
    """Bytes of a file; -1 if there is none."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return -1
