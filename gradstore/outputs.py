"""Where a command may write: never into a store's own folder, never over a file that it reads, and over another file
only where that was asked for. `whole_file` of durable.py then replaces it in one step."""

from collections.abc import Iterable
from pathlib import Path

from gradstore.durable import check_writable
from gradstore.errors import RequestError
from gradstore.layout import ZARR

_MARK = b'"gradstore"'
_ROOT_BYTES = 16 << 20
_OF_FILES = (".jsonl", ".json", ".parquet", ".csv")


def check_output(path: Path | None, inputs: Iterable[Path | str | None] = ()) -> None:
    """RequestError for a path inside the folder of a store, links followed, and for one of the input files."""
    if path is None:
        return
    place = path.resolve()
    for folder in (place, *place.parents):
        if folder != place and is_store(folder):
            raise RequestError(f"{path}: lies in the store {folder}, whose files are its own; choose another place")
    for given in inputs:
        if given is not None and place.exists() and Path(given).exists() and place.samefile(given):
            raise RequestError(f"{path}: is also an input; choose another path to write to")


def check_free(paths: Iterable[Path], overwrite: bool) -> None:
    """RequestError for an ordinary file that is there already, unless it may be replaced."""
    for path in paths:
        if path.is_file() and not overwrite:
            raise RequestError(f"{path}: already there; choose another path, or replace it with --overwrite")


def check_output_folder(path: Path | None) -> None:
    """As `check_output`, for a folder to write files into: it may not be a store itself or a file either."""
    check_output(path)
    if path is not None:
        check_writable(path)
    if path is not None and path.exists() and not path.is_dir():
        raise RequestError(f"{path}: is a file, expected a folder to write into")
    if path is not None and not path.exists() and path.suffix in _OF_FILES:
        raise RequestError(f"{path}: is the name of a file, expected that of a folder to write into")
    if path is not None and is_store(path.resolve()):
        raise RequestError(f"{path}: is a store, whose files are its own; choose another folder")


def is_store(folder: Path) -> bool:
    """Whether a folder is a store, broken or not."""
    root = folder / ZARR
    try:
        if not root.is_file():
            return False
        with root.open("rb") as file:
            return _MARK in file.read(_ROOT_BYTES)
    except OSError:
        return False
