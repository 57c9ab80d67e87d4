"""Import a reward function of the user's: `module:function` or `file.py:function`."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradstore.errors import RequestError
from gradstore.trainer.sampling.secrecy import without_credentials


def imported(spec: str) -> Callable[..., Any]:
    """The function that a text names. RequestError if it cannot be imported."""
    module, _, function = spec.partition(":")
    shown = without_credentials(spec)  # it may be a judge whose name is misspelt
    try:
        if module.endswith(".py"):
            loaded = _from_file(Path(module))
        else:
            # as `python -m` does: make modules of the current folder importable, whatever command runs this
            sys.path.insert(0, os.getcwd())
            try:
                loaded = importlib.import_module(module)
            finally:
                sys.path.remove(os.getcwd())
    except Exception as error:
        raise RequestError(f"reward {shown!r}: cannot import {module}: {type(error).__name__}: {error}") from error
    found = getattr(loaded, function, None)
    if not callable(found):
        raise RequestError(f"reward {shown!r}: {module} has no function {function!r}")
    return found


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file {path}")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise ImportError(f"{path} is not Python source")
    loaded = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(loaded)
    return loaded
