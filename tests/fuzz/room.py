"""The place of one try: an empty folder, canaries beside it, and pictures of file trees to compare.

    TOP/1/2/3/room/store, inputs, out    what a try may use
    TOP/1/2/3/room/outside               canaries; links and names of hostile input point at them

TOP has several levels, so that names such as `../../../x` still end inside it. Whatever else appears, changes or goes
below TOP was touched outside. A canary's access time also shows that it was read.
"""

import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

OWN = ("store", "inputs", "out")
"""Folders of a room that a try may change."""
_OWN = tuple(f"1/2/3/room/{name}" for name in OWN)
NOT_STORE = ("LOCK", "indexes")
"""Names in a store that a command may change though it fails: the lock and what can be rebuilt."""
_LONG_AGO = 1_000_000_000

Picture = dict[str, tuple[int, str]]
"""Relative path -> (type of the file, digest of its bytes or target of the link)."""


class Room:
    """The room of one worker; `clear` makes it empty for the next try."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.folder = top / "1" / "2" / "3" / "room"
        self.outside = self.folder / "outside"
        self.secret = f"canary-{secrets.token_hex(8)}"
        """Text in every canary: it must appear in no output."""
        self._build()

    def clear(self) -> None:
        """Remove what the last try left."""
        for name in OWN:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in OWN[1:]:
            (self.folder / name).mkdir()

    def plant(self, name: str, data: bytes) -> None:
        """Put another file among the canaries, for this try."""
        path = self.outside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self._canaries.append(path)
        self._before = picture(self.top, _OWN)
        self._planted = True
        self._unread()

    def touched(self) -> list[str]:
        """What was changed, created or removed outside since the room was built; repairs it."""
        now = picture(self.top, _OWN)
        found = [
            f"changed {name}"
            for name in sorted(now.keys() | self._before.keys())
            if now.get(name) != self._before.get(name)
        ]
        if self._planted or any(words.startswith("changed") for words in found):
            shutil.rmtree(self.top, ignore_errors=True)
            self._build()
            os.chdir(self.folder)
        else:
            self._unread()
        return found

    def read(self) -> list[str]:
        """Canaries that were read since the last call."""
        found = [path.name for path in self._canaries if _was_read(path)]
        if found:
            self._unread()
        return found

    def _build(self) -> None:
        self._planted = False
        self.outside.mkdir(parents=True)
        (self.outside / "folder").mkdir()
        names = (
            "canary",
            "manifest.json",
            "part-000000.parquet",
            "index.json",
            "LOCK",
            "folder/canary",
            "folder/IN-USE",
        )
        self._canaries = [self.outside / name for name in names]
        for path in self._canaries:
            path.write_text(f"{self.secret}\n", encoding="utf-8")
        self.clear()
        self._before = picture(self.top, _OWN)
        self._unread()

    def _unread(self) -> None:
        for path in self._canaries:
            with suppress(FileNotFoundError):  # `touched` will say so
                os.utime(path, (_LONG_AGO, _LONG_AGO + 1))


def _was_read(path: Path) -> bool:
    try:
        return path.stat().st_atime != _LONG_AGO
    except OSError:
        return False


def picture(top: Path, without: tuple[str, ...] = ()) -> Picture:
    """Picture of a file tree; follows no links and opens regular files only. without: relative paths left out."""
    return {name: _one(Path(entry.path), entry.stat(follow_symlinks=False)) for name, entry in _walk(top, "", without)}


def store_picture(store: Path) -> Picture:
    """Picture of a store's own bytes: without locks and indexes."""
    return {name: seen for name, seen in picture(store).items() if not set(name.split("/")) & set(NOT_STORE)}


def changes(before: Picture, after: Picture) -> list[str]:
    """What differs between two pictures, in words."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            found.append(f"{'new' if name not in before else 'gone' if name not in after else 'changed'} {name}")
    return found


def write_tree(folder: Path, files: dict[str, bytes]) -> None:
    """Write files, given by relative path, in a new folder."""
    made: set[str] = set()
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = os.path.join(folder, name)
        parent = os.path.dirname(path)
        if parent not in made:
            os.makedirs(parent, exist_ok=True)
            made.add(parent)
        with open(path, "wb") as file:
            file.write(data)


def read_tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _walk(top: Path, prefix: str, without: tuple[str, ...]) -> Iterator[tuple[str, os.DirEntry]]:
    try:
        entries = sorted(os.scandir(top), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        name = f"{prefix}{entry.name}"
        if name not in without:
            yield name, entry
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path), f"{name}/", without)


def _one(path: Path, status: os.stat_result) -> tuple[int, str]:
    kind = stat.S_IFMT(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        return kind, os.readlink(path)
    if not stat.S_ISREG(status.st_mode):
        return kind, ""
    if status.st_size > 1 << 24:  # a sparse file of a try
        return kind, f"{status.st_size} bytes"
    return kind, hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
