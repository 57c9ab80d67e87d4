"""Undo the creation of a folder if what was to fill it fails: a failed command leaves no half of a store."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def undone_on(errors: type[BaseException], path: Path, keep: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Remove what the block creates at `path`, and new folders above it, if it raises one of these errors.

    A folder that is there already is kept as it is, unless it is empty: then it is empty again. keep: called after an
    error; True keeps what was made.
    """
    above = [folder for folder in path.absolute().parents if not folder.exists()]
    was_folder = path.is_dir()
    was_there = path.exists() and not (was_folder and not any(path.iterdir()))
    try:
        yield
    except errors:
        if not was_there and path.is_dir() and not keep():
            shutil.rmtree(path, ignore_errors=True)
            if was_folder:
                path.mkdir(exist_ok=True)
            for folder in above:
                if not any(folder.iterdir()):
                    folder.rmdir()
        raise
