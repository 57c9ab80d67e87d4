"""Settings that are read by name: from NAME=VALUE arguments, verl's configuration, or a YAML file.

Settings are frozen dataclasses. `read` makes one from names and values, `plain` turns it into plain values again:

    settings = read(RoundSettings, {"selected": "64", "mode": "cosine"}, "round settings: ")

pydantic parses each value to its field's type. A text is parsed as on a command line; another value must have the type
already: 20.5 is no whole number, true is no number. The text `null` is None where a field may be None. A nested
dataclass is given by the names of its fields; those left out keep the default of that place. A class may have
`ALIASES`, other names of its fields, and a method `from_text` for a text that stands for the whole dataclass, such as
the name of a preset; NAME=VALUE pairs after it change fields of the preset.

A mistake is a RequestError of one line: where, the field, its value, and what is expected. pydantic and PyYAML are
imported when they are first used.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gradstore.durable import write_text_file
from gradstore.errors import RequestError
from gradstore.reading.files import read_text

T = TypeVar("T")
Aliases = Mapping[str, str]
"""Other name -> field. `rounds.seed` is a field of a nested dataclass; `1/ratio` is the reciprocal of the value."""

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    Any: "a value",
}


def read(cls: type[T], values: Mapping[str, Any] | str, where: str) -> T:
    """A settings dataclass from names and values, or from a text such as `NAME=VALUE,NAME=VALUE`.

    where: text before a setting's name in messages, such as `run.yaml: ` or `gradstore.`. RequestError for an unknown
    name, a setting given twice, a value of another type, a missing setting, and what the class itself refuses.
    """
    return build(cls, _parsed(cls, values, where, ()), where)


def parse(
    cls: type, values: Mapping[str, Any], where: str, path: tuple[str, ...] = (), also: Iterable[str] = ()
) -> dict[str, Any]:
    """Parsed values by field, without defaults, for `merge` and `build`; nested dataclasses are dicts.

    path: the names that lead to a nested dataclass. also: further names that are known in this place, for the hint at
    a misspelt one. RequestError as in `read`.
    """
    hints, aliases = _hints(cls), _aliases(cls)
    found: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for given, value in values.items():
        target = aliases.get(given, str(given))
        name, _, rest = target.removeprefix("1/").partition(".")
        if name not in hints:
            near = _inside(hints, given) or difflib.get_close_matches(str(given), [*hints, *aliases, *also], n=1)
            instead = f"; did you mean {near[0]!r}?" if near else f", expected one of {', '.join([*also, *hints])}"
            raise RequestError(f"{where}{'.'.join([*path, str(given)])} is not known{instead}")
        if value is None and not rest and not _optional(hints[name]):
            continue  # null where the field must have a value: not given
        if target.startswith("1/"):
            value = _reciprocal(value)
        value = _parsed(hints[name], {rest: value} if rest else value, where, (*path, spelled(cls, name)))
        if name in found:
            value = _joined(found[name], value, _message(where, path, f"{given_as[name]!r} and {given!r}"), name)
        found[name], given_as[name] = value, given
    return found


def _inside(hints: Mapping[str, Any], name: str) -> list[str]:
    """The full names of a setting that nested dataclasses have."""
    found = [(outer, _dataclass_in(hint)) for outer, hint in hints.items()]
    return [f"{outer}.{name}" for outer, inner in found if inner and name in _hints(inner)]


def merge(cls: type, low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Two results of `parse` as one; `high` wins. Nested dataclasses are merged field by field."""
    merged = {**low, **high}
    for name, hint in _hints(cls).items():
        if _dataclass_in(hint) and isinstance(low.get(name), dict) and isinstance(high.get(name), dict):
            merged[name] = merge(_dataclass_in(hint), low[name], high[name])
    return merged


def build(cls: type[T], parsed: Any, where: str, path: tuple[str, ...] = (), default: T | None = None) -> T:
    """The dataclass from a result of `parse`; an instance is returned as it is.

    default: what the fields not given are taken from; None: the class. RequestError for missing settings, and for what
    the class refuses.
    """
    if isinstance(parsed, cls):
        return parsed
    hints, found = _hints(cls), dict(parsed)  # type: ignore[arg-type]
    starts = {
        field.name: _default(field) if default is None else getattr(default, field.name)
        for field in fields(cls)  # type: ignore[arg-type]
    }
    missing = [".".join([*path, name]) for name, start in starts.items() if start is MISSING and name not in found]
    if missing:
        raise RequestError(f"{where}{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    for name, start in starts.items():
        inner = _dataclass_in(hints[name])
        if inner and isinstance(found.get(name), dict):
            found[name] = build(inner, found[name], where, (*path, name), start if isinstance(start, inner) else None)
    try:
        return cls(**found) if default is None else replace(default, **found)  # type: ignore[type-var]
    except RequestError as error:
        raise RequestError(_message(where, path, error)) from None


def check(settings: Any) -> None:
    """RequestError if a field's value is not of its type; for `__post_init__`, as Python does not check."""
    from pydantic import ValidationError

    cls: Any = type(settings)
    for name, hint in _hints(cls).items():
        value, inner = getattr(settings, name), _dataclass_in(hint)
        try:
            if not inner:
                _adapter(hint).validate_python(value, strict=True)
            elif not isinstance(value, inner) and (value is not None or not _optional(hint)):
                raise RequestError(f"{name} is {value!r}, expected {inner.__name__}")
        except ValidationError:
            raise RequestError(f"{spelled(cls, name)} is {value!r}, expected {_expected(hint)}") from None


def spelled(cls: type, name: str) -> str:
    """A field's name, with its other names in parentheses: `candidates (chunk_size)`, `ratio (1/k)`."""
    targets = {target.replace(name, other): target for other, target in _aliases(cls).items()}
    others = [other for other, target in targets.items() if target.removeprefix("1/") == name]
    return f"{name} ({', '.join(others)})" if others else name


def arguments(texts: Iterable[str], help: str = "") -> dict[str, str]:
    """NAME=VALUE texts as a dict; RequestError for another form, or a name given twice. help: end of the message."""
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name or name.startswith("-"):
            raise RequestError(f"{text!r} is no option and no setting, expected NAME=VALUE{help}")
        if name in found:
            raise RequestError(f"setting {name!r} is given twice")
        found[name] = value
    return found


def plain(settings: Any) -> Any:
    """Settings as dicts, lists, numbers and texts, which `read` takes and YAML and JSON can hold."""
    if is_dataclass(settings):
        return {field.name: plain(getattr(settings, field.name)) for field in fields(settings)}
    if isinstance(settings, Mapping):
        return {str(name): plain(value) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [plain(value) for value in settings]
    return str(settings) if isinstance(settings, Path) else settings


def differences(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> its two values, for every value in which two settings dataclasses differ."""
    ours, theirs = dict(_leaves(plain(one))), dict(_leaves(plain(other)))
    pairs = {name: (ours.get(name), theirs.get(name)) for name in [*ours, *theirs]}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


MOST_YAML_BYTES = 1 << 20
"""Largest file that is taken for settings: PyYAML reads about a megabyte a second."""
MOST_YAML_DEPTH = 50
"""Deepest nesting of settings."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; RequestError for a broken file, and for a name given twice."""
    text = read_text(path, MOST_YAML_BYTES)
    try:
        found = _yaml(text)
    except ValueError as error:
        raise RequestError(f"{path}: is not YAML: {error}") from None
    if not isinstance(found, dict):
        raise RequestError(f"{path}: holds no settings, expected lines of NAME: VALUE")
    return found


def write_yaml(path: Path, settings: Any) -> None:
    """Write settings to a YAML file atomically."""
    import yaml

    try:
        text = yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise RequestError(f"{path}: a setting cannot be written: {' '.join(map(str, error.args))}") from None
    write_text_file(path, text)


def _parsed(hint: Any, value: Any, where: str, path: tuple[str, ...]) -> Any:
    """A value of this type; of a dataclass given by names, a dict of parsed fields."""
    from pydantic import ValidationError

    inner, item, place = _dataclass_in(hint), _item_of(hint), where + ".".join(path)
    if value == "null" and _optional(hint) and str not in _kinds(hint):
        return None
    if isinstance(value, str) and (inner or item):
        try:
            value = _from_text(inner, get_origin(_kinds(hint)[0]), value)
        except ValueError as error:
            raise RequestError(_message(where, path, error)) from None
    if inner and isinstance(value, Mapping):
        return parse(inner, value, where, path)
    if item and isinstance(value, Mapping):
        return {str(name): _parsed(item, own, where, (*path, str(name))) for name, own in value.items()}
    if isinstance(value, inner or ()) or (value is None and _optional(hint)):
        return value
    try:
        if not inner:
            return _adapter(hint).validate_python(value, strict=isinstance(value, bool | int | float))
    except ValidationError:
        pass
    raise RequestError(f"{place} is {value!r}, expected {_expected(hint)}")


def _message(where: str, path: tuple[str, ...], message: object) -> str:
    """A message about a group of settings as a whole."""
    place = (where + ".".join(path)).rstrip(".: ")
    return f"{place}: {message}" if place else str(message)


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _from_text(inner: Any, kind: Any, text: str) -> Any:
    """What a text says of a dataclass, a mapping or a list; ValueError for what it cannot be.

    YAML in brackets, NAME=VALUE pairs, or a bare name: for a dataclass what its `from_text` says, which pairs after it
    change (`gspo,clip_high=0.001`), or its first field; for a list its only item.
    """
    if (text[:1], text[-1:]) in (("{", "}"), ("[", "]")):
        return _yaml(text)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if inner is not None:
        if hasattr(inner, "from_text") and "=" not in (parts or [""])[0]:
            return {**plain(inner.from_text(parts[0] if parts else text)), **arguments(parts[1:])}
        return arguments(part if "=" in part else f"{fields(inner)[0].name}={part}" for part in parts)
    if not issubclass(kind, Mapping):
        return [text]
    pairs = [part.rpartition("=") for part in parts]  # a name may contain an equals sign
    if not all(name for name, _, _ in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError(f"{text!r} is not NAME=VALUE,NAME=VALUE with each name once")
    return {name: value for name, _, value in pairs}


def _yaml(text: str) -> Any:
    """The content of a YAML text; ValueError, in one line, for a broken one and a name given twice."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ValueError(f"{f'line {mark.line + 1}: ' if mark else ''}{error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None


@cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a name given twice, of which PyYAML would take the last, references, and deep nesting."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent):
                raise yaml.MarkedYAMLError(
                    problem=f"*{event.anchor}: references are not taken", problem_mark=event.start_mark
                )
            if self.depth >= MOST_YAML_DEPTH:
                raise yaml.MarkedYAMLError(
                    problem=f"nested more than {MOST_YAML_DEPTH} deep", problem_mark=event.start_mark
                )
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for name, _ in node.value:
                if isinstance(name.value, str) and name.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{name.value!r} is given twice", problem_mark=name.start_mark)
                seen.add(str(name.value))
            return super().construct_mapping(node, deep)

    return Loader


def _expected(hint: Any) -> str:
    """What a type accepts, in words."""
    inner, item, kinds = _dataclass_in(hint), _item_of(hint), _kinds(hint)
    if inner:
        return f"settings by name ({', '.join(field.name for field in fields(inner))})"
    if item:
        many = "values by name (each" if issubclass(get_origin(kinds[0]), Mapping) else "a list (each item"
        return f"{many} {_expected(item)})"
    if len(kinds) > 1:
        return " or ".join(map(_expected, kinds))
    if get_origin(kinds[0]) is Literal:
        choices = get_args(kinds[0])
        return f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else f"`{choices[0]}`"
    return _WORDS[kinds[0]]


def _joined(one: Any, other: Any, both: str, name: str) -> Any:
    """Fields of the nested dataclass `name` that were given under two names, `both`; RequestError for a field twice."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        raise RequestError(f"{both} are the same; give one")
    for twice in one.keys() & other.keys():
        raise RequestError(f"{both} both give {name}.{twice}; give it once")
    return {**one, **other}


def _reciprocal(value: Any) -> Any:
    """1 / value, and 0 for 0; what is no number is returned as it is."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    return value if isinstance(value, bool) else 1 / number if number else number


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _aliases(cls: type) -> Aliases:
    return getattr(cls, "ALIASES", {})


@cache
def _hints(cls: Any) -> dict[str, Any]:
    """Field name -> its type."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


@cache
def _adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint, config={"allow_inf_nan": False})


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union, without None; another type alone."""
    union = get_origin(hint) in (Union, UnionType)
    return tuple(kind for kind in get_args(hint) if kind is not type(None)) if union else (hint,)


def _optional(hint: Any) -> bool:
    return hint is Any or type(None) in get_args(hint)


def _dataclass_in(hint: Any) -> Any:
    """The dataclass of a type such as `Diversity | None`; None for other types."""
    return next((kind for kind in _kinds(hint) if is_dataclass(kind)), None)


def _item_of(hint: Any) -> Any:
    """The type of a mapping's values, or of a list's items; None for other types."""
    kind = _kinds(hint)[0]
    origin = get_origin(kind)
    if not isinstance(origin, type) or not issubclass(origin, Mapping | list | tuple):
        return None
    return get_args(kind)[1 if issubclass(origin, Mapping) else 0]
