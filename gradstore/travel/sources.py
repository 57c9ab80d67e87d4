"""Where a store's files are read from: keys to bytes, for a copy (remote.py) that believes none of them.

`ZarrSource` reads any zarr store. If that holds a pushed store (state.py), `PackedSource` stands before it and answers
with the local files: it finds the rows of a chunk file in the segments and decodes them. So there is one way to copy,
whether a store was uploaded as it is or pushed.
"""

import asyncio
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np

from gradstore.durable import crc32c
from gradstore.errors import DamagedError, GradstoreError, first_line
from gradstore.header import parse_header
from gradstore.inside import MOST_BYTES as MOST_FILE_BYTES
from gradstore.inside import open_inside
from gradstore.layout import COLLECTIONS, MANIFEST, ZARR, RowArray
from gradstore.manifest import Manifest
from gradstore.travel.packing import Packed
from gradstore.travel.state import MOST_BYTES, STATE, Segment, State

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

T = TypeVar("T")
_AT_ONCE = 16
_SHARD_CACHE_BYTES = 64 << 20
_CHUNK = re.compile(rf"{COLLECTIONS}/([^/]+)/(g[0-9]+)/([a-z_]+)/c\.([0-9]+)(\.0)?")


class Wanted(NamedTuple):
    """Bytes to read: `most` from `start` on, fewer where the value ends before."""

    key: str
    most: int
    start: int = 0


class Source(Protocol):
    """Read access to the files of a store, by their paths in the store's folder. `str` names it in messages."""

    def get(self, wanted: Sequence[Wanted]) -> list[bytes | None]:
        """Read several values concurrently; None for a missing key. GradstoreError if the source cannot be read."""

    def listed(self, folder: str) -> list[str]:
        """Names in a folder, sorted, without names that begin with a dot."""

    def sizes(self, keys: Sequence[str]) -> list[int]:
        """Sizes of several values; DamagedError for one that no file of a store has."""

    def renew(self) -> bool:
        """Read anew what was kept; whether something changed."""


def check_sizes(source: Source, keys: Sequence[str], sizes: Sequence[int]) -> list[int]:
    for key, size in zip(keys, sizes, strict=True):
        if not 0 < size <= MOST_FILE_BYTES:
            raise DamagedError(f"{source}: {key} has {size} bytes, expected 1 to {MOST_FILE_BYTES}")
    return list(sizes)


class ZarrSource:
    """Any zarr store. `requests` and `received` count what was asked and the bytes that came."""

    def __init__(
        self, store: "ZarrStore", name: str | None = None, said: Callable[[BaseException], str] = first_line
    ) -> None:
        """name: for messages. said: a library's error as one line."""
        self._store, self._name, self._said = store, name, said
        self.requests = self.received = 0

    def __str__(self) -> str:
        return str(self._store) if self._name is None else self._name

    def get(self, wanted: Sequence[Wanted]) -> list[bytes | None]:
        from zarr.abc.store import RangeByteRequest
        from zarr.core.buffer import default_buffer_prototype

        async def fetch() -> list[bytes | None]:
            prototype = default_buffer_prototype()
            found = await asyncio.gather(
                *(
                    self._store.get(one.key, prototype, RangeByteRequest(one.start, one.start + one.most))
                    for one in wanted
                )
            )
            return [None if buffer is None else buffer.to_bytes() for buffer in found]

        folder = _folder_of(self._store)
        if folder is not None:
            for one in wanted:
                _refuse_links(folder, one.key)
        found = [
            None if data is None else data[: one.most]
            for data, one in zip(self._reached(fetch(), len(wanted)), wanted, strict=True)
        ]
        self.received += sum(len(data) for data in found if data)
        return found

    def listed(self, folder: str) -> list[str]:
        async def names() -> list[str]:
            return [key.rstrip("/").split("/")[-1] async for key in self._store.list_dir(folder)]

        return sorted(name for name in self._reached(names()) if name and not name.startswith("."))

    def sizes(self, keys: Sequence[str]) -> list[int]:
        async def ask() -> list[int]:
            return list(await asyncio.gather(*(self._store.getsize(key) for key in keys)))

        return check_sizes(self, keys, self._reached(ask(), len(keys)))

    def renew(self) -> bool:
        return False

    def _reached(self, work: Coroutine[Any, Any, T], requests: int = 1) -> T:
        """Result of requests. Each library has errors of its own; they become a GradstoreError."""
        from zarr.core.sync import sync

        self.requests += requests
        try:
            return sync(work)
        except Exception as error:
            raise GradstoreError(f"{self}: cannot be read ({self._said(error)})") from error


def _folder_of(store: "ZarrStore") -> Path | None:
    """The folder that a zarr store reads, if it is one of this machine."""
    from zarr.storage import FsspecStore, LocalStore

    if isinstance(store, LocalStore):
        return store.root
    if isinstance(store, FsspecStore) and "file" in store.fs.protocol:
        return Path(store.path)
    return None


def _refuse_links(root: Path, key: str) -> None:
    """DamagedError for what is no ordinary file of a store on this machine: zarr would open it."""
    try:
        os.close(open_inside(root / key, root))
    except FileNotFoundError:
        return
    except OSError as error:
        raise GradstoreError(f"{root / key}: cannot be read ({error.strerror})") from error


def packed_or_plain(source: Source) -> Source:
    """The source, with a PackedSource before it if it holds a pushed store."""
    raw = source.get([Wanted(STATE, MOST_BYTES)])[0]
    return source if raw is None else PackedSource(source, State.from_bytes(raw, str(source)))


class PackedSource:
    """The local files of a pushed store, as one state of it names them."""

    def __init__(self, source: Source, state: State) -> None:
        self._source, self.state = source, state
        self._lock = Lock()
        self._forget()

    def _forget(self) -> None:
        self._texts: dict[str, bytes] = {}
        self._indexes: dict[str, list[tuple[int, int]]] = {}
        self._shards: OrderedDict[str, np.ndarray] = OrderedDict()
        self._arrays: dict[str, RowArray] | None = None

    def __str__(self) -> str:
        return str(self._source)

    def renew(self) -> bool:
        self._source.renew()
        raw = self._source.get([Wanted(STATE, MOST_BYTES)])[0]
        if raw is None:
            return False
        with self._lock:
            newer = State.from_bytes(raw, str(self))
            changed = newer != self.state
            if changed:
                self.state = newer
                self._forget()
        return changed

    def listed(self, folder: str) -> list[str]:
        inside = f"{folder}/"
        return sorted({path[len(inside) :].split("/")[0] for path in self.state.files if path.startswith(inside)})

    def sizes(self, keys: Sequence[str]) -> list[int]:
        return check_sizes(self, keys, [self.state.files[key][0] for key in keys])

    def get(self, wanted: Sequence[Wanted]) -> list[bytes | None]:
        found: dict[int, bytes | None] = {}
        files = [i for i, one in enumerate(wanted) if one.key in self.state.files]
        found |= zip(files, self._files([wanted[i].key for i in files]), strict=True)
        rows = {i: at for i, one in enumerate(wanted) if i not in found and (at := self._place(one)) is not None}
        narrow = [i for i, (_, array, _, _) in rows.items() if array.width is None]
        wide = [i for i in rows if i not in narrow]
        for i in narrow:  # One after the other: a shard has many chunks of a column, and is read once.
            found[i] = self._rows(*rows[i])
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found |= zip(wide, pool.map(lambda i: self._rows(*rows[i]), wide), strict=True)
        return [
            None if (data := found.get(i)) is None else data[one.start : one.start + one.most]
            for i, one in enumerate(wanted)
        ]

    def _files(self, paths: list[str]) -> list[bytes]:
        """Files that are kept as they are, whole; DamagedError for one whose bytes are not those of the state."""
        missing = [path for path in paths if path not in self._texts]
        asked = [Wanted(self.state.key(path), self.state.files[path][0]) for path in missing]
        new: dict[str, bytes] = {}
        for path, one, data in zip(missing, asked, self._source.get(asked) if asked else [], strict=True):
            if data is None or len(data) != one.most or crc32c(data) != self.state.files[path][1]:
                fault = "the object is missing" if data is None else "its bytes do not match their checksum"
                raise DamagedError(f"{self}: {one.key}: {fault}")
            new[path] = data
        self._texts |= {path: data for path, data in new.items() if path.endswith(".json")}
        return [new[path] if path in new else self._texts[path] for path in paths]

    def _place(self, one: Wanted) -> tuple[str, RowArray, int, int] | None:
        """(collection, array, first row, number of rows) of a chunk file's wanted bytes; None if there are none."""
        match = _CHUNK.fullmatch(one.key)
        if match is None or f"{COLLECTIONS}/{match[1]}/{MANIFEST}" not in self.state.files:
            return None
        array = self._array(match[3])
        if array is None or bool(match[5]) != (array.width is not None) or self._generation(match[1]) != match[2]:
            return None
        return match[1], array, int(match[4]) * array.chunk_rows, (one.start + one.most) // array.row_bytes

    def _array(self, name: str) -> RowArray | None:
        if self._arrays is None:
            header = parse_header(self._files([ZARR])[0], Path(str(self)))
            self._arrays = {array.name: array for array in header.arrays}
        return self._arrays.get(name)

    def _generation(self, collection: str) -> str:
        path = f"{COLLECTIONS}/{collection}/{MANIFEST}"
        return Manifest.from_bytes(self._files([path])[0], Path(path)).folder

    def _rows(self, collection: str, array: RowArray, first: int, n: int) -> bytes:
        """Bytes of rows [first, first + n), fewer if the segments end before."""
        parts: list[np.ndarray] = []
        for segment in self.state.segments.get(collection, ()):
            start, stop = max(first, segment.start), min(first + n, segment.stop)
            if start < stop:
                parts += self._segment_rows(collection, segment, array, start - segment.start, stop - segment.start)
        return b"".join(part.tobytes() for part in parts)

    def _segment_rows(
        self, collection: str, segment: Segment, array: RowArray, start: int, stop: int
    ) -> Iterator[np.ndarray]:
        """Rows [start, stop) of a segment, as one part of each chunk or shard."""
        packed, folder = Packed(array, segment.rows), f"{segment.folder(collection)}/{array.name}"
        step = packed.shard_rows if array.width is None else packed.chunk_rows
        for number in range(start // step, -(-stop // step)):
            if array.width is None:
                rows = self._shard(packed, f"{folder}/{packed.shard_file(number)}")
            else:
                shard, chunk = divmod(number, packed.shard_chunks)
                rows = self._chunk(packed, f"{folder}/{packed.shard_file(shard)}", chunk)
            yield rows[max(0, start - number * step) : stop - number * step]

    def _chunk(self, packed: Packed, key: str, chunk: int) -> np.ndarray:
        """One chunk of a shard: two requests the first time, then one."""
        if packed.shard_chunks == 1:
            return self._decoded(packed, key)
        if key not in self._indexes:
            data = self._asked(Wanted(key, packed.index_bytes))
            self._indexes[key] = packed.read_index(data, f"{self}: {key}")
        offset, size = self._indexes[key][chunk]
        if offset < 0:
            raise DamagedError(f"{self}: {key}: damaged: has no chunk {chunk}")
        return packed.decode_chunk(self._asked(Wanted(key, size, offset)), f"{self}: {key}")

    def _shard(self, packed: Packed, key: str) -> np.ndarray:
        """A whole shard, kept for a while."""
        with self._lock:
            if key not in self._shards:
                self._shards[key] = self._decoded(packed, key)
                while sum(rows.nbytes for rows in self._shards.values()) > _SHARD_CACHE_BYTES and len(self._shards) > 1:
                    self._shards.popitem(last=False)
            return self._shards[key]

    def _decoded(self, packed: Packed, key: str) -> np.ndarray:
        data = self._asked(Wanted(key, packed.most_bytes))
        parts = []
        for offset, size in packed.read_index(data, f"{self}: {key}"):
            if offset < 0:
                break  # The array ends before.
            parts.append(packed.decode_chunk(data[offset : offset + size], f"{self}: {key}"))
        return np.concatenate(parts) if parts else np.empty(packed.array.shape(0), packed.array.dtype)

    def _asked(self, one: Wanted) -> bytes:
        (data,) = self._source.get([one])
        if data is None:
            raise DamagedError(f"{self}: {one.key}: the object is missing; open the store again")
        return data
