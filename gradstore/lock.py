"""Locks of writers and readers: advisory file locks that the kernel releases when the process dies.

`WriterLock` allows one writer per collection. Its file also names the writer, from opening until it has cleaned up. So
content in an unlocked file shows that a writer was interrupted. A `Lease` prevents the removal of a generation of files
while a reader maps them.
"""

import datetime
import fcntl
import json
import os
import socket
import sys
import weakref
from pathlib import Path

from gradstore.durable import fsync_folder, write_all, writing
from gradstore.errors import DamagedError, LockedError
from gradstore.inside import open_inside
from gradstore.layout import IN_USE, LOCK, store_of
from gradstore.schema import Checker, record, text, whole

_HOLDER = Checker(record({"pid": whole(1, 2**31 - 1), "host": text(), "started": text(), "program": text()}))
_HOLDER_BYTES = 1 << 16


class WriterLock:
    """Exclusive lock for writing to one collection, held until `release`; LockedError names another holder.

    `interrupted`: the text left by an earlier writer that died; empty if it closed properly.
    """

    def __init__(self, collection: Path) -> None:
        self._path = collection / LOCK
        with writing(self._path):
            created = not self._path.exists()
            descriptor = open_inside(self._path, store_of(collection), os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                holder = describe_holder(read_holder(collection)) or "another process"
                raise LockedError(
                    f"{collection}: {holder} is writing to it; wait until it has finished, or stop it"
                ) from None
            except OSError:
                os.close(descriptor)
                raise
            self._release = weakref.finalize(self, os.close, descriptor)
            self._descriptor = descriptor
            self.interrupted = read_holder(collection)
            try:
                if created:
                    fsync_folder(collection)
                self._write(_this_process())
            except OSError:
                self._release()
                raise

    def release(self, *, clean: bool) -> None:
        """Release the lock. `clean`: this writer left nothing beyond the published rows."""
        if not self._release.alive:
            return
        try:
            if clean:
                with writing(self._path):
                    self._write(b"")
        finally:
            self._release()

    def _write(self, content: bytes) -> None:
        # The file is never empty in between: an empty file means that the last writer has cleaned up.
        write_all(self._descriptor, content, 0)
        os.ftruncate(self._descriptor, len(content))
        os.fsync(self._descriptor)


def read_holder(collection: Path) -> str:
    """Text of the lock file: names a running or interrupted writer; empty if the last one closed properly."""
    try:
        descriptor = open_inside(collection / LOCK, store_of(collection))
    except OSError:
        return ""
    with os.fdopen(descriptor, "rb") as file:
        return file.read(_HOLDER_BYTES).decode(errors="replace")


def is_running(content: str) -> bool:
    """Whether the process that a lock file names still runs, as far as this host can tell.

    The lock itself is not probed: taking it even for a moment could refuse a writer that is starting.
    """
    try:
        holder = _HOLDER.parse(content, LOCK)
        if holder["host"] != socket.gethostname():
            return False
        os.kill(holder["pid"], 0)
    except PermissionError:
        return True
    except (DamagedError, OSError):
        return False
    return True


def describe_holder(content: str) -> str:
    """Describe the lock file's content in words; empty for an empty file."""
    if not content:
        return ""
    try:
        holder = _HOLDER.parse(content, LOCK)
        return f"process {holder['pid']} on {holder['host']} ({holder['program']}, since {holder['started']})"
    except DamagedError:
        return "a process that did not get to name itself"


def _this_process() -> bytes:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "program": Path(sys.argv[0] or sys.executable).name if sys.argv else "python",
    }
    return (json.dumps(holder) + "\n").encode()


class Lease:
    """A reader's shared lock on a generation; it ends when the object is closed or garbage-collected."""

    def __init__(self, descriptor: int | None) -> None:
        self.close = weakref.finalize(self, os.close, descriptor) if descriptor is not None else lambda: None


def take_lease(generation: Path) -> Lease | None:
    """Take a lease on a generation's files; None if they are being removed or no longer exist."""
    path = generation / IN_USE
    try:
        descriptor = open_inside(path, store_of(generation.parent))
    except FileNotFoundError:
        return None
    except OSError:
        return Lease(None)  # Not readable, e.g. on read-only media: those cannot be compacted either.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return Lease(descriptor)
    except BlockingIOError:
        pass
    except OSError:
        return Lease(descriptor)  # No locks on this file system.
    os.close(descriptor)
    return None


def claim_for_removal(generation: Path) -> int | None:
    """Lock a generation exclusively, for removal; returns an open descriptor, or None if a reader uses it."""
    descriptor = open_inside(generation / IN_USE, store_of(generation.parent), os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
