"""Simulated power cuts: record a program's file operations, then build the state a disk could have after a cut.

`recorded` logs every change under a folder that goes through `os`: new files and folders, writes, sizes, names, and
fsyncs. `Disk.states` replays them, and `DiskState.build` keeps

    of a file     the bytes covered by an fsync of it
    of a folder   the names covered by an fsync of it

Of later changes it keeps nothing, or a random part: each write whole, torn at a sector of 512 bytes, or not at all, and
each change of names whole or not at all. This is harsher than journaling file systems are.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

SECTOR = 512
RECORDED = "open", "pwrite", "posix_fallocate", "ftruncate", "fsync", "fdatasync", "rename", "mkdir", "unlink", "rmdir"


@dataclass
class _File:
    durable: bytearray = field(default_factory=bytearray)
    waiting: list[tuple] = field(default_factory=list)

    def apply(self, change: tuple, data: bytearray) -> None:
        kind, *rest = change
        if kind == "write":
            offset, written = rest
            if len(data) < offset:
                data.extend(bytes(offset - len(data)))
            data[offset : offset + len(written)] = written
        elif kind == "grow":
            data.extend(bytes(max(0, rest[0] - len(data))))
        else:
            del data[rest[0] :]
            data.extend(bytes(rest[0] - len(data)))

    def after(self, keep: Callable[[], bool], random: np.random.Generator) -> bytes:
        data = bytearray(self.durable)
        for change in self.waiting:
            if not keep():
                continue
            if change[0] == "write" and random.random() < 0.5:
                sectors = int(random.integers(0, len(change[2]) // SECTOR + 1))
                change = ("write", change[1], change[2][: sectors * SECTOR])
            self.apply(change, data)
        return bytes(data)


@dataclass
class _Folder:
    durable: dict[str, int] = field(default_factory=dict)
    waiting: list[dict[str, int | None]] = field(default_factory=list)
    """Name changes that wait for an fsync, each all or nothing; None: the name is removed."""

    def after(self, keep: Callable[[], bool]) -> dict[str, int]:
        names: dict[str, int | None] = dict(self.durable)
        for change in self.waiting:
            if keep():
                names |= change
        return {name: node for name, node in names.items() if node is not None}


class Disk:
    """A folder's initial content, and the log of changes to it."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        self.log: list[tuple] = []
        self._lock = threading.RLock()
        self._nodes = 1
        self._node_of: dict[str, int] = {self.root: 0}
        self._descriptors: dict[int, tuple[int, str]] = {}
        self._start: dict[int, _File | _Folder] = {0: _Folder()}
        for folder, folders, files in os.walk(self.root):
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                node = self._new(path)
                self._start[node] = _Folder() if name in folders else _File(bytearray(Path(path).read_bytes()))
                parent = self._start[self._node_of[folder]]
                assert isinstance(parent, _Folder)
                parent.durable[name] = node

    def mark(self, what: object) -> None:
        """Add a note of the program to the log."""
        with self._lock:
            self.log.append(("mark", what))

    def states(self) -> Iterator[tuple[int, "DiskState"]]:
        """Yield the disk state after each event of the log; it is the same object, updated each time."""
        state = DiskState(self._start)
        for number, event in enumerate(self.log):
            state.step(event)
            yield number, state

    def _new(self, path: str) -> int:
        node = self._node_of[path] = self._nodes
        self._nodes += 1
        return node

    def _path(self, path: Any, dir_fd: int | None = None) -> str:
        base = self.root if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        return os.path.join(base, os.fspath(path)) if dir_fd is not None else os.path.abspath(os.fspath(path))

    def _inside(self, path: str) -> bool:
        return path == self.root or path.startswith(self.root + "/")

    def _name(self, path: str, node: int | None) -> None:
        folder, name = os.path.split(path)
        self.log.append(("names", self._node_of[folder], {name: node}))


@dataclass
class DiskState:
    """State of a disk: durable data, and changes that wait for an fsync."""

    nodes: dict[int, "_File | _Folder"]

    def __init__(self, start: dict[int, "_File | _Folder"]) -> None:
        self.nodes = {
            n: _File(bytearray(x.durable)) if isinstance(x, _File) else _Folder(dict(x.durable))
            for n, x in start.items()
        }

    def step(self, event: tuple) -> None:
        kind, *rest = event
        if kind == "file":
            self.nodes[rest[0]] = _File()
        elif kind == "folder":
            self.nodes[rest[0]] = _Folder()
        elif kind == "change":
            node = self.nodes[rest[0]]
            assert isinstance(node, _File)
            node.waiting.append(rest[1])
        elif kind == "names":
            folder = self.nodes[rest[0]]
            assert isinstance(folder, _Folder)
            folder.waiting.append(rest[1])
        elif kind == "sync":
            node = self.nodes[rest[0]]
            if isinstance(node, _File):
                for change in node.waiting:
                    node.apply(change, node.durable)
            else:
                node.durable = node.after(lambda: True)
            node.waiting = []

    def build(self, target: Path, random: np.random.Generator | None = None) -> None:
        """Write the folder as it would be after a cut now. random: keep a random part of the unsynced changes."""
        generator = np.random.default_rng(0) if random is None else random

        def keep() -> bool:
            return random is not None and bool(generator.random() < 0.5)

        def put(node: int, path: Path) -> None:
            content = self.nodes[node]
            if isinstance(content, _File):
                path.write_bytes(content.after(keep, generator))
                return
            path.mkdir()
            for name, below in content.after(keep).items():
                put(below, path / name)

        put(0, target)


@contextmanager
def recorded(root: Path) -> Iterator[Disk]:
    """Record this process's changes to the folder through `os`; the initial content counts as durable."""
    disk = Disk(root)
    lock = disk._lock
    names = (
        "open",
        "pwrite",
        "posix_fallocate",
        "ftruncate",
        "fsync",
        "fdatasync",
        "rename",
        "mkdir",
        "unlink",
        "rmdir",
    )
    real = {name: getattr(os, name) for name in names}

    def call_open(path: Any, flags: int, *rest: Any, dir_fd: int | None = None, **options: Any) -> int:
        with lock:
            where = disk._path(path, dir_fd)
            descriptor = real["open"](path, flags, *rest, dir_fd=dir_fd, **options)
            if disk._inside(where):
                if where not in disk._node_of:
                    disk.log.append(("file", disk._new(where)))
                    disk._name(where, disk._node_of[where])
                elif flags & os.O_TRUNC:
                    disk.log.append(("change", disk._node_of[where], ("cut", 0)))
                disk._descriptors[descriptor] = disk._node_of[where], where
            else:
                disk._descriptors.pop(descriptor, None)
            return int(descriptor)

    def call_write(name: str, to_change: Callable[..., tuple]) -> Callable:
        def call(descriptor: int, *rest: Any) -> Any:
            with lock:
                told = real[name](descriptor, *rest)
                if descriptor in disk._descriptors:
                    disk.log.append(("change", disk._descriptors[descriptor][0], to_change(told, *rest)))
                return told

        return call

    def call_sync(name: str) -> Callable:
        def call(descriptor: int) -> None:
            with lock:
                real[name](descriptor)
                if descriptor in disk._descriptors:
                    disk.log.append(("sync", disk._descriptors[descriptor][0]))

        return call

    def call_rename(source: Any, target: Any) -> None:
        with lock:
            real["rename"](source, target)
            old, new = disk._path(source), disk._path(target)
            assert os.path.dirname(old) == os.path.dirname(new)
            node = disk._node_of[new] = disk._node_of.pop(old)
            names = {os.path.basename(new): node, os.path.basename(old): None}
            disk.log.append(("names", disk._node_of[os.path.dirname(new)], names))

    def call_mkdir(path: Any, *rest: Any, **options: Any) -> None:
        with lock:
            real["mkdir"](path, *rest, **options)
            where = disk._path(path)
            if disk._inside(where):
                disk.log.append(("folder", disk._new(where)))
                disk._name(where, disk._node_of[where])

    def call_remove(name: str) -> Callable:
        def call(path: Any, *, dir_fd: int | None = None) -> None:
            with lock:
                where = disk._path(path, dir_fd)
                real[name](path, dir_fd=dir_fd)
                if disk._inside(where):
                    del disk._node_of[where]
                    disk._name(where, None)

        return call

    calls: dict[str, Callable] = {
        "open": call_open,
        "pwrite": call_write("pwrite", lambda told, data, offset: ("write", offset, bytes(data)[:told])),
        "posix_fallocate": call_write("posix_fallocate", lambda told, offset, size: ("grow", offset + size)),
        "ftruncate": call_write("ftruncate", lambda told, size: ("cut", size)),
        "fsync": call_sync("fsync"),
        "fdatasync": call_sync("fdatasync"),
        "rename": call_rename,
        "mkdir": call_mkdir,
        "unlink": call_remove("unlink"),
        "rmdir": call_remove("rmdir"),
    }
    with ExitStack() as stack:
        for name, call in calls.items():
            stack.enter_context(patch.object(os, name, call))
        yield disk
