"""Names of columns: a misspelled optional one would be read as nothing, without a word."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from gradstore.errors import RequestError

_SIMILAR = 0.84
"""difflib's ratio of "tag" and "tags" is 0.86, that of "problem" and "prompt" 0.62."""


def check_spelling(row: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """RequestError for a field that looks like a known one, misspelled, which the row lacks."""
    for name in row.keys() - set(known):
        near = _near(name, known)
        if near is not None and row.get(near) is None and row[name] is not None:
            raise RequestError(
                f"{where}: field {name!r} is not known; did you mean {near!r}? Rename it, or leave it out"
            )


def check_columns(names: Iterable[str], known: tuple[str, ...], where: str) -> list[str]:
    """The names that are not known; RequestError for one that looks like a known one, misspelled."""
    row = dict.fromkeys(names, True)
    check_spelling(row, known, where)
    return [name for name in row if name not in known]


@lru_cache(maxsize=4096)
def _near(name: str, known: tuple[str, ...]) -> str | None:
    return next(iter(get_close_matches(str(name).lower().strip(), known, 1, _SIMILAR)), None)
