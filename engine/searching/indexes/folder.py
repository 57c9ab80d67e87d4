"""An index on disk, in its collection's folder: `collections/NAME/indexes/KIND-METRIC/`.

`index.json` names the valid files, with their checksums; it is replaced atomically after they are on disk. Other files
are left over from an interrupted build: no reader opens them, and the next build removes them. Nothing here is part of
the store: the folder may be removed at any time.
"""

import io
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradstore import View
from gradstore.durable import TEMPORARY, canonical_json, crc32c, fsync_folder, replace_file, writing
from gradstore.engine.searching.indexes.index import Index, Tested, collection_folder
from gradstore.engine.searching.indexes.kinds import Kind, kind_class
from gradstore.errors import DamagedError, GradstoreError, LockedError, first_line
from gradstore.exclusive import SUFFIX, lock
from gradstore.inside import check_folder, names_inside, open_inside, remove_file
from gradstore.layout import INDEXES, store_of
from gradstore.schema import Checker, lists, number, record, text, whole

_FILES = ("entries", "rows", "norms")
_RECORD = {"k": whole(1), "recall": number(0, 1)}
_WHOLE = Checker(
    record(
        {
            "crc32c": whole(),
            "index": record(
                {
                    "format": whole(),
                    "kind": text(),
                    "metric": text(),
                    "generation": whole(),
                    "recall": number(),
                    "refusals": lists(record({**_RECORD, "asked": number(), "n_rows": whole()})),
                    "files": record(
                        {},
                        {
                            name: record(
                                {"name": text(f"{name}-[0-9a-f]{{16}}"), "crc32c": whole(0, 2**32 - 1)},
                                {"bytes": whole()},
                            )
                            for name in _FILES
                        },
                    ),
                    "n_tested": whole(),
                    "tested": lists(record({**_RECORD, "worst": number(0, 1), "factor": number(0, 1000)})),
                }
            ),
        }
    )
)
_NAMES = re.compile(rf"({'|'.join(_FILES)})-[0-9a-f]+|{re.escape(TEMPORARY)}.*")
"""Files that a build may leave, and the next one removes."""
_MOST_BYTES = 1 << 24
"""Largest index.json."""
_FORMAT = 2
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Refusal:
    """Record of an index that did not reach the requested recall."""

    k: int
    recall: float
    asked: float
    n_rows: int


@dataclass(slots=True)
class Kept:
    """Content of an index folder."""

    index: Index | None
    """The index; None: refused at every k."""
    recall: float
    """Recall requested when it was tested."""
    refusals: tuple[Refusal, ...] = ()
    n_saved: int = 0
    """Number of entries on disk."""


class IndexFolder:
    """Folder of one kind of index for one metric of a collection."""

    def __init__(self, view: View, kind: str, metric: str) -> None:
        self.kind = kind
        self.metric = metric
        self.path = collection_folder(view) / INDEXES / f"{kind}-{self.metric}"
        self.fault = ""
        """Why `read` could not open the index that is there; empty if it could, or there is none."""
        self._view = view
        self._collection = collection_folder(view)
        self._store = store_of(self._collection)
        self._what = kind, metric
        self._generation = view.stored.generation

    @contextmanager
    def building(self) -> Iterator[bool]:
        """Lock for one builder at a time; others wait. Yields False if the folder cannot be written or locked."""
        path = self.path / "LOCK"
        try:
            check_folder(self.path, self._store)
            self.path.mkdir(parents=True, exist_ok=True)
            release = lock(open_inside(path, self._store, os.O_RDWR | os.O_CREAT), path, wait=True)
        except (OSError, DamagedError, LockedError):
            yield False
            return
        try:
            yield True
        finally:
            release()

    def read(self) -> Kept | None:
        """Read the index of this generation, without a lock; None if there is none.

        One that cannot be used (damaged, of other rows, or of another version of its library) sets `fault`.
        """
        kind, self.fault, fault = kind_class(self.kind), "", ""
        for _ in range(_ATTEMPTS):
            try:
                return self._read(kind)
            except (FileNotFoundError, NotADirectoryError) as error:
                fault = first_line(error)  # Never built, or replaced between the two reads.
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
                fault = first_line(error)
                break
        self.fault = fault if (self.path / "index.json").exists() else ""
        return None

    def exists(self) -> bool:
        """Whether the folder has an index, not only a refusal; `read` checks its content."""
        try:
            body = self._body()
        except (OSError, ValueError):
            return False
        return body is not None and bool(body["files"])

    def write(self, kept: Kept) -> None:
        """Publish the index; call inside `building`. Unchanged files are reused."""
        files: dict[str, Any] = {}
        index = kept.index
        if index is not None:
            files = self._kept_files() if kept.n_saved == len(index) else {}
            files = files or self._write_files(index)
        body = {
            "format": _FORMAT,
            "kind": self.kind,
            "metric": self.metric,
            "generation": self._generation,
            "recall": kept.recall,
            "refusals": [asdict(refusal) for refusal in kept.refusals],
            "files": files,
            "n_tested": index.n_tested if index else 0,
            "tested": [asdict(tested) for tested in index.tested] if index else [],
        }
        canonical = canonical_json(body)
        replace_file(self.path / "index.json", b'{"crc32c":%d,"index":%s}\n' % (crc32c(canonical), canonical))
        kept.n_saved = len(index) if index else 0
        named = {"index.json", "LOCK", f"LOCK{SUFFIX}", *(file["name"] for file in files.values())}
        for name in names_inside(self.path, self._store):
            if name not in named and _NAMES.fullmatch(name):
                remove_file(self.path / name, self._store)

    def _kept_files(self) -> dict[str, Any]:
        """The files of the index on disk; none if it cannot be read."""
        try:
            body = self._body()
        except (OSError, ValueError):
            return {}
        return {} if body is None else body["files"]

    def _body(self) -> dict[str, Any] | None:
        """What index.json says; None for an index of an earlier format or another generation. ValueError if damaged."""
        raw = self._bytes("index.json", _MOST_BYTES)
        try:
            found = _WHOLE.parse(raw, "index.json")
        except DamagedError as error:
            raise ValueError(str(error)) from None
        body: dict[str, Any] = found["index"]
        if found["crc32c"] != crc32c(canonical_json(body)):
            raise ValueError("index.json does not match its checksum")
        if body["files"] and (set(body["files"]) != set(_FILES) or (body["kind"], body["metric"]) != self._what):
            raise ValueError("index.json is of another index")
        return body if (body["format"], body["generation"]) == (_FORMAT, self._generation) else None

    def _read(self, kind: type[Kind]) -> Kept | None:
        body = self._body()
        if body is None:
            return None
        refusals = tuple(Refusal(**refusal) for refusal in body["refusals"])
        if not body["files"]:
            return Kept(None, body["recall"], refusals)
        paths = {}
        for name, file in body["files"].items():
            paths[name] = self.path / file["name"]
            descriptor = self._opened(file["name"])  # No link, no pipe: the libraries below open by path.
            size = os.fstat(descriptor).st_size
            os.close(descriptor)
            if size != file.get("bytes"):  # Before they are read: a sparse file may claim any size.
                raise ValueError(f"{paths[name].name} has {size} bytes, not those that its index.json tells")
            if crc32c(np.memmap(paths[name], np.uint8, "r")) != file["crc32c"]:
                raise ValueError(f"{paths[name].name} does not match its checksum")
        entry_rows, entry_norms = (_array(paths[name]) for name in ("rows", "norms"))
        n = len(entry_rows)
        if (entry_rows.dtype, entry_norms.dtype) != (np.int64, np.float32) or entry_norms.shape != (n,):
            raise ValueError("its rows and norms are not those of an index")
        if entry_rows.shape != (n,) or entry_rows.min(initial=0) < 0 or len(np.unique(entry_rows)) < n:
            raise ValueError("its rows are not row numbers, each once")
        entries = kind.load(paths["entries"], n, self._view.dim)
        index = Index(
            entries, self.metric, self._collection, self._generation, entry_rows, entry_norms,
            tuple(Tested(**tested) for tested in body["tested"]), body["n_tested"],
        )  # fmt: skip
        index.positions(self._view)  # RequestError, which is a ValueError, if it is of other rows.
        return Kept(index, body["recall"], refusals, len(entry_rows))

    def _opened(self, name: str) -> int:
        """Descriptor of a file of the folder; ValueError for a link and for anything else that is no file."""
        try:
            return open_inside(self.path / name, self._store)
        except DamagedError as error:
            raise ValueError(str(error)) from None

    def _bytes(self, name: str, most: int) -> bytes:
        with os.fdopen(self._opened(name), "rb") as file:
            if os.fstat(file.fileno()).st_size > most:
                raise ValueError(f"{name} has more than {most} bytes")
            return file.read()

    def _write_files(self, index: Index) -> dict[str, dict[str, Any]]:
        token = secrets.token_hex(8)
        files = {}
        with writing(self.path):
            for name in _FILES:
                path = self.path / f"{name}-{token}"
                if name == "entries":
                    try:
                        index.kind.save(path)
                    except RuntimeError as error:  # FAISS raises this for a failed write.
                        raise GradstoreError(f"{path}: writing failed ({str(error)[:200]})") from error
                else:
                    buffer = io.BytesIO()
                    np.save(buffer, index.entry_rows if name == "rows" else index.entry_norms)
                    path.write_bytes(buffer.getvalue())
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                crc = crc32c(np.memmap(path, np.uint8, "r"))
                files[name] = {"name": path.name, "bytes": path.stat().st_size, "crc32c": crc}
            fsync_folder(self.path)
            fsync_folder(self.path.parent)
        return files


def _array(path: Path) -> np.ndarray:
    """The array in a file of numpy's; ValueError for any other file."""
    try:
        return np.load(path, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 (numpy parses the header as Python, which raises what it likes)
        raise ValueError(f"{path.name}: {first_line(error)}") from None
