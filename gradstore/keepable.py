"""Parse the JSON of a record, and check that it can be stored as such in UTF-8; an error names the invalid part.

Half a surrogate pair appears where a tool cut text between two UTF-16 units. JSON can spell it, but files and
tokenizers cannot encode it. Bytes and dates come from columns such as images.
"""

import json
from collections.abc import Mapping
from typing import Any

from gradstore.errors import RequestError, first_line


def parsed_line(line: bytes, where: str) -> Any:
    """The value of a line of a JSON Lines file; RequestError, beginning with `where`, if it is not JSON in UTF-8."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RequestError(f"{where}: not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else "; the file ends here, so the line may have been cut off"
        raise RequestError(f"{where}: not valid JSON: {error.msg} at character {error.pos}{cut}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or an integer with too many digits
        raise RequestError(f"{where}: not usable JSON: {first_line(error)}") from None


def parsed_field(value: Any, where: str, field: str, expected: str = "an object") -> Any:
    """A field's value, parsed if it is text: Parquet files keep free-form values as JSON. RequestError if it is not."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RequestError(f"{where}: field {field!r} is text that is not JSON, expected {expected}") from None


def check_keepable(value: Any, where: str, path: str = "") -> None:
    """Raise RequestError if JSON or UTF-8 cannot hold a part of the value; names `where` and the part's path.

    The path begins with `path`. If that is empty, the value is a whole record and paths begin with its field names.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{where}: {fault(value, path) or f'field {path!r} cannot be kept as JSON: {error}'}"
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
    if value is None or isinstance(value, bool | int | float):
        return None
    return f"field {path!r} is {_kind(value)}, which a problem cannot hold: leave its column out, or give it as text"


def _kind(value: Any) -> str:
    return "bytes" if isinstance(value, bytes) else f"a value of type {type(value).__name__}"
