"""An index on disk, in its collection's folder: `collections/NAME/indexes/KIND-METRIC/`.

`index.json` names the valid files, with their checksums; it is replaced atomically after they are on disk. Other files
are left over from an interrupted build: no reader opens them, and the next build removes them. Nothing here is part of
the store: the folder may be removed at any time.
"""

import io
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gradstore import View
from gradstore.durable import canonical_json, crc32c, fsync_folder, replace_file, writing
from gradstore.engine.searching.indexes.index import Index, Tested, collection_folder
from gradstore.engine.searching.indexes.kinds import kind_class
from gradstore.errors import GradstoreError, LockedError
from gradstore.exclusive import SUFFIX, lock
from gradstore.layout import INDEXES

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
        self._collection = collection_folder(view)
        self._generation = view.stored.generation

    @contextmanager
    def building(self) -> Iterator[bool]:
        """Lock for one builder at a time; others wait. Yields False if the folder cannot be written or locked."""
        path = self.path / "LOCK"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            release = lock(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), path, wait=True)
        except (OSError, LockedError):
            yield False
            return
        try:
            yield True
        finally:
            release()

    def read(self) -> Kept | None:
        """Read the index of this generation; None if there is none or it is damaged."""
        for _ in range(_ATTEMPTS):
            try:
                return self._read()
            except FileNotFoundError:
                continue  # Never built, or replaced between the two reads.
            except (OSError, ValueError, KeyError, TypeError):
                return None  # No such folder, or damaged: the caller builds a new one.
        return None

    def exists(self) -> bool:
        """Whether the folder has an index, not only a refusal; `read` checks its content."""
        try:
            body = json.loads((self.path / "index.json").read_bytes())["index"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return bool(body.get("files")) and body.get("generation") == self._generation

    def write(self, kept: Kept) -> None:
        """Publish the index; call inside `building`. Unchanged files are reused."""
        files: dict[str, Any] = {}
        index = kept.index
        if index is not None:
            old = self._body() if kept.n_saved == len(index) else None
            files = old["files"] if old and old["files"] else self._write_files(index)
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
        text = canonical_json(body)
        replace_file(self.path / "index.json", b'{"crc32c":%d,"index":%s}\n' % (crc32c(text), text))
        kept.n_saved = len(index) if index else 0
        named = {"index.json", "LOCK", f"LOCK{SUFFIX}", *(file["name"] for file in files.values())}
        for path in self.path.iterdir():
            if path.name not in named:
                path.unlink(missing_ok=True)

    def _body(self) -> dict[str, Any] | None:
        try:
            text = (self.path / "index.json").read_bytes()
            whole = json.loads(text)
        except (FileNotFoundError, ValueError):
            return None
        body: dict[str, Any] = whole["index"]
        if whole["crc32c"] != crc32c(canonical_json(body)) or body["format"] != _FORMAT:
            return None
        return body if body["generation"] == self._generation else None

    def _read(self) -> Kept | None:
        body = self._body()
        if body is None:
            return None
        refusals = tuple(Refusal(**refusal) for refusal in body["refusals"])
        if not body["files"]:
            return Kept(None, body["recall"], refusals)
        paths = {}
        for name, file in body["files"].items():
            paths[name] = self.path / file["name"]
            if crc32c(np.memmap(paths[name], np.uint8, "r")) != file["crc32c"]:
                return None
        kind = kind_class(self.kind)
        entry_rows, entry_norms = (np.load(paths[name], allow_pickle=False) for name in ("rows", "norms"))
        index = Index(
            kind.load(paths["entries"]), self.metric, self._collection, self._generation, entry_rows, entry_norms,
            tuple(Tested(**tested) for tested in body["tested"]), body["n_tested"],
        )  # fmt: skip
        return Kept(index, body["recall"], refusals, len(entry_rows))

    def _write_files(self, index: Index) -> dict[str, dict[str, Any]]:
        token = secrets.token_hex(8)
        files = {}
        with writing(self.path):
            for name in ("entries", "rows", "norms"):
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
                files[name] = {"name": path.name, "crc32c": crc32c(np.memmap(path, np.uint8, "r"))}
            fsync_folder(self.path)
            fsync_folder(self.path.parent)
        return files
