"""File operations that survive a crash, and the conversion of an OSError to a one-line error message.

A file is durable when its bytes and its folder entry are both on disk. `replace_file` does this in four steps: write a
temporary file, fsync, rename, fsync of the folder. A reader sees either the old content or the new, never a mixture.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, BinaryIO

import google_crc32c

from gradstore.errors import DamagedError, GradstoreError, RequestError
from gradstore.exclusive import lock

TEMPORARY = ".tmp-"
"""Prefix of unfinished files; after a crash the next writer removes them."""

PAGE = 4096
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert an OSError of the block to a one-line error that names the file and says what to do."""
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
    """Convert an OSError of the block to a one-line error; a missing stored file is a DamagedError."""
    try:
        yield
    except FileNotFoundError as error:
        # Without flock a reader cannot hold files (lock.py), and a compaction removes whole folders.
        hint = "" if path.parent.exists() else "; if the collection was compacted meanwhile, open the store again"
        raise DamagedError(f"{path}: the file is missing{hint}; `gradstore verify` lists all damage") from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise GradstoreError(f"{path}: cannot be read ({reason})") from error


def at_once(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Run disk-bound work for several items in threads, so that their fsyncs share the file system's commits.

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
"""(descriptor, None) after a sync, or (descriptor, error)."""
_SYNCS_AT_ONCE = 10


@contextmanager
def syncing_beside(path_of: Mapping[int, Path]) -> Iterator[None]:
    """Context manager: syncs open files to disk in background threads while the block runs; waits for them at the end.

    path_of: descriptor -> the file's path, for error messages. It also waits for all syncs if the block raises.
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
    """Job queue of the sync threads of this process; a forked process starts its own threads.

    They start a job in half the time of an executor's threads, which saves a tenth of a small publication.
    """
    jobs: SimpleQueue[tuple[int, SimpleQueue[Done]]] = SimpleQueue()

    def work() -> None:
        while True:
            descriptor, done = jobs.get()
            try:
                os.fdatasync(descriptor)
            except BaseException as error:  # noqa: BLE001 (the waiting thread raises it)
                done.put((descriptor, error))
            else:
                done.put((descriptor, None))

    for _ in range(_SYNCS_AT_ONCE):
        Thread(target=work, name="sync", daemon=True).start()
    return jobs


def fsync_folder(folder: Path) -> None:
    """fsync a folder: makes its file names durable."""
    _fsync(folder, os.O_DIRECTORY)


def _fsync(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: Any, offset: int) -> None:
    """Write every byte of a buffer at the offset, with as many pwrite calls as needed."""
    view = memoryview(data).cast("B")
    while view.nbytes:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written


def write_past_cache(path: Path, data: Any, offset: int) -> None:
    """Write to an existing file with direct I/O, past the page cache: whole pages, from page-aligned memory.

    OSError EINVAL if the file system does not support it or the disk needs a larger alignment.
    """
    descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_DIRECT", 0))
    try:
        write_all(descriptor, data, offset)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes, beside: AbstractContextManager[None] | None = None) -> None:
    """Replace a file's content atomically: after a crash at any moment it has the old content or the new.

    beside: context manager around the fsync of the new content, for other syncs that must finish before the rename. If
    it raises, the old content stays.
    """
    with replacing_file(path, beside) as file:
        write_all(file.fileno(), data, 0)


@contextmanager
def replacing_file(path: Path, beside: AbstractContextManager[None] | None = None) -> Iterator[BinaryIO]:
    """Context manager: yields a file for the new content, renamed into place at the end; not if the block raises."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with writing(path):
        descriptor = _new_file(temporary)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                yield file
            with beside or nullcontext():
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
        fsync_folder(path.parent)


def _new_file(path: Path) -> int:
    """Descriptor of a new file, in place of what an interrupted writer left, or of a link that somebody put there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except FileExistsError:
        os.unlink(path)
        return os.open(path, flags, 0o666)


def check_parent(path: Path) -> None:
    """RequestError if the folder of a file does not exist or may not be written to. Folders that a command fills are
    made, these are not."""
    if not path.parent.is_dir():
        raise RequestError(f"{path}: the folder {path.parent} does not exist")
    if path.is_file() or not path.exists():  # a device is written in place
        check_writable(path.parent)


def check_writable(folder: Path) -> None:
    """RequestError if this user may not write into the folder, or into the one in which it would be made."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not os.access(there, os.W_OK):
        raise RequestError(f"{there}: cannot be written to (no permission): choose another place")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Context manager to write a user's output file: yields a temporary path, renamed to `path`, durably, at the end.

    If the block raises, `path` is unchanged and the temporary file is removed. A path that is not an ordinary file,
    such as /dev/stdout, is written in place. An OSError becomes one line with the path. RequestError if its folder does
    not exist.
    """
    check_parent(path)
    if path.exists() and not path.is_file():
        if path.is_dir():
            raise RequestError(f"{path}: is a folder, expected the name of a file")
        with writing(path):
            yield path
        return
    final = path.resolve()
    # Keep the suffix: some writers choose the format by it.
    unfinished = final.with_name(f"{TEMPORARY}{os.getpid()}-{final.name}")
    try:
        with writing(path):
            unfinished.unlink(missing_ok=True)  # A link there would be written through.
            try:
                yield unfinished
                _fsync(unfinished)
                os.rename(unfinished, final)
                fsync_folder(final.parent)
            except OSError as error:
                error.filename = str(path)  # Not the temporary name: that file no longer exists.
                raise
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Exclusive lock on a folder, across processes; it ends if the process dies."""
    release = lock(os.open(folder, os.O_RDONLY), folder, wait=True)
    try:
        yield
    finally:
        release()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Context manager to write a folder: yields a temporary folder, renamed to `folder`, durably, at the end.

    If the block raises or the process dies, `folder` does not exist; the next call removes the temporary folder.
    Only one process may be in the block. RequestError if `folder` already exists.
    """
    if folder.exists():
        raise RequestError(f"{folder}: is there already; choose another folder or remove it")
    unfinished = folder.with_name(f"{TEMPORARY}{folder.name}")
    with writing(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in unfinished.rglob("*"):
            _fsync(path)
        fsync_folder(unfinished)
        unfinished.rename(folder)
        fsync_folder(folder.parent)


def write_text_file(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically (see `whole_file`)."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Create a folder durably, unless it exists."""
    with writing(folder):
        if not folder.is_dir():
            folder.mkdir()
            fsync_folder(folder.parent)


def folder_bytes(folder: Path, *, on_disk: bool = False) -> int:
    """Bytes of all files in a folder and its subfolders; follows no links.

    on_disk: without the parts of preallocated files that hold nothing yet.
    """
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found = os.lstat(os.path.join(place, name))
                total += min(found.st_size, 512 * found.st_blocks) if on_disk else found.st_size
    return total


def preallocate(descriptor: int, size: int) -> None:
    """Reserve the first `size` bytes of a file on disk, so that a full disk raises here and not within a row."""
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
    """Canonical JSON, the input of all checksums of JSON values: sorted names, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
