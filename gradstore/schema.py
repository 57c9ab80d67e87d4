"""Reading JSON that may be damaged or hostile: one mechanism for every text in a store.

`load_json` parses strictly: no name twice in an object, no NaN, no deep nesting. `check` compares the value with a
schema, and `parse` does both. A mistake is a DamagedError of one line: the file, the field, what was expected.

A schema is made of the functions below, of pydantic-core, the validator under pydantic. pydantic itself takes 0.14 s to
import, which every command that opens a store would pay.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_core import SchemaValidator, ValidationError, core_schema, from_json

from gradstore.errors import DamagedError, first_line

Schema = Mapping[str, Any]
"""Description of a value: a result of the functions below."""

LARGEST = 2**63 - 1
ANYTHING = core_schema.any_schema()


def whole(least: int = 0, most: int = LARGEST) -> Any:
    """A whole number within bounds; neither true nor 1.0."""
    return core_schema.int_schema(strict=True, ge=least, le=most)


def number(least: float | None = None, most: float | None = None, *, finite: bool = True) -> Any:
    """A number within bounds. finite: False: NaN and infinity too."""
    return core_schema.float_schema(strict=True, ge=least, le=most, allow_inf_nan=not finite)


def text(pattern: str | None = None) -> Any:
    """A text; pattern: regular expression for all of it."""
    return core_schema.str_schema(strict=True, pattern=None if pattern is None else f"^(?:{pattern})$")


def one_of(*values: object) -> Any:
    """One of these values."""
    return core_schema.literal_schema(list(values))


def lists(item: Any, least: int = 0, most: int | None = None) -> Any:
    """A list of such items."""
    return core_schema.list_schema(item, min_length=least, max_length=most)


def row(*items: Any) -> Any:
    """A list of these items, one after the other; read as a tuple."""
    return core_schema.tuple_schema(list(items))


def mapping(values: Any) -> Any:
    """An object with any names."""
    return core_schema.dict_schema(core_schema.str_schema(strict=True), values)


def optional(kind: Any) -> Any:
    """Such a value, or null."""
    return core_schema.nullable_schema(kind)


def record(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None, *, open: bool = False) -> Any:
    """An object with these members. open: it may have others."""
    fields = {name: core_schema.typed_dict_field(kind) for name, kind in required.items()}
    fields |= {name: core_schema.typed_dict_field(kind, required=False) for name, kind in (optional or {}).items()}
    return core_schema.typed_dict_schema(fields, extra_behavior="allow" if open else "forbid")


CRC = text("[0-9a-f]{8}")
"""A checksum as the store writes it."""


class Checker:
    """A schema ready for use; built when it is first used."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._validator: SchemaValidator | None = None

    def check(self, value: Any, where: Path | str) -> Any:
        """The value, with tuples for rows; DamagedError names `where` and the field that differs."""
        if self._validator is None:
            self._validator = SchemaValidator(self._schema)
        try:
            return self._validator.validate_python(value)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            place = ".".join(str(part)[:80] for part in fault["loc"])
            got = "" if fault["type"] == "missing" else f", not {_short(fault['input'])}"
            raise DamagedError(f"{where}: damaged: field {place or 'of the file'}: {fault['msg']}{got}") from None

    def parse(self, raw: bytes | str, where: Path | str, *, nan: bool = False) -> Any:
        """Parse JSON (`load_json`) and check it."""
        return self.check(load_json(raw, where, nan=nan), where)


def load_json(raw: bytes | str, where: Path | str, *, nan: bool = False) -> Any:
    """The value of a JSON text in UTF-8; DamagedError, beginning with `where`, for anything else.

    Names may not occur twice in an object, and values nest at most 200 deep. nan: NaN and Infinity are numbers, as in
    Python's dialect.
    """
    try:
        from_json(raw, allow_inf_nan=nan)  # Refuses deep nesting and half surrogate pairs, which Python's parser takes.
        return json.loads(raw, object_pairs_hook=_once, parse_constant=None if nan else _no_number)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: damaged: not usable JSON: {first_line(error)}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice in one object")
    return found


def _no_number(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _short(value: object) -> str:
    """A value as one short line."""
    shown = f"{value:.60}" if isinstance(value, str) else value
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of many digits"
    if isinstance(value, list | dict | tuple):
        return f"a value of type {type(value).__name__}"
    return repr(shown)[:80]
