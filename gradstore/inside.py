"""Opening and removing files of a store without leaving its folder.

A store may come from elsewhere: downloaded, unpacked, on a shared disk. The path that a user gives may lead through
links. Below it no symbolic link is followed, and only ordinary files are opened: a link could point anywhere, and
opening a pipe would wait for ever. Each step of a path is opened in the folder before it, so that nobody can put a link
there in between. Hard links cannot be told from files.

`root` is always the folder of the store.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from gradstore.durable import crc32c, reading
from gradstore.errors import DamagedError

MOST_BYTES = 1 << 32
"""Largest file that is read whole: an attachment, or a part of probes or rounds."""
_PIECE = 16 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def open_folder(folder: Path, root: Path) -> int:
    """Descriptor of a folder of the store; DamagedError, which names it, for a link on the way."""
    descriptor = os.open(root, _FOLDER)
    try:
        names = folder.relative_to(root).parts
        for place, name in enumerate(names):
            try:
                inner = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
            except OSError as error:
                raise _named(error, root.joinpath(*names[: place + 1])) from None
            os.close(descriptor)
            descriptor = inner
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_in(folder: int, path: Path, flags: int = os.O_RDONLY) -> int:
    """Descriptor of the ordinary file `path` in its folder, which is open; DamagedError for anything else."""
    try:
        # O_NONBLOCK: the open of a pipe would wait for its other end. It means nothing to ordinary files.
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path.name, flags, 0o666, dir_fd=folder)
    except OSError as error:
        raise _named(error, path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedError(f"{path}: is no ordinary file; a store has nothing else")
    return descriptor


def open_inside(path: Path, root: Path, flags: int = os.O_RDONLY) -> int:
    """Descriptor of an ordinary file of the store; DamagedError, which names it, for a link and anything else."""
    folder = open_folder(path.parent, root)
    try:
        return open_in(folder, path, flags)
    finally:
        os.close(folder)


@contextmanager
def file_inside(path: Path, root: Path) -> Iterator[BinaryIO]:
    """Context manager: an ordinary file of the store, open for reading; errors as in `reading`."""
    with reading(path), open(open_inside(path, root), "rb") as file:
        yield file


def read_inside(path: Path, root: Path, most: int = MOST_BYTES, crc: int | None = None) -> bytes:
    """The bytes of an ordinary file of the store; DamagedError for more than `most`.

    crc: checksum to be expected. A large file with another one is refused before memory is taken for it: a file of
    holes has any size and takes no disk.
    """
    with file_inside(path, root) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise DamagedError(f"{path}: damaged: has {size} bytes, expected at most {most}")
        if crc is not None and size > _PIECE:
            found = 0
            while piece := file.read(_PIECE):
                found = crc32c(piece, found)
            if found != crc:
                raise DamagedError(f"{path}: damaged: bytes do not match the checksum in the name ({size} bytes)")
            file.seek(0)
        return file.read()


def names_inside(folder: Path, root: Path) -> list[str]:
    """Names in a folder of the store, sorted; none if there is no such folder. DamagedError for a link on the way."""
    with reading(folder):
        try:
            descriptor = open_folder(folder, root)
        except FileNotFoundError:
            return []
        try:
            return sorted(os.listdir(descriptor))
        finally:
            os.close(descriptor)


def check_folder(folder: Path, root: Path) -> bool:
    """Whether the folder exists; DamagedError, which names it, for a link on the way or a file in its place."""
    with reading(folder):
        try:
            os.close(open_folder(folder, root))
        except FileNotFoundError:
            return False
    return True


def remove_folder(folder: Path, root: Path) -> None:
    """Remove a folder of the store with all it holds; what links in it point to stays."""
    above = open_folder(folder.parent, root)
    try:
        shutil.rmtree(folder.name, dir_fd=above)
    finally:
        os.close(above)


def remove_file(path: Path, root: Path) -> None:
    """Remove a file of the store, if it is there; of a link the link itself. A folder stays."""
    folder = open_folder(path.parent, root)
    try:
        with suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(path.name, dir_fd=folder)
    finally:
        os.close(folder)


def _named(error: OSError, path: Path) -> OSError | DamagedError:
    """The error of an open as one that names the path; DamagedError if a link or no ordinary file is there."""
    with suppress(OSError):
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            return DamagedError(f"{path}: is a symbolic link; links in a store are not followed: copy what it names")
        if error.errno == errno.ENOTDIR:
            return DamagedError(f"{path}: is no folder")
        if error.errno == errno.ENXIO:
            return DamagedError(f"{path}: is no ordinary file; a store has nothing else")
    error.filename = str(path)
    return error
