"""Is this the folder of a transformers model? Answered without importing one of the libraries that load it."""

from pathlib import Path

from gradstore.errors import RequestError

HUB_S = 10.0
"""Seconds in which the hub must answer whether it has a model or a data set."""


def is_model_folder(path: str) -> bool:
    """Whether the path is a model's folder; False for what can only be a name on the hub.

    RequestError for a folder that is not there, for one without config.json, and for a file.
    """
    if Path(path).exists():
        if not (Path(path) / "config.json").is_file():
            kind = "no config.json in this folder" if Path(path).is_dir() else "this is a file"
            raise RequestError(f"{path}: {kind}; expected the folder of a transformers model, or its name on the hub")
        return True
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise RequestError(f"{path}: there is no such folder")
    return False
