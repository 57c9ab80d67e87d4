"""File operations that survive a crash, and the one place where an OSError becomes a sentence.

A file is durable when its bytes and the folder entry that names it are both on the disk: `replace_file` does
the four steps (write a temporary file, fsync, rename, fsync of the folder) that make a reader see either the
old content or the new, never a mixture.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, BinaryIO

import google_crc32c

from gradstore.errors import DamagedError, GradstoreError, RequestError

TEMPORARY = ".tmp-"
"""Prefix of files that were being written; the next writer removes what a crash left."""

PAGE = 4096
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into one line that names the file and what to do."""
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else path
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _FULL:
            advice = "nothing already stored is lost; free some space and run it again"
            raise GradstoreError(f"{where}: the disk is full ({reason}): {advice}") from error
        if error.errno in _REFUSED:
            advice = "choose a place that can be written to, or only read the store"
            raise RequestError(f"{where}: cannot be written ({reason}): {advice}") from error
        raise GradstoreError(f"{where}: writing failed ({reason}): nothing already stored is lost") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into one line: a stored file that is missing is damage."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(f"{path}: the file is missing; `gradstore verify` lists all damage") from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise GradstoreError(f"{path}: cannot be read ({reason})") from error


def at_once(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Do something that waits for the disk for several files together: their fsyncs then share its commits.

    The first exception is raised when all are done.
    """
    items = list(items)
    if len(items) < 2:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(min(len(items), 16)) as pool:
        list(pool.map(work, items))


Done = tuple[int, BaseException | None]
"""A descriptor that was synced, or why it was not."""
_SYNCS_AT_ONCE = 10


@contextmanager
def syncing_beside(path_of: Mapping[int, Path]) -> Iterator[None]:
    """Open files go to the disk while the block runs, each in a thread of its own, and are there when it ends.

    path_of: descriptor -> the file's path, for what goes wrong. After an error of the block none is still under way.
    """
    done: SimpleQueue[Done] = SimpleQueue()
    jobs = _syncers(os.getpid())
    for descriptor in path_of:
        jobs.put((descriptor, done))
    try:
        yield
    finally:
        finished = [done.get() for _ in path_of]
    for descriptor, error in finished:
        if error is not None:
            with writing(path_of[descriptor]):
                raise error


@cache
def _syncers(_process: int) -> "SimpleQueue[tuple[int, SimpleQueue[Done]]]":
    """What threads kept for this take files from: they begin in half the time an executor's do, which is a tenth of a
    small publication. A forked process has none of its parent's."""
    jobs: SimpleQueue[tuple[int, SimpleQueue[Done]]] = SimpleQueue()

    def work() -> None:
        while True:
            descriptor, done = jobs.get()
            try:
                os.fdatasync(descriptor)
            except BaseException as error:  # noqa: BLE001 (whoever waits raises it)
                done.put((descriptor, error))
            else:
                done.put((descriptor, None))

    for _ in range(_SYNCS_AT_ONCE):
        Thread(target=work, name="sync", daemon=True).start()
    return jobs


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: Any, offset: int) -> None:
    """pwrite every byte of a buffer, however many calls that takes."""
    view = memoryview(data).cast("B")
    while view.nbytes:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written


def write_past_cache(path: Path, data: Any, offset: int) -> None:
    """Write to an existing file without a copy in memory: whole pages, from memory that begins at one.

    OSError EINVAL where a file system cannot do that or a disk asks for more.
    """
    descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_DIRECT", 0))
    try:
        write_all(descriptor, data, offset)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes, beside: AbstractContextManager[None] | None = None) -> None:
    """Give a file new content so that a crash at any moment leaves the old content or the new.

    beside: entered when the new content is written and left when it is on the disk, before it shows: what else must be
    there goes to the disk meanwhile. If it raises, the old content stays.
    """
    with replacing_file(path, beside) as file:
        write_all(file.fileno(), data, 0)


@contextmanager
def replacing_file(path: Path, beside: AbstractContextManager[None] | None = None) -> Iterator[BinaryIO]:
    """A file to write the new content to, which shows when the block ends; after an error of it the old one stays."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with writing(path):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                yield file
            with beside or nullcontext():
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
        fsync_folder(path.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write a file at that a person named; it becomes `path` when the block ends, whole and durable.

    When the block raises, `path` is as it was and nothing is left beside it. What is no ordinary file, such as
    /dev/stdout, is written in place. An OSError becomes one line with the path; RequestError where its folder is not
    there.
    """
    if not path.parent.is_dir():
        raise RequestError(f"{path}: the folder {path.parent} does not exist")
    if path.exists() and not path.is_file():
        if path.is_dir():
            raise RequestError(f"{path}: is a folder, expected the name of a file")
        with writing(path):
            yield path
        return
    final = path.resolve()
    # the suffix stays: some writers tell the format by it
    unfinished = final.with_name(f"{TEMPORARY}{os.getpid()}-{final.name}")
    try:
        with writing(path):
            try:
                yield unfinished
                descriptor = os.open(unfinished, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                os.rename(unfinished, final)
                fsync_folder(final.parent)
            except OSError as error:
                error.filename = str(path)  # not the temporary name, which is gone when this is read
                raise
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process is in the block of this folder meanwhile; the kernel lets go of the lock of one that dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write files into that becomes `folder` when the block ends, whole and durable.

    When the block raises, or the process dies in it, `folder` is not there; what is left is removed by the next call.
    Only one process may be in the block. RequestError where `folder` is there already.
    """
    if folder.exists():
        raise RequestError(f"{folder}: is there already; choose another folder or remove it")
    unfinished = folder.with_name(f"{TEMPORARY}{folder.name}")
    with writing(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in unfinished.rglob("*"):
            if path.is_dir():
                fsync_folder(path)
            else:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        fsync_folder(unfinished)
        unfinished.rename(folder)
        fsync_folder(folder.parent)


def write_text_file(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all (see `whole_file`)."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Create a folder that may exist already, durably."""
    with writing(folder):
        if not folder.is_dir():
            folder.mkdir()
            fsync_folder(folder.parent)


def preallocate(descriptor: int, size: int) -> None:
    """Give a file its final size with its blocks reserved, so that a full disk shows here and not mid-row."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        unsupported = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
        if isinstance(error, OSError) and error.errno not in unsupported:
            raise
        end = os.fstat(descriptor).st_size
        write_all(descriptor, bytes(size - end), end)


def crc32c(data: Any, start: int = 0) -> int:
    """CRC-32C of a contiguous read-only buffer or numpy array, continuing from `start`."""
    return int(google_crc32c.extend(start, data))


def canonical_json(value: object) -> bytes:
    """The one serialisation of a JSON value that checksums are taken over: sorted names, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
