"""Exclusive locks: flock, or where the file system has none, a lock file that names its holder.

Lustre and some network disks refuse flock, depending on how they are mounted. There `filelock.SoftFileLock` creates a
file beside the locked one, which exactly one process can do. A crashed holder leaves its file behind: on the same
machine the next process sees that the holder is gone; on another one the error says which file to remove.
"""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from gradstore.errors import LockedError

SUFFIX = ".held"
"""What the name of a lock file without flock ends in."""
PATIENCE = 60.0
"""Seconds to wait for another process where flock, which waits as long as the other lives, is missing."""
_MISSING = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


def is_missing(error: OSError) -> bool:
    """Whether flock failed because the file system has none."""
    return error.errno in _MISSING


def lock(descriptor: int, path: Path, *, wait: bool) -> Callable[[], None]:
    """Lock an open file or folder; returns a function that unlocks and closes it.

    wait: wait for another holder. BlockingIOError if flock shows another holder and `wait` is False; LockedError, which
    names the holder, for one that a lock file shows. The descriptor is closed if this raises.
    """
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if not is_missing(error):
                raise
            unlock = _soft_lock(path, PATIENCE if wait else 0.0)
        else:
            unlock = _nothing
            if not wait and held_file(path).exists():  # by a machine whose mount lacks flock
                raise LockedError(_told(path))
    except BaseException:
        os.close(descriptor)
        raise

    def release() -> None:
        try:
            unlock()
        finally:
            os.close(descriptor)

    return release


def held_file(path: Path) -> Path:
    """The lock file of a file (beside it) or a folder (in it) where flock is missing."""
    return path / f"LOCK{SUFFIX}" if path.is_dir() else path.with_name(path.name + SUFFIX)


def _soft_lock(path: Path, patience: float) -> Callable[[], None]:
    from filelock import SoftFileLock, Timeout

    # Not bound to a thread: a writer may be closed, or collected, by another one.
    soft = SoftFileLock(held_file(path), timeout=patience, thread_local=False)
    try:
        soft.acquire(poll_interval=0.02)
    except Timeout:
        raise LockedError(_told(path)) from None
    return soft.release


def _told(path: Path) -> str:
    """Error message that names the holder of a lock file."""
    held = held_file(path)
    try:
        descriptor = os.open(held, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            pid, host = os.read(descriptor, 200).decode(errors="replace").split("\n")[:2]
        finally:
            os.close(descriptor)
        holder = f"process {int(pid)} on {host.strip()[:80]!r}"
    except (OSError, ValueError):
        holder = "another process"
    return f"{held}: {holder} holds this lock; wait until it has finished, or, if it no longer runs, remove the file"


def _nothing() -> None:
    return None
