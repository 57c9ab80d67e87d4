"""Local cache of the codes of remote stores: files of one chunk each, of a bounded total size, shared by processes.

A file is named by what it holds (store, collection, place, size and checksum), so a name never gets other bytes. It is
written under a temporary name and renamed, and its checksum is checked when it is mapped: a damaged one is removed and
fetched again. When the total exceeds the bound, the files not used for the longest time go; a search that has mapped
one keeps its bytes.
"""

import os
from contextlib import suppress
from pathlib import Path
from threading import get_ident

import numpy as np

from gradstore.chunks import map_checked
from gradstore.durable import TEMPORARY, writing
from gradstore.errors import DamagedError, RequestError

FOLDER = "GRADSTORE_CACHE"
"""Environment variable: folder for what is kept of remote stores; default: gradstore in the user's cache folder."""
BYTES = "GRADSTORE_CACHE_BYTES"
"""Environment variable: most bytes of cached codes."""
DEFAULT_BYTES = 20_000_000_000
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def cache_folder() -> Path:
    """The folder for what is kept of remote stores."""
    given = os.environ.get(FOLDER)
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradstore"


def cache_bytes() -> int:
    """The bound that the environment sets; RequestError if it is no number of bytes, such as 500M or 20G."""
    text = os.environ.get(BYTES, str(DEFAULT_BYTES)).strip().removesuffix("B")
    number, unit = (text[:-1], text[-1:]) if text[-1:] in _UNITS else (text, "")
    if not number.isascii() or not number.isdigit():
        raise RequestError(f"{BYTES} is {text!r:.40}, expected a number of bytes such as 500M or 20G")
    return int(number) * _UNITS[unit]


class ChunkCache:
    """A folder of cached chunks."""

    def __init__(self, folder: Path, most_bytes: int | None = None) -> None:
        self.folder = folder
        self.most_bytes = cache_bytes() if most_bytes is None else most_bytes
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, size: int, crc: int) -> np.ndarray | None:
        """The mapped bytes of a file, uint8 [size], read-only; None if it is not there or its bytes changed."""
        path = self.folder / name
        try:
            found = map_checked(path, self.folder, np.dtype(np.uint8), (size,), crc)
        except DamagedError:
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return found

    def put(self, name: str, data: bytes) -> None:
        """Keep bytes under a name; a failure is no error, for the bytes can be fetched again."""
        if len(data) > self.most_bytes:
            return
        unfinished = self.folder / f"{TEMPORARY}{os.getpid()}-{get_ident()}-{name}"
        with suppress(OSError):
            try:
                with unfinished.open("xb") as file:
                    file.write(data)
                unfinished.rename(self.folder / name)
            finally:
                unfinished.unlink(missing_ok=True)
            self._make_room()

    def _make_room(self) -> None:
        """Remove the files that were not used for the longest time, also what killed processes left half written."""
        files = []
        for entry in os.scandir(self.folder):
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                files.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.most_bytes:
                return
            with suppress(OSError):
                os.unlink(path)
            total -= size
