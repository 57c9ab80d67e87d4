"""Problem records: the canonical dict, the reader of problem files, and conversion from and to verl's format.

A canonical record is {"id", "source", "prompt", "ground_truth", "tags", "extra"}. `read_problems` accepts JSONL and
Parquet, with flat fields or with verl's (data_source, prompt, ability, reward_model, extra_info). Other fields of a
verl record are stored under extra["verl"], so that `to_verl` restores the record.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gradstore.errors import RequestError
from gradstore.keepable import check_keepable, parsed_field
from gradstore.reading.columns import check_spelling
from gradstore.reading.opening import read_records

FIELDS = ("id", "source", "prompt", "ground_truth", "tags", "extra")
_FLAT_FIELDS = FIELDS[1:]
_VERL_FIELDS = ("data_source", "prompt", "ability", "reward_model", "extra_info")


def canonical(record: Any, where: str) -> dict:
    """Check a record and fill in every canonical field; RequestError, beginning with `where`, for an invalid one."""
    if not isinstance(record, dict):
        raise RequestError(f"{where}: a problem must be a dict of fields, not {type(record).__name__}")
    problem_id = record.get("id")
    if not isinstance(problem_id, str) or not problem_id:
        raise RequestError(f"{where}: field 'id' must be a non-empty string, not {problem_id!r}")
    where = f"{where}: problem {problem_id!r}"
    check_keepable(record, where)
    unknown = sorted(map(str, record.keys() - set(FIELDS)))
    if unknown:
        raise RequestError(f"{where}: field {unknown[0]!r} is not known; put it into 'extra'")
    source = _optional(record, "source", "")
    ground_truth = _optional(record, "ground_truth", "")
    for field, value in (("source", source), ("ground_truth", ground_truth)):
        if not isinstance(value, str):
            raise RequestError(f"{where}: field {field!r} must be a string, not {value!r}")
    tags = _optional(record, "tags", [])
    if not isinstance(tags, list | tuple) or not all(isinstance(tag, str) for tag in tags):
        raise RequestError(f"{where}: field 'tags' must be a list of strings, not {tags!r}")
    extra = _optional(record, "extra", {})
    if not isinstance(extra, dict):
        raise RequestError(f"{where}: field 'extra' must be a dict, not {type(extra).__name__}")
    return {
        "id": problem_id,
        "source": source,
        "prompt": _prompt(record.get("prompt"), where),
        "ground_truth": ground_truth,
        "tags": list(tags),
        "extra": json.loads(json.dumps(extra)) if extra else {},
    }


def read_problems(path: str | Path) -> list[dict]:
    """Read the canonical records of a file in JSON Lines, a JSON list or Parquet, in the file's order.

    RequestError names the file, the line or row (counted from 1) and the invalid field; for a repeated id it names both
    places. A file without problems is an error.
    """
    return [record for _, record in placed_problems(path)]


def scan_problems(path: str | Path) -> Iterator[dict]:
    """Like `read_problems`, but one record after the other: memory for a part of the file, and for the ids.

    `store.add_problems(name, scan_problems(path))` adds a file that is larger than memory where most of it is known.
    The errors are those of `read_problems`, raised when the record at fault is reached.
    """
    return (record for _, record in _scan(Path(path)))


def placed_problems(path: str | Path) -> list[tuple[str, dict]]:
    """Like `read_problems`, but each record comes with its place: ("FILE, line N" or "FILE, row N", record)."""
    return list(_scan(Path(path)))


def _scan(path: Path) -> Iterator[tuple[str, dict]]:
    seen: dict[str, int] = {}  # id -> number of the line or row
    for where, raw in read_records(path, what="problem"):
        record = from_verl(raw, where) if is_verl(raw) else _from_flat(raw, where)
        place, _, number = where.removeprefix(f"{path}, ").rpartition(" ")
        first = seen.setdefault(record["id"], int(number))
        if first != int(number):
            places = f"{place} {first} and {place} {number}"
            raise RequestError(f"{path}: problem id {record['id']!r} occurs twice, in {places}")
        yield where, record
    if not seen:
        raise RequestError(f"{path}: no problems, expected at least one")


def is_verl(record: dict) -> bool:
    """Whether a record has verl's fields instead of flat ones."""
    return "reward_model" in record or "data_source" in record or "extra_info" in record


def from_verl(record: dict, where: str) -> dict:
    """Convert a verl record to canonical form; id: extra_info.index, else extra_info.id, else from the top level."""
    check_keepable(record, where)
    check_spelling(record, _VERL_FIELDS, where)
    rest = {name: value for name, value in record.items() if name not in ("data_source", "prompt")}
    for field in ("extra_info", "reward_model"):
        if rest.get(field):
            rest[field] = _object(rest[field], field, where)
    info, reward = rest.get("extra_info") or {}, rest.get("reward_model") or {}
    candidates = {
        "extra_info.index": info.get("index"),
        "extra_info.id": info.get("id"),
        "problem_id": rest.get("problem_id"),
        "id": rest.get("id"),
    }
    field, value = next(((name, value) for name, value in candidates.items() if value is not None), ("", None))
    if value is None:
        raise RequestError(f"{where}: field 'extra_info.index' is missing: a problem needs an id")
    truth = reward.get("ground_truth")
    if isinstance(truth, str):
        rest["reward_model"] = {name: part for name, part in reward.items() if name != "ground_truth"}
    return canonical(
        {
            "id": id_text(value, field, where),
            "source": record.get("data_source"),
            "prompt": record.get("prompt"),
            "ground_truth": _text(truth, "reward_model.ground_truth", where),
            "tags": _verl_tags(rest.get("ability"), info),
            "extra": {"verl": rest},
        },
        where,
    )


def to_verl(record: dict) -> dict:
    """Convert a canonical record to verl's form: data_source, prompt messages, ability, reward_model, extra_info.

    A record read from a verl file is restored unchanged, except that extra_info gets the id as `index` if it had none.
    extra_info also gets `tags` if there are other tags than the ability.
    """
    record = canonical(record, "to_verl")
    rest = dict(record["extra"].get("verl", {}))
    others = {name: value for name, value in record["extra"].items() if name != "verl"}
    prompt = record["prompt"]
    info = {**(rest.pop("extra_info", None) or {}), **others}
    if info.get("index") is None:
        info["index"] = record["id"]
    reward = rest.pop("reward_model", None) or {"style": "rule"}
    ability = rest.pop("ability", record["tags"][0] if record["tags"] else "")
    if record["tags"] != _verl_tags(ability, info):
        info["tags"] = record["tags"]
    return {
        "data_source": record["source"],
        "prompt": as_message(prompt),
        "ability": ability,
        "reward_model": {"ground_truth": record["ground_truth"], **reward},
        "extra_info": info,
        **rest,
    }


def _verl_tags(ability: Any, info: Mapping[str, Any]) -> list[str]:
    """Tags of a verl record: its ability and the `tags` of its extra_info."""
    others = info.get("tags")
    named = [ability, *(others if isinstance(others, list | tuple) else [])]
    return list(dict.fromkeys(tag for tag in named if isinstance(tag, str) and tag))


def detail(record: Mapping[str, Any], name: str) -> Any:
    """Value of a problem's extra field: from `extra`, else from the extra_info of its verl record, else None."""
    extra = record.get("extra") or {}
    if extra.get(name) is not None:
        return extra[name]
    info = (extra.get("verl") or {}).get("extra_info") or {}
    return info.get(name)


def with_id(record: Mapping[str, Any], problem_id: str) -> dict:
    """Copy of the record with another id; `to_verl` also returns the new id."""
    renamed = {**record, "id": problem_id}
    verl = record["extra"].get("verl")
    if verl and (verl.get("extra_info") or {}).get("index") is not None:
        info = {**verl["extra_info"], "index": problem_id}
        renamed["extra"] = {**record["extra"], "verl": {**verl, "extra_info": info}}
    return renamed


def as_message(prompt: str | list[dict]) -> list[dict]:
    """A prompt as chat messages: a text becomes one message of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def message_text(content: Any) -> str:
    """Text of a chat message's content; text parts are joined by newlines; "" for null and images."""
    if isinstance(content, list | tuple):
        texts = [
            part if isinstance(part, str) else part.get("text") for part in content if isinstance(part, str | dict)
        ]
        return "\n".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _from_flat(record: dict, where: str) -> dict:
    fields = dict(record)
    name = "problem_id" if fields.get("problem_id") is not None else "id"
    value = fields.pop(name, None)
    if value is None:
        raise RequestError(
            f"{where}: field 'id' is missing: a problem needs an id (found: {', '.join(map(str, record))})"
        )
    check_keepable(fields, where)
    check_spelling(fields, _FLAT_FIELDS, where)
    extra = _object(fields.pop("extra", None) or {}, "extra", where)
    known = {field: fields.pop(field, None) for field in ("source", "prompt", "ground_truth", "tags")}
    known["ground_truth"] = _text(known["ground_truth"], "ground_truth", where)
    return canonical({"id": id_text(value, name, where), **known, "extra": {**fields, **extra}}, where)


def _prompt(prompt: Any, where: str) -> str | list[dict]:
    if isinstance(prompt, str) and prompt:
        return prompt
    if not isinstance(prompt, list | tuple) or not prompt:
        expected = "a non-empty string or a list of chat messages"
        raise RequestError(f"{where}: field 'prompt' must be {expected}, not {prompt!r}")
    for position, message in enumerate(prompt):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            expected = "a dict with 'role' and 'content'"
            raise RequestError(f"{where}: field 'prompt', message {position}, must be {expected}, not {message!r}")
    restored: list[dict] = json.loads(json.dumps(list(prompt)))
    return restored


def _object(value: Any, field: str, where: str) -> dict:
    """Value of an object field as a dict; also parses JSON text, which Parquet files often contain."""
    opened = parsed_field(value, where, field)
    if not isinstance(opened, dict):
        raise RequestError(f"{where}: field {field!r} must be a dict, not {type(opened).__name__}")
    if isinstance(value, str):
        check_keepable(opened, where, field)
    return opened


def _optional(record: dict, field: str, default: Any) -> Any:
    value = record.get(field)
    return default if value is None else value


def id_text(value: Any, field: str, where: str) -> str:
    """Convert the id of a problem to text; verl's data often has integers, and pandas turns them into floats."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise RequestError(f"{where}: field {field!r} must be a non-empty string or a whole number, not {value!r}")
    return str(value)


def _text(value: Any, field: str, where: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    check_keepable(value, where, field)
    return json.dumps(value)
