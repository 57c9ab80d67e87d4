"""Rows of the problem table and the canonical records that they stand for, in both directions."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from gradstore.errors import DamagedError, RequestError, check_known
from gradstore.problems import message_text
from gradstore.schema import ANYTHING, Checker, lists, load_json, mapping, record, text

if TYPE_CHECKING:
    import pyarrow as pa

_MESSAGES = Checker(lists(record({"role": text(), "content": ANYTHING}, open=True), least=1))
_EXTRA = Checker(mapping(ANYTHING))


def table_schema() -> "pa.Schema":
    """Columns of a part. Large strings, because a million prompts exceed the two gigabytes of 32-bit offsets."""
    import pyarrow as pa

    text = pa.large_string()
    return pa.schema(
        [
            pa.field("id", text, nullable=False),
            pa.field("source", text, nullable=False),
            pa.field("prompt", text, nullable=False),
            pa.field("messages", text),
            pa.field("ground_truth", text, nullable=False),
            pa.field("tags", pa.list_(pa.string()), nullable=False),
            pa.field("extra", text, nullable=False),
        ]
    )


def to_table(records: Sequence[dict]) -> "pa.Table":
    """Convert canonical records to rows; for a chat prompt, `messages` is JSON and `prompt` the last user message."""
    import pyarrow as pa

    columns: dict[str, list] = {name: [] for name in table_schema().names}
    for problem in records:
        prompt = problem["prompt"]
        chat = not isinstance(prompt, str)
        for name in ("id", "source", "ground_truth", "tags"):
            columns[name].append(problem[name])
        columns["prompt"].append(_shown(prompt) if chat else prompt)
        columns["messages"].append(_kept(prompt, problem["id"], "prompt") if chat else None)
        columns["extra"].append(_kept(problem["extra"], problem["id"], "extra") if problem["extra"] else "{}")
    return pa.table(columns, schema=table_schema())


def plain_columns(records: Sequence[Any]) -> dict[str, list] | None:
    """Unchecked records as columns, as `to_table` converts them; None if one of them has a field of an unusual type.

    They say nothing about whether the records are valid: they are only compared with rows of valid ones.
    """
    if set(map(type, records)) != {dict}:
        return None
    names = {"id", "source", "prompt", "ground_truth", "tags", "extra"}
    shapes = set(map(tuple, records))
    if not all(names.issuperset(shape) for shape in shapes):
        return None
    given: dict[str, list] = {}
    for name in set(chain.from_iterable(shapes)):
        everywhere = all(name in shape for shape in shapes)
        given[name] = list(map(itemgetter(name), records)) if everywhere else [own.get(name) for own in records]

    def column(name: str, missing: Any) -> list:
        values = given.get(name) or [missing] * len(records)
        return [missing if value is None else value for value in values] if None in values else values

    columns = {name: column(name, "") for name in ("id", "source", "ground_truth")} | {"tags": column("tags", [])}
    prompts, extras = column("prompt", ""), column("extra", {})
    kinds = set(map(type, prompts))
    if (
        not set(map(type, columns["tags"])) <= {list, tuple}
        or not kinds <= {str, list}
        or set(map(type, extras)) != {dict}
    ):
        return None
    texts = chain(columns["id"], columns["source"], columns["ground_truth"], *columns["tags"])
    if set(map(type, texts)) != {str}:
        return None
    try:
        columns["messages"] = [None] * len(prompts)
        if list in kinds:
            columns["messages"] = [_exact(own) if isinstance(own, list) else None for own in prompts]
            prompts = [_shown(own) if isinstance(own, list) else own for own in prompts]
        columns["prompt"] = prompts
        columns["extra"] = (
            [_exact(extra) if extra else "{}" for extra in extras] if any(extras) else ["{}"] * len(extras)
        )
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RecursionError):
        return None
    return columns


def plain_table(records: Sequence[Any]) -> "pa.Table | None":
    """The columns of `plain_columns` as a table; None also for what is no text in UTF-8."""
    import pyarrow as pa

    columns = plain_columns(records)
    if columns is None:
        return None
    try:
        return pa.table(columns, schema=table_schema())
    except (pa.ArrowException, TypeError, ValueError, AttributeError):
        return None


def to_records(table: "pa.Table", where: str) -> list[dict]:
    """Convert rows of a problem table back to canonical records; DamagedError, with `where`, for one that is none."""
    return [
        {
            "id": row["id"],
            "source": row["source"],
            "prompt": row["prompt"] if row["messages"] is None else _stored(_MESSAGES, row, "messages", where),
            "ground_truth": row["ground_truth"],
            "tags": row["tags"],
            "extra": _stored(_EXTRA, row, "extra", where) if row["extra"] != "{}" else {},
        }
        for row in table.to_pylist()
    ]


def _stored(checker: Checker, row: dict, field: str, where: str) -> Any:
    """The value of a column of JSON. NaN and Infinity, which earlier versions stored, become None."""
    value = checker.parse(row[field], f"{where}, problem {row['id']!r:.80}, {field}", nan=True)
    odd = "NaN" in row[field] or "Infinity" in row[field]
    return json.loads(row[field], parse_constant=lambda _: None) if odd else value


def checked_columns(columns: Sequence[str] | None) -> list[str]:
    """Names of columns, in the table's order; None: all. RequestError for an unknown one."""
    names = table_schema().names
    if columns is None:
        return names
    for name in columns:
        check_known("column", name, names)
    return [name for name in names if name in columns]


def repeated(ids: Sequence[str]) -> str | None:
    """The first id that occurs more than once; None if all are different."""
    if len(set(ids)) == len(ids):
        return None
    return next(problem_id for problem_id, count in Counter(ids).items() if count > 1)


def _shown(messages: list[dict]) -> str:
    users = [message for message in messages if message["role"] == "user"] or messages
    return message_text(users[-1]["content"]) or _json(users[-1]["content"])


def _kept(value: Any, problem_id: str, field: str) -> str:
    """A field as JSON; RequestError if it could not be read again."""
    written = _json(value)
    try:
        load_json(written, field, nan=True)
    except DamagedError as error:
        reason = str(error).removeprefix(f"{field}: damaged: ")
        raise RequestError(f"problem {problem_id!r}: field {field!r} cannot be kept: {reason}") from None
    return written


def _exact(value: Any) -> str:
    """JSON as `_json` writes it; ValueError for NaN, which is not kept."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
