"""Every error a caller can meet, with the exit status the command line gives it.

A `GradstoreError` says in one line what was wrong, where (file, row, id, field), what was expected and what to
do. `exit_status` 1 means that the work failed, 2 that the request was wrong; in both cases the store is as it was.
"""


class GradstoreError(Exception):
    """The work failed."""

    exit_status = 1


class RequestError(GradstoreError, ValueError):
    """The request was wrong: bad input, an unknown id, a setting that cannot be."""

    exit_status = 2


class NotAStoreError(RequestError):
    """The path holds no gradstore store, or one of a format this version cannot read."""


class FingerprintError(RequestError):
    """Rows made another way than the store's were offered; names every field that differs with both values."""

    def __init__(self, stored: dict, offered: dict, where: str) -> None:
        differing = [
            f"{name}: the store has {_at(stored, name)!r}, this run has {_at(offered, name)!r}"
            for name in sorted(_leaves(stored).keys() | _leaves(offered).keys())
            if _at(stored, name) != _at(offered, name)
        ]
        super().__init__(
            f"{where}: fingerprint differs: {'; '.join(differing)}. Use those settings, or another store."
        )


class LockedError(GradstoreError):
    """Another process is writing to the collection."""


class DamagedError(GradstoreError):
    """Stored bytes are not those that were written."""


def _leaves(tree: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(_leaves(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def _at(tree: dict, name: str) -> object:
    return _leaves(tree).get(name, "nothing")
