"""A row of a rollout file, in any format, as a Rollout.

Rows of all formats get the same checks with the same messages, which name the file, the row and the field as spelled in
the file. Only our own format says which tokens the policy wrote. The others hold one text per response: rows that show
several turns or outputs are refused, or counted for a warning where only the text hints at them
(`Rollout.hints_at_turns`).
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradstore.engine.rollouts.formats import TRL, names_in, names_of
from gradstore.engine.rollouts.rollout import Rollout
from gradstore.engine.rollouts.templates import Prompt
from gradstore.errors import RequestError, near_miss
from gradstore.keepable import check_keepable, parsed, parsed_field
from gradstore.reading.columns import check_spelling

_OUTPUT = re.compile(r".+_\d+_(\d+)")
"""Key of an output in verl's dumps: prompt, rollout, number of the output."""
LOGPROB_SLACK = 0.01
"""Log-probabilities may exceed 0 by this much (rounding in half precision); larger values are rejected."""


def read_row(row: Any, format: str, where: str, *, vocabulary: int | None = None) -> Rollout:
    """Read the rollout in a row of a file.

    where: names file and row in messages. vocabulary: size of the model's vocabulary, if known.
    Raises RequestError for a missing field, a wrong type, a reward or log-probability that is not finite, token ids
    out of range, lists whose lengths disagree, several turns or outputs in a format that cannot tell them apart.
    """
    if not isinstance(row, Mapping):
        raise RequestError(f"{where}: expected an object with the fields of a rollout, found {_kind(row)}")
    check_spelling(row, names_in(format), where)
    fields = _Fields(row, names_of(format), where)
    fields.check_outputs()
    prompt, prompt_ids = fields.prompt(), fields.ids("prompt_ids", vocabulary)
    if prompt is None and prompt_ids is None:
        raise fields.missing("prompt", "prompt_ids")
    if prompt_ids is not None and not len(prompt_ids):
        raise fields.error("prompt_ids", "is empty, expected at least one token id")
    response = fields.completion() if format.startswith(TRL) else fields.text("response")
    response_ids = fields.ids("response_ids", vocabulary)
    if response is None and response_ids is None:
        raise fields.missing("response", "response_ids")
    mask = fields.mask("response_mask", response_ids)
    return Rollout(
        problem_id=fields.problem_id(hashed=prompt if format.startswith(("verl", TRL)) else None),
        prompt=prompt,
        prompt_ids=prompt_ids,
        response=response,
        response_ids=response_ids,
        response_mask=mask,
        rollout=fields.name("rollout"),
        reward=fields.summed_reward() if format.startswith(TRL) else fields.reward(),
        logprobs=fields.logprobs("logprobs", response_ids, mask),
        reference_logprobs=fields.logprobs("reference_logprobs", response_ids, mask),
        source=fields.text("source") or "",
        ground_truth=fields.ground_truth(),
        tags=fields.tags(),
        finish_reason=fields.text("finish_reason") or "",
        extra=fields.extra(),
        step=fields.step(),
    )


def text_id(text: str) -> str:
    """Stable id of a problem without its own id: "text-" and 16 hexadecimal digits of the prompt text's SHA-256."""
    return "text-" + hashlib.sha256(text.encode()).hexdigest()[:16]


class _Fields:
    """A row read through a format's table of names; every returned value has been checked."""

    def __init__(self, row: Mapping[str, Any], names: Mapping[str, tuple[str, ...]], where: str) -> None:
        self.row, self.names, self.where = row, names, where

    def get(self, part: str) -> tuple[str, Any]:
        """Field name and value of a part in this row; the first name and None if the row has no value."""
        names = self.names.get(part, ())
        for name in names:
            value: Any = self.row
            for key in name.split("."):
                value = _opened(value).get(key)
            if value is not None:
                return name, value
        return (names[0] if names else part), None

    def error(self, part: str, message: str) -> RequestError:
        return RequestError(f"{self.where}: field {self.get(part)[0]!r} {message}")

    def missing(self, *parts: str) -> RequestError:
        names = [name for part in parts for name in self.names.get(part, ())]
        listed = " or ".join(map(repr, names))
        near = next(filter(None, (near_miss(name, self.row) for name in names if name not in self.row)), "")
        return RequestError(f"{self.where}: missing field {listed} (found: {', '.join(self.row) or 'nothing'}){near}")

    def problem_id(self, hashed: Prompt | None) -> str:
        _, value = self.get("problem_id")
        if value is None and hashed is not None:
            return text_id(hashed if isinstance(hashed, str) else json.dumps(hashed, sort_keys=True))
        if value is None:
            raise self.missing("problem_id")
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.error("problem_id", f"is {_kind(value)}, expected text or an integer")
        if value == "":
            raise self.error("problem_id", "is empty, expected the id of a problem")
        return self._encodable("problem_id", str(value))

    def text(self, part: str) -> str | None:
        _, value = self.get(part)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.error(part, f"is {_kind(value)}, expected text")
        return self._encodable(part, value)

    def name(self, part: str) -> str | None:
        """A text, or an integer as text."""
        _, value = self.get(part)
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else self.text(part)

    def completion(self) -> str | None:
        """The response of a TRL dump: text, or one message of the assistant with text alone."""
        field, value = self.get("response")
        if not isinstance(value, Sequence) or isinstance(value, str):
            return self.text("response")
        told = {key for message in value if isinstance(message, Mapping) for key, v in message.items() if v is not None}
        if len(value) != 1 or not isinstance(value[0], Mapping) or told != {"role", "content"}:
            raise RequestError(
                f"{self.where}: field {field!r} has {len(value)} messages with {', '.join(sorted(told))}: TRL's dumps "
                "do not say which tokens of turns, tool calls or thoughts the policy wrote; write rollouts with "
                "'response_ids' and 'response_mask'"
            )
        content = value[0]["content"]
        if not isinstance(content, str):
            raise self.error("response", f"has content that is {_kind(content)}, expected text")
        return self._encodable("response", content)

    def check_outputs(self) -> None:
        """Refuse the second and later outputs of a rollout in verl's dumps, whose rewards need not be the rollout's."""
        field, value = self.get("key")
        found = _OUTPUT.fullmatch(value) if isinstance(value, str) else None
        if found and int(found[1]) > 0:
            raise RequestError(
                f"{self.where}: field {field!r} is {value!r}, output {int(found[1])} of its rollout: verl's dumps do "
                "not say which tokens of several turns the policy wrote; write rollouts with 'response_mask', 'rollout'"
            )

    def prompt(self) -> Prompt | None:
        _, value = self.get("prompt")
        if value is None or isinstance(value, str):
            if value == "":
                raise self.error("prompt", "is empty, expected the problem's text or chat messages")
            return None if value is None else self._encodable("prompt", value)
        if not isinstance(value, Sequence):
            raise self.error("prompt", f"is {_kind(value)}, expected text or a list of chat messages")
        if not value:
            raise self.error("prompt", "is an empty list, expected at least one chat message")
        messages = []
        for j, message in enumerate(value):
            if (
                not isinstance(message, Mapping)
                or not isinstance(message.get("role"), str)
                or "content" not in message
                or not isinstance(message["content"], str | list | None)
            ):
                raise self.error("prompt", f"message {j} needs 'role', text, and 'content', text or a list of parts")
            kept = {key: value for key, value in message.items() if value is not None}
            messages.append({"content": None, **kept} if message["content"] is None else kept)
        return self._encodable("prompt", messages)

    def ids(self, part: str, vocabulary: int | None) -> np.ndarray | None:
        _, value = self.get(part)
        if value is None:
            return None
        if not isinstance(value, list | np.ndarray):
            raise self.error(part, f"is {_kind(value)}, expected a list of token ids")
        if isinstance(value, np.ndarray) and value.dtype.kind not in "iu":
            value = value.tolist()
        if isinstance(value, list) and not set(map(type, value)) <= {int}:
            j = next((j for j, item in enumerate(value) if type(item) is not int), 0)
            raise self.error(part, f"entry {j} is {value[j]!r}, expected integer token ids")
        limit = vocabulary if vocabulary is not None else np.iinfo(np.int64).max
        for j, item in (_extreme(value, min), _extreme(value, max)) if len(value) else ():
            if not 0 <= item < limit:
                end = f" below {vocabulary}, the model's vocabulary" if vocabulary is not None else " of 0 or more"
                raise self.error(part, f"entry {j} is {item}, expected a token id{end}")
        return np.asarray(value, dtype=np.int64)

    def mask(self, part: str, response_ids: np.ndarray | None) -> np.ndarray | None:
        _, value = self.get(part)
        if value is None:
            return None
        if not isinstance(value, list | np.ndarray):
            raise self.error(part, f"is {_kind(value)}, expected a list of 0 and 1")
        if response_ids is None:
            raise self.error(part, "needs 'response_ids' beside it: it says which of them the policy wrote")
        if len(value) != len(response_ids):
            raise self.error(part, f"has {len(value)} entries, but 'response_ids' has {len(response_ids)}")
        items = value.tolist() if isinstance(value, np.ndarray) else value
        wrong = next((j for j, item in enumerate(items) if not isinstance(item, int) or item not in (0, 1)), None)
        if wrong is not None:
            raise self.error(part, f"entry {wrong} is {items[wrong]!r}, expected 0 or 1")
        return np.asarray(items, dtype=bool)

    def summed_reward(self) -> float:
        """The sum of the columns of rewards; null and nan are of functions that do not apply to the row."""
        values = [self.row.get(name) for name in self.names["reward"]]
        for name, value in zip(self.names["reward"], values, strict=True):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise RequestError(f"{self.where}: field {name!r} is {_kind(value)}, expected a number")
        given = [_float(value) for value in values if value is not None and value == value]
        if not given:
            raise self.missing("reward")
        if not np.isfinite(sum(given)):
            raise self.error("reward", f"is {sum(given)}, expected a finite number")
        return sum(given)

    def reward(self) -> float:
        _, value = self.get("reward")
        if value is None:
            raise self.missing("reward")
        if not isinstance(value, int | float):
            raise self.error("reward", f"is {_kind(value)}, expected a number")
        number = _float(value)
        if not np.isfinite(number):
            raise self.error("reward", f"is {number}, expected a finite number")
        return number

    def logprobs(
        self, part: str, response_ids: np.ndarray | None, written: np.ndarray | None = None
    ) -> np.ndarray | None:
        _, value = self.get(part)
        if value is None:
            return None
        if not isinstance(value, list | np.ndarray):
            raise self.error(part, f"is {_kind(value)}, expected a list of numbers")
        if response_ids is None:
            raise self.error(
                part, "needs 'response_ids' beside it: text tokenised again need not give the tokens that were sampled"
            )
        if len(value) != len(response_ids):
            raise self.error(part, f"has {len(value)} entries, but 'response_ids' has {len(response_ids)}")
        if written is not None:  # at other tokens engines record what they like, or null
            items = value.tolist() if isinstance(value, np.ndarray) else value
            value = [item if own else float("nan") for item, own in zip(items, written, strict=True)]
        if isinstance(value, list) and not set(map(type, value)) <= {int, float}:
            j = next(j for j, item in enumerate(value) if type(item) not in (int, float))
            raise self.error(part, f"entry {j} is {_kind(value[j])}, expected a number")
        try:
            numbers = np.asarray(value, dtype=np.float64)
        except OverflowError:  # an integer beyond any float
            numbers = np.asarray([_float(item) for item in value])
        unfit = ~np.isfinite(numbers) | (numbers > LOGPROB_SLACK)
        wrong = np.flatnonzero(unfit if written is None else unfit & written)
        if len(wrong):
            j = int(wrong[0])
            raise self.error(part, f"entry {j} is {numbers[j]}, expected a finite number of 0 or less")
        return numbers.astype(np.float32)

    def ground_truth(self) -> str:
        _, value = self.get("ground_truth")
        if value is None:
            return ""
        if isinstance(value, str):
            return self._encodable("ground_truth", value)
        return self._encodable("ground_truth", json.dumps(value, ensure_ascii=False, sort_keys=True, default=str))

    def tags(self) -> list[str]:
        _, value = self.get("tags")
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
            raise self.error("tags", f"is {_kind(value)}, expected a list of texts")
        return [self._encodable("tags", tag) for tag in value]

    def extra(self) -> dict[str, Any]:
        name, value = self.get("extra")
        value = parsed_field(value, self.where, name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.error("extra", f"is {_kind(value)}, expected an object")
        return dict(self._encodable("extra", dict(value)))

    def step(self) -> int | None:
        _, value = self.get("step")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error("step", f"is {value!r}, expected an integer of 0 or more")
        return value

    def _encodable(self, part: str, text: Any) -> Any:
        """Reject text, or a value that contains text, that cannot be encoded for a tokenizer or a file."""
        check_keepable(text, self.where, self.get(part)[0])
        return text


def _opened(value: Any) -> Mapping[str, Any]:
    """The fields of an object, or of its JSON text as in Parquet files; other values have no fields."""
    if isinstance(value, str):
        try:
            value = parsed(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, Mapping) else {}


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list | np.ndarray) else names.get(type(value), type(value).__name__)


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _extreme(values: Any, pick: Any) -> tuple[int, int]:
    if isinstance(values, np.ndarray):
        j = int(values.argmin() if pick is min else values.argmax())
        return j, int(values[j])
    value = pick(values)
    return values.index(value), value
