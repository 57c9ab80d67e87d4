"""An index beside its collection: `collections/NAME/indexes/KIND-METRIC/`.

`index.json` names the files that count, with their checksums; it is replaced in one step after they are on the disk.
Whatever else lies there is the rest of a build that was interrupted, opens nowhere and goes with the next one. Nothing
here is part of the store: the folder may be removed at any time.
"""

import fcntl
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
from gradstore.engine.searching.indexes.kinds import Effort, kind_class
from gradstore.errors import GradstoreError
from gradstore.layout import INDEXES

_FORMAT = 1
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Refusal:
    """An index that did not reach the recall asked."""

    k: int
    recall: float
    asked: float
    n_rows: int


@dataclass(slots=True)
class Kept:
    """What a folder holds."""

    index: Index | None
    """None: refused at every k."""
    recall: float
    """Asked when it was tested."""
    refusals: tuple[Refusal, ...] = ()
    n_saved: int = 0
    """Entries that are on disk."""


class IndexFolder:
    """The place of one kind of index for one metric of a collection."""

    def __init__(self, view: View, kind: str, metric: str) -> None:
        self.kind = kind
        self.metric = metric
        self.path = collection_folder(view) / INDEXES / f"{kind}-{self.metric}"
        self._collection = collection_folder(view)
        self._generation = view.generation

    @contextmanager
    def building(self) -> Iterator[bool]:
        """One builder at a time; others wait. False where the folder cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / "LOCK", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            yield False
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield True
        finally:
            os.close(descriptor)

    def read(self) -> Kept | None:
        """What was kept for this generation, if it is whole; None otherwise."""
        for _ in range(_ATTEMPTS):
            try:
                return self._read()
            except FileNotFoundError:
                continue  # Never built, or replaced between the two reads.
            except (OSError, ValueError, KeyError, TypeError):
                return None  # Nowhere to keep one, or damaged: it is built anew.
        return None

    def exists(self) -> bool:
        """Whether an index, not a refusal, is kept; its content is checked when it is read."""
        try:
            body = json.loads((self.path / "index.json").read_bytes())["index"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return bool(body.get("files")) and body.get("generation") == self._generation

    def write(self, kept: Kept) -> None:
        """Publish; call inside `building`. Files already there and unchanged are kept."""
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
        named = {"index.json", "LOCK", *(file["name"] for file in files.values())}
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
        entry_rows, entry_norms = np.load(paths["rows"]), np.load(paths["norms"])
        metric = self.metric
        index = Index(
            kind.load(paths["entries"]),
            "gradient" if metric != "cosine" and kind.scaled else "unit",
            metric, self._collection, self._generation, entry_rows, entry_norms,
            tuple(Tested(**{**tested, "effort": Effort(**tested["effort"])}) for tested in body["tested"]),
            body["n_tested"],
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
                    except RuntimeError as error:  # FAISS's word for a failed write
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
