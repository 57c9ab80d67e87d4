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

    @classmethod
    def between(cls, stored: dict, offered: dict, where: str) -> "FingerprintError":
        """The error for two fingerprints; `where` names the store or the sketcher."""
        differences = "; ".join(_differences(stored, offered))
        return cls(f"{where}: fingerprint differs: {differences}. Use the store's settings, or another store")


class LockedError(GradstoreError):
    """Another process is writing to the collection."""


class DamagedError(GradstoreError):
    """Stored bytes are not those that were written."""


def _differences(stored: dict, offered: dict) -> list[str]:
    """Each field that differs with both values; of a list the first entry that does."""
    found = []
    ours, theirs = _leaves(stored), _leaves(offered)
    for name in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(name, "nothing"), theirs.get(name, "nothing")
        if one == other:
            continue
        if isinstance(one, list) and isinstance(other, list):
            name, one, other = _first_difference(name, one, other)
        found.append(f"{name}: the store has {one!r}, this run has {other!r}")
    return found


def _first_difference(name: str, one: list, other: list) -> tuple[str, object, object]:
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return f"{name}[{i}]", a, b
    return f"length of {name}", len(one), len(other)


def _leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    """Every field of nested dicts by its path."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
