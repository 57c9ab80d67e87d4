"""Pushing a store: what is new goes to the URL, then the state that names it, then what nobody names any more goes.

Rows go as segments. The first push makes one of all rows, a later one adds one of the new rows, or two: a segment that
reaches beyond a chunk of codes begins at one, so that each local chunk is one chunk of a segment. When there are too
many, the last ones are made anew as one. Segments and files have names of their content, so a push that was killed
goes on where it was.

The state at the URL must be an earlier one of this store: the same header, and rows that this store begins with.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from gradstore import additions, attachments
from gradstore.attachments import ATTACHMENTS
from gradstore.durable import canonical_json, crc32c
from gradstore.errors import DamagedError, RequestError
from gradstore.header import MOST_BYTES as MOST_HEADER_BYTES
from gradstore.header import Header, read_header
from gradstore.inside import MOST_BYTES as MOST_FILE_BYTES
from gradstore.inside import names_inside, read_inside
from gradstore.inventory import INVENTORY
from gradstore.inventory import MOST_BYTES as MOST_INVENTORY_BYTES
from gradstore.layout import (
    COLLECTIONS,
    MANIFEST,
    PROBES,
    PROBLEMS,
    ROUNDS,
    WITHOUT_CODES,
    ZARR,
    RowArray,
    collection_names,
    group_json,
)
from gradstore.manifest import MOST_BYTES as MOST_MANIFEST_BYTES
from gradstore.manifest import Manifest
from gradstore.snapshot import Snapshot, open_snapshot
from gradstore.store import Store
from gradstore.travel.packing import Packed
from gradstore.travel.places import Place, place_at
from gradstore.travel.sources import Wanted
from gradstore.travel.state import Segment, State, object_of

GRACE = 3600
"""Seconds for which objects stay that no state names any more: readers of the last state may be at work."""
ORPHAN_GRACE = 24 * 3600
"""Seconds for which objects stay that no state ever named: a push may be at work, or may be resumed."""
MOST_SEGMENTS = 16
"""Most segments of a collection; then the last ones are made anew as one."""
_THREADS = 4
_ATTEMPTS = 3
_KEPT = re.compile(r"[.-][0-9a-f]{8}(\.[a-z]+)?$")
"""End of the names of files that are kept as they are."""


@dataclass(frozen=True, slots=True)
class PushReport:
    """What a push did."""

    url: str
    changed: bool
    """False if the URL held this very state."""
    rows: dict[str, int]
    """Collection -> rows that the URL holds now."""
    new_rows: dict[str, int]
    """Collection -> rows that were sent, those made anew included."""
    objects: int
    """Objects that were sent, without the state."""
    removed: int
    """Objects of older states that were removed."""
    bytes: int
    """Bytes that were sent."""
    requests: int
    """Requests that were made."""

    def describe(self) -> dict:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def push(path: str | Path, url: str, *, progress: Callable[[int], None] | None = None) -> PushReport:
    """Bring the store at a URL up to date with the local store at `path`.

    Only what is new is sent; readers see the old state or the new one, and a push that was interrupted is resumed by
    the next. progress: called with bytes of local files that were sent. RequestError for a URL that cannot be written,
    or that holds another store or rows that this one lacks; GradstoreError if another push comes first.
    """
    place = place_at(url, write=True)
    return push_to(Path(path), place, progress or (lambda _: None))


def push_to(path: Path, place: Place, progress: Callable[[int], None]) -> PushReport:
    """`push` to an open place."""
    if (path / WITHOUT_CODES).exists():
        raise RequestError(f"{path}: holds what open_remote keeps, no whole store")
    header = read_header(path)
    with place.alone():
        raw, token = place.read_state()
        old = State() if raw is None else State.from_bytes(raw, place.url)
        for attempt in range(_ATTEMPTS):
            local = _Local(path, header)
            try:
                return _push(local, place, old, token, progress)
            except DamagedError:
                if attempt == _ATTEMPTS - 1 or not local.has_changed():
                    raise
    raise AssertionError


class _Local:
    """The store as it is pushed: a snapshot of every collection, and all other files with their checksums."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self.files: dict[str, tuple[int, int]] = {}
        self.texts: dict[str, bytes] = {}
        self.snapshots: dict[str, Snapshot] = {}
        self._text(ZARR, MOST_HEADER_BYTES)
        # Inventories before what they name: there may be more of it, never less.
        self._text(INVENTORY, MOST_INVENTORY_BYTES)
        self._named(ATTACHMENTS, attachments.checksum_in)
        for name in collection_names(path):
            folder = f"{COLLECTIONS}/{name}"
            self._text(f"{folder}/{INVENTORY}", MOST_INVENTORY_BYTES)
            snapshot = open_snapshot(header, path / folder)
            self.snapshots[name] = snapshot
            self._keep(f"{folder}/{MANIFEST}", snapshot.manifest.to_bytes())
            for part in snapshot.manifest.parts:
                where = f"{folder}/{snapshot.manifest.folder}/{PROBLEMS}/{part.file}"
                self.files[where] = part.bytes, part.crc32c
            for kind in (PROBES, ROUNDS):
                self._named(f"{folder}/{kind}", additions.checksum_in)

    def has_changed(self) -> bool:
        """Whether a writer published or compacted meanwhile."""
        return any(
            open_snapshot(self.header, snapshot.collection).manifest != snapshot.manifest
            for snapshot in self.snapshots.values()
        )

    def read(self, file: str) -> bytes:
        """A file's bytes; DamagedError unless they have the known checksum."""
        if file in self.texts:
            return self.texts[file]
        size, crc = self.files[file]
        data = read_inside(self.path / file, self.path, MOST_FILE_BYTES, crc)
        if len(data) != size or crc32c(data) != crc:
            raise DamagedError(f"{self.path / file}: damaged: its bytes do not match their checksum")
        return data

    def _keep(self, file: str, data: bytes) -> None:
        self.texts[file], self.files[file] = data, (len(data), crc32c(data))

    def _text(self, file: str, most: int) -> None:
        if (self.path / file).exists():
            self._keep(file, read_inside(self.path / file, self.path, most))

    def _named(self, folder: str, checksum_in: Callable[[str], int | None]) -> None:
        """Files whose names have their checksum."""
        for name in names_inside(self.path / folder, self.path):
            crc = checksum_in(name)
            if crc is not None:
                self.files[f"{folder}/{name}"] = (self.path / folder / name).lstat().st_size, crc


def _push(local: _Local, place: Place, old: State, token: object, progress: Callable[[int], None]) -> PushReport:
    begins = _check_ancestor(local, place, old)
    segments = {
        name: _segments(snapshot, old.segments.get(name, ()) if begins[name] else ())
        for name, snapshot in local.snapshots.items()
    }
    new = State(old.push + 1, local.files, segments)
    rows = {name: snapshot.manifest.rows for name, snapshot in local.snapshots.items()}
    if new.same_content(old):
        return PushReport(place.url, False, rows, dict.fromkeys(rows, 0), 0, 0, place.sent, place.requests)
    Store(local.path, local.header, "r").check_files()  # What is not whole is not pushed.
    now, there, before, after = int(time.time()), place.objects(), old.prefixes(), new.prefixes()
    jobs = [job for job in _jobs(local, new) if not _is_there(job.key, there, before, old, now)]
    _send(place, jobs, progress)
    found = {_prefix(key) for key in there}
    retired = {name: since for name, since in old.retired.items() if name in found and name not in after}
    retired |= dict.fromkeys(before - after, now)
    place.replace_state(replace(new, retired=retired).to_bytes(), token)
    doomed = [
        key for key, written in there.items() if _prefix(key) not in after and _is_doomed(key, written, retired, now)
    ]
    place.remove(doomed)
    sent = {
        name: sum(one.rows for one in them if one not in old.segments.get(name, ())) for name, them in segments.items()
    }
    return PushReport(place.url, True, rows, sent, len(jobs), len(doomed), place.sent, place.requests)


def _check_ancestor(local: _Local, place: Place, old: State) -> dict[str, bool]:
    """Collection -> whether its first rows are those at the place. RequestError unless that is an earlier state."""
    begins = dict.fromkeys(local.snapshots, False)
    if not old.push:
        return begins
    url = place.url
    if old.files.get(ZARR) != local.files[ZARR]:
        raise RequestError(f"{url}: holds another store than {local.path} (other settings); choose another URL")
    missing = sorted(name for name in old.segments if name not in local.snapshots)
    if missing:
        raise RequestError(f"{url}: holds the collection {missing[0]!r}, which {local.path} lacks; pull it first")
    for name in old.segments:
        snapshot, file = local.snapshots[name], f"{COLLECTIONS}/{name}/{MANIFEST}"
        if old.files.get(file) == local.files[file]:
            _check_segments(old.segments[name], snapshot.manifest.rows, f"{url}: collection {name!r}")
            begins[name] = True
            continue
        (raw,) = place.source.get([Wanted(old.key(file), MOST_MANIFEST_BYTES)]) if file in old.files else (None,)
        if raw is None:
            raise DamagedError(f"{url}: {file}: the object is missing; remove the store there and push it anew")
        before = Manifest.from_bytes(raw, Path(f"{url}/{file}"))
        before.check_arrays(local.header.arrays, Path(f"{url}/{file}"))
        _check_segments(old.segments[name], before.rows, f"{url}: collection {name!r}")
        begins[name] = before.generation == snapshot.manifest.generation
        _check_earlier(before, snapshot, f"{url}: collection {name!r}", local.path)
    return begins


def _check_segments(segments: tuple[Segment, ...], rows: int, where: str) -> None:
    """DamagedError unless the segments hold as many rows as the manifest beside them says."""
    found = segments[-1].stop if segments else 0
    if found != rows:
        raise DamagedError(f"{where}: damaged: its segments have {found} rows, its manifest {rows}")


def _check_earlier(before: Manifest, snapshot: Snapshot, where: str, path: Path) -> None:
    """RequestError unless a manifest is an earlier one of the collection."""
    now = snapshot.manifest
    if before.commit > now.commit or before.generation > now.generation:
        raise RequestError(
            f"{where} is of commit {before.commit}, {path} of {now.commit}: it is newer there; pull it first"
        )
    other = RequestError(
        f"{where} has other rows than {path} (both of commit {before.commit} or later); choose another URL"
    )
    if before.commit == now.commit:
        raise other
    if before.generation != now.generation:
        return  # A compaction changed the rows' numbers.
    if before.rows > now.rows:
        raise other
    for array in snapshot.header.arrays:
        for chunk, crc in enumerate(before.chunks[array.name]):
            rows = array.rows_in(chunk, before.rows)
            if rows == array.rows_in(chunk, now.rows):
                found = now.chunks[array.name][chunk]
            else:
                found = crc32c(np.ascontiguousarray(_rows(snapshot, array, chunk * array.chunk_rows, rows)))
            if found != crc:
                raise other


def _segments(snapshot: Snapshot, before: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """The segments of a collection: those that are there, as far as they stay, and new ones."""
    kept, cuts = plan([(one.start, one.stop) for one in before], snapshot.manifest.rows, snapshot.header.chunk_rows)
    new = (
        Segment(start, stop, segment_digest(snapshot.manifest, snapshot.header, start, stop)) for start, stop in cuts
    )
    return (*before[:kept], *new)


def plan(before: list[tuple[int, int]], rows: int, chunk_rows: int) -> tuple[int, list[tuple[int, int]]]:
    """How many of the segments (start, stop) stay, and (start, stop) of the new ones, up to row `rows`.

    A new segment holds the new rows. If there would be more than MOST_SEGMENTS, it takes the place of the last ones:
    of each that is less than twice as large as all after it, so that a row is sent about log2(rows) times at most.
    """
    kept, start = len(before), before[-1][1] if before else 0
    if start == rows:
        return kept, []
    if kept + 2 > MOST_SEGMENTS:
        while kept and before[kept - 1][1] - before[kept - 1][0] < 2 * (rows - before[kept - 1][1]):
            kept -= 1
            start = before[kept][0]
        while kept and start % chunk_rows and before[kept - 1][0] // chunk_rows == start // chunk_rows:
            kept -= 1  # Pieces of one chunk become one too.
            start = before[kept][0]
    border = -(-start // chunk_rows) * chunk_rows
    return kept, [(start, border), (border, rows)] if start < border < rows else [(start, rows)]


def segment_digest(manifest: Manifest, header: Header, start: int, stop: int) -> str:
    """Digest of what a segment holds and how: its rows, by the checksums of their chunks, and the Zarr metadata."""
    about = [
        [
            manifest.chunks[array.name][start // array.chunk_rows : array.chunks(stop)],
            Packed(array, stop - start).zarr_json().decode(),
        ]
        for array in header.arrays
    ]
    return hashlib.sha256(canonical_json([manifest.generation, start, stop, about])).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class _Job:
    """An object to send."""

    key: str
    size: int
    """Bytes of local files in it."""
    make: Callable[[], bytes]


def _jobs(local: _Local, new: State) -> Iterator[_Job]:
    """Every object of a state."""
    yield _Job(f"{COLLECTIONS}/{ZARR}", 0, lambda: group_json({}))
    for file, (size, crc) in new.files.items():
        yield _Job(object_of(file, crc), size, partial(local.read, file))
    for name, segments in new.segments.items():
        snapshot = local.snapshots[name]
        yield _Job(f"{COLLECTIONS}/{name}/{ZARR}", 0, lambda: group_json({}))
        for segment in segments:
            yield from _segment_jobs(snapshot, segment, segment.folder(name))


def _segment_jobs(snapshot: Snapshot, segment: Segment, folder: str) -> Iterator[_Job]:
    about = {"gradstore": {"start": segment.start, "stop": segment.stop}}
    yield _Job(f"{folder}/{ZARR}", 0, lambda: group_json(about))
    for array in snapshot.header.arrays:
        packed = Packed(array, segment.rows)
        yield _Job(f"{folder}/{array.name}/{ZARR}", 0, packed.zarr_json)
        for shard in range(packed.shards):
            first = segment.start + shard * packed.shard_rows
            rows = min(packed.shard_rows, segment.stop - first)

            def make(packed: Packed = packed, first: int = first, rows: int = rows) -> bytes:
                return packed.encode_shard(_rows(snapshot, packed.array, first, rows))

            yield _Job(f"{folder}/{array.name}/{packed.shard_file(shard)}", rows * array.row_bytes, make)


def _rows(snapshot: Snapshot, array: RowArray, first: int, n: int) -> np.ndarray:
    """Rows [first, first + n) of an array, checked against the manifest."""
    if array.width is None:
        return snapshot.column(array.name)[first : first + n]
    parts = []
    for chunk in range(first // array.chunk_rows, -(-(first + n) // array.chunk_rows)):
        start = chunk * array.chunk_rows
        parts.append(snapshot.codes.chunk(chunk)[max(0, first - start) : first + n - start])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _send(place: Place, jobs: list[_Job], progress: Callable[[int], None]) -> None:
    """Make and put objects, some at a time; the first error is raised."""

    def send(job: _Job) -> int:
        place.put(job.key, job.make())
        return job.size

    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: set[Future[int]] = set()
        rest = iter(jobs)
        while True:
            for job in rest:
                waiting.add(pool.submit(send, job))
                if len(waiting) >= 2 * _THREADS:
                    break
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for one in done:
                if one.exception() is not None:
                    for other in waiting:
                        other.cancel()
                progress(one.result())


def _prefix(key: str) -> str:
    """What a state names of an object: the prefix of its segment, or the object itself."""
    parts = key.split("/")
    return "/".join(parts[:3]) if len(parts) > 3 and parts[0] == COLLECTIONS and parts[2].startswith("rows-") else key


def _is_there(key: str, there: dict[str, float], before: set[str], old: State, now: int) -> bool:
    """Whether an object need not be sent: the old state names it, or an interrupted push left it not long ago."""
    name = _prefix(key)
    if key not in there or name in old.retired:
        return False
    return name in before or _is_group(key) or there[key] > now - ORPHAN_GRACE / 2


def _is_group(key: str) -> bool:
    """Whether this is the zarr.json of a group outside the segments, which is always the same."""
    return key.endswith(f"/{ZARR}") and _prefix(key) == key


def _is_doomed(key: str, written: float, retired: dict[str, int], now: int) -> bool:
    """Whether an object that no state names goes: it is of a push, and was named or written long ago."""
    name = _prefix(key)
    if name in retired:
        return retired[name] <= now - GRACE
    return (name != key or _KEPT.search(key) is not None) and written <= now - ORPHAN_GRACE
