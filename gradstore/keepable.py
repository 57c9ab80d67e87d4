"""Values that a record may hold: what JSON can write and UTF-8 can encode. What is not is named by its path.

Half a surrogate pair is left where a tool cut text between two UTF-16 units; JSON can spell it, no file and no
tokenizer can take it. Bytes and dates come from columns of pictures and the like.
"""

import json
from collections.abc import Mapping
from typing import Any

from gradstore.errors import RequestError


def check_keepable(value: Any, where: str, path: str = "") -> None:
    """RequestError for a part that JSON or UTF-8 cannot hold: `where`, then the part's path, that begins with `path`.

    With an empty path the value is a whole record, and the names of its fields begin the paths.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{where}: {fault(value, path) or f'field {path!r} cannot be kept as JSON: {error}'}"
        ) from None


def half_pair(text: str) -> int | None:
    """Where the text has half a surrogate pair; None for text that can be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def fault(value: Any, path: str = "") -> str | None:
    """What is wrong with the first part of a value that cannot be kept, by its path, such as images[0].bytes."""
    if isinstance(value, str):
        place = half_pair(value)
        return None if place is None else f"field {path!r} has half a surrogate pair at character {place}"
    if isinstance(value, Mapping):
        for name, part in value.items():
            if not isinstance(name, str | int | float | bool | None):
                return f"field {path!r} has a name that is {_kind(name)}, expected text"
            if isinstance(name, str) and half_pair(name) is not None:
                return f"field {path!r} has a name with half a surrogate pair, {name!r}"
            found = fault(part, f"{path}.{name}" if path else str(name))
            if found:
                return found
        return None
    if isinstance(value, list | tuple):
        return next(filter(None, (fault(part, f"{path}[{j}]") for j, part in enumerate(value))), None)
    if value is None or isinstance(value, bool | int | float):
        return None
    return f"field {path!r} is {_kind(value)}, which a problem cannot hold: leave its column out, or give it as text"


def _kind(value: Any) -> str:
    return "bytes" if isinstance(value, bytes) else f"a value of type {type(value).__name__}"
