"""Parse the JSON of a record, and check that it can be stored as such in UTF-8; an error names the invalid part.

Half a surrogate pair appears where a tool cut text between two UTF-16 units. JSON can spell it, but files and
tokenizers cannot encode it. Bytes and dates come from columns such as images.
"""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from gradstore.errors import RequestError, first_line

MAX_ROW_BYTES = 32 << 20
"""Longest line of a JSON Lines file, and longest file that is one JSON object."""
MAX_ROW_PARTS = 1_000_000
"""Most opening brackets in one row: an empty list takes two bytes in a file and sixty in memory."""
MAX_DEPTH = 100
"""Most levels of lists and objects inside each other: code that walks a value calls itself once per level."""


def parsed_line(line: bytes, where: str) -> Any:
    """The value of a line of a JSON Lines file; RequestError, beginning with `where`, if it is not JSON in UTF-8."""
    if len(line) > MAX_ROW_BYTES:
        raise RequestError(f"{where}: longer than {MAX_ROW_BYTES >> 20} MiB, which no row is; is this the right file?")
    try:
        return parsed(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RequestError(f"{where}: not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else "; the file ends here, so the line may have been cut off"
        raise RequestError(f"{where}: not valid JSON: {error.msg} at character {error.pos}{cut}") from None
    except (
        RecursionError,
        ValueError,
    ) as error:  # too deep, too many parts, a key twice, an integer of too many digits
        raise RequestError(f"{where}: not usable JSON: {first_line(error)}") from None


def parsed(text: str) -> Any:
    """The value of a JSON text. ValueError for what `json.loads` refuses, a key that occurs twice, and deep nesting."""
    parts = n_parts(text)
    if parts > MAX_ROW_PARTS:
        raise ValueError(f"more than {MAX_ROW_PARTS:,} lists and objects")
    value = decoder.decode(text)
    check_depth(value, parts)
    return value


def n_parts(text: str, start: int = 0, stop: int | None = None) -> int:
    """Opening brackets in a text: no fewer than its lists and objects."""
    return text.count("[", start, stop) + text.count("{", start, stop)


def check_depth(value: Any, parts: int) -> None:
    """ValueError for a value nested more than MAX_DEPTH levels deep. parts: `n_parts` of its text."""
    if parts > MAX_DEPTH and _deeper(value, MAX_DEPTH):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def _deeper(value: Any, levels: int) -> bool:
    """Whether a list or an object has more levels."""
    inside: Collection[Any]
    if value.__class__ is dict:
        inside = value.values()
    elif value.__class__ is list:
        inside = value
        try:
            sum(value)
            return levels < 1  # Numbers alone, such as token ids: a sum is ten times faster than a look at each.
        except (TypeError, OverflowError):
            pass
    else:
        return False
    return levels < 1 or any(_deeper(part, levels - 1) for part in inside if part.__class__ in (dict, list))


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in values if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} occurs twice in one object")
    return values


decoder = json.JSONDecoder(object_pairs_hook=_each_key_once)
"""Parser of all JSON that others wrote: `json.loads` silently keeps the last of two equal keys."""


def parsed_field(value: Any, where: str, field: str, expected: str = "an object") -> Any:
    """A field's value, parsed if it is text: Parquet files keep free-form values as JSON. RequestError if it is not."""
    if not isinstance(value, str):
        return value
    try:
        return parsed(value)
    except json.JSONDecodeError:
        raise RequestError(f"{where}: field {field!r} is text that is not JSON, expected {expected}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: field {field!r} is not usable JSON: {first_line(error)}") from None


def check_keepable(value: Any, where: str, path: str = "") -> None:
    """Raise RequestError if JSON or UTF-8 cannot hold a part of the value; names `where` and the part's path.

    The path begins with `path`. If that is empty, the value is a whole record and paths begin with its field names.
    """
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        try:
            found = fault(value, path)
        except RecursionError:
            found = None
        raise RequestError(
            f"{where}: {found or f'field {path!r} cannot be kept as JSON: {first_line(error)}'}"
        ) from None


def half_pair(text: str) -> int | None:
    """Index of the first half surrogate pair in the text; None if the text can be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def fault(value: Any, path: str = "") -> str | None:
    """Describe the first part of a value that cannot be stored, with its path, e.g. images[0].bytes; None if valid."""
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
    if isinstance(value, float) and not math.isfinite(value):
        return f"field {path!r} is {value}, which JSON cannot hold: give a number or null"
    if value is None or isinstance(value, bool | int | float):
        return None
    return f"field {path!r} is {_kind(value)}, which a problem cannot hold: leave its column out, or give it as text"


def _kind(value: Any) -> str:
    return "bytes" if isinstance(value, bytes) else f"a value of type {type(value).__name__}"
