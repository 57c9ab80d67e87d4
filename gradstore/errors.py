"""Every error a caller can meet, with the exit status the command line gives it.

A `GradstoreError` says in one line what was wrong, where (file, row, id, field), what was expected and what to
do. `exit_status` 1 means that the work failed, 2 that the request was wrong; in both cases the store is as it was.
The checks below the classes raise a RequestError for the faults that occur everywhere.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Real

LONGEST_LINE = 2000
"""Most characters of an error's line."""


class GradstoreError(Exception):
    """The work failed. A line of more than LONGEST_LINE characters, as hostile names make it, loses its middle."""

    exit_status = 1

    def __init__(self, line: object = "") -> None:
        text = str(line)
        if len(text) > LONGEST_LINE:
            text = f"{text[: LONGEST_LINE * 2 // 3]} [...] {text[-LONGEST_LINE // 4 :]}"
        super().__init__(text)


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
        found = "; ".join(differences(stored, offered, "the store", "this run"))
        return cls(f"{where}: fingerprint differs: {found}. Use the store's settings, or another store")


class LockedError(GradstoreError):
    """Another process is writing to the collection."""


class DamagedError(GradstoreError):
    """Stored bytes are not those that were written."""


def check_known(what: str, value: object, known: Iterable[str]) -> None:
    """RequestError, with the nearest known name, unless the value is one of the known names."""
    names = list(known)
    if value not in names:
        raise RequestError(f"{what} {value!r} is not one of {', '.join(names)}{near_miss(str(value), names)}")


def near_miss(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'NAME'?` with the nearest known name; empty if none is near."""
    from difflib import get_close_matches

    near = get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_number(
    what: str,
    value: float,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """RequestError that names the bounds, unless the value is finite and within them."""
    if not isinstance(value, Real):
        raise RequestError(f"{what} is {value!r}, expected a number")
    if math.isfinite(value) and least <= value <= most and above < value < below:
        return
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    named = [f"{words} {bound:g}" for words, bound in bounds.items() if math.isfinite(bound)]
    kind = "" if math.isfinite(value) else "a finite number, "
    raise RequestError(f"{what} is {value}, expected {kind}{' and '.join(named)}")


@contextmanager
def needing(what: str, distribution: str) -> Iterator[None]:
    """Convert a failed import of the block to a RequestError that says what to install for `what`."""
    try:
        yield
    except ImportError as error:
        raise RequestError(f"{what} needs {error.name}: pip install '{distribution}'") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters; the error's type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def differences(stored: dict, offered: dict, one_name: str, other_name: str) -> list[str]:
    """Each field that differs, "NAME: ONE has 1, OTHER has 2"; of a list the first entry that does."""
    found = []
    ours, theirs = leaves(stored), leaves(offered)
    for name in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(name, "nothing"), theirs.get(name, "nothing")
        if one == other:
            continue
        if isinstance(one, list) and isinstance(other, list):
            name, one, other = _first_difference(name, one, other)
        found.append(f"{name}: {one_name} has {one!r}, {other_name} has {other!r}")
    return found


def listed(lines: list[str], most: int = 3, longest: int = 160) -> str:
    """The first lines, each cut where it is long, and how many more there are."""
    shown = [line if len(line) <= longest else f"{line[:longest]}…" for line in lines[:most]]
    return "; ".join([*shown, *([f"and {len(lines) - most} more"] if len(lines) > most else [])])


def _first_difference(name: str, one: list, other: list) -> tuple[str, object, object]:
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return f"{name}[{i}]", a, b
    return f"length of {name}", len(one), len(other)


def leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    """Every field of nested dicts by its path."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
