"""The Rollout value, and the conversion of a row of each file format to it.

A format is only a table of field names (`FORMATS`): it maps each part of a rollout to fields of a row. So rows of all
formats get the same checks with the same messages. They name the file, the row and the field as spelled in the file.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradstore.engine.rollouts.templates import Prompt
from gradstore.errors import RequestError
from gradstore.keepable import check_keepable, parsed, parsed_field
from gradstore.reading.columns import check_spelling

_OWN = (
    "problem_id", "prompt", "prompt_ids", "response", "response_ids", "reward", "logprobs", "reference_logprobs",
    "source", "ground_truth", "tags", "finish_reason", "extra", "step",
)  # fmt: skip
FORMATS: dict[str, dict[str, tuple[str, ...]]] = {
    "rollouts": {name: (name,) for name in _OWN},
    "verl": {
        "problem_id": ("index", "problem_id", "extra_info.index"),
        "prompt": ("input",),
        "response": ("output",),
        "reward": ("score",),
        "ground_truth": ("gts",),
        "source": ("data_source",),
        "step": ("step",),
    },
    "gradalign": {
        "problem_id": ("group_id",),
        "prompt": ("prompt",),
        "response": ("response",),
        "reward": ("passed", "is_correct"),
        "ground_truth": ("expected_answer",),
        "source": ("data_source",),
    },
}
"""Field names per format and part of a rollout; the first field whose value is not null is used."""
FORMATS["verl-validation"] = FORMATS["verl"]
COLUMNS = sorted({name.split(".")[0] for names in FORMATS.values() for alias in names.values() for name in alias})
"""Every field of a row that any format reads."""

NAMES = {
    format: tuple(dict.fromkeys(name.split(".")[0] for aliases in names.values() for name in aliases))
    for format, names in FORMATS.items()
}
"""Fields of a row that each format reads."""
STOPPED = "reward_stopped"
"""Field of a rollout's extra: why its response was not graded. It is no part of the problem."""
LOGPROB_SLACK = 0.01
"""Log-probabilities may exceed 0 by this much (rounding in half precision); larger values are rejected."""


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One sampled response of one problem: a row of a rollout file."""

    problem_id: str
    reward: float
    prompt: Prompt | None = None
    """The prompt as text or as chat messages; None if only its token ids are known."""
    prompt_ids: np.ndarray | None = None
    """Token ids of the prompt, int64 [tokens]; they take precedence over the text."""
    response: str | None = None
    response_ids: np.ndarray | None = None
    """Token ids of the response with its end-of-sequence token, int64 [tokens]; they take precedence over the text."""
    logprobs: np.ndarray | None = None
    """Log-probability of each response id under the policy that sampled it, at temperature 1, float32 [tokens]."""
    reference_logprobs: np.ndarray | None = None
    """The same under a reference policy, for objectives with a KL term."""
    source: str = ""
    ground_truth: str = ""
    tags: list[str] = field(default_factory=list)
    finish_reason: str = ""
    """"stop" if the model ended the response, "length" if the limit of new tokens did, "" if unknown."""
    extra: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    """The step stated in the row (in verl's dumps the trainer's step, see RolloutSource.step)."""

    def row(self) -> dict[str, Any]:
        """The row for a rollout file, JSON-ready; fields without a value are omitted."""
        values: dict[str, Any] = {
            "problem_id": self.problem_id,
            "prompt": self.prompt,
            "prompt_ids": None if self.prompt_ids is None else np.asarray(self.prompt_ids).tolist(),
            "response": self.response,
            "response_ids": None if self.response_ids is None else np.asarray(self.response_ids).tolist(),
            "reward": float(self.reward),
            "logprobs": None if self.logprobs is None else _shortest_floats(self.logprobs),
            "reference_logprobs": (
                None if self.reference_logprobs is None else _shortest_floats(self.reference_logprobs)
            ),
            "source": self.source or None,
            "ground_truth": self.ground_truth or None,
            "tags": self.tags or None,
            "finish_reason": self.finish_reason or None,
            "extra": self.extra or None,
            "step": self.step,
        }
        return {name: value for name, value in values.items() if value is not None}

    def prompt_digest(self) -> bytes:
        """16 bytes that differ when the prompts of two rollouts differ."""
        ids = None if self.prompt_ids is None else self.prompt_ids.tolist()
        return hashlib.sha256(json.dumps([self.prompt, ids], sort_keys=True).encode()).digest()[:16]


def read_row(row: Any, format: str, where: str, *, vocabulary: int | None = None) -> Rollout:
    """Read the rollout in a row of a file.

    where: names file and row in messages. vocabulary: size of the model's vocabulary, if known.
    Raises RequestError for a missing field, a wrong type, a reward or log-probability that is not finite, token ids
    out of range, lists whose lengths disagree.
    """
    if not isinstance(row, Mapping):
        raise RequestError(f"{where}: expected an object with the fields of a rollout, found {_kind(row)}")
    check_spelling(row, NAMES[format], where)
    fields = _Fields(row, FORMATS[format], where)
    prompt, prompt_ids = fields.prompt(), fields.ids("prompt_ids", vocabulary)
    if prompt is None and prompt_ids is None:
        raise fields.missing("prompt", "prompt_ids")
    if prompt_ids is not None and not len(prompt_ids):
        raise fields.error("prompt_ids", "is empty, expected at least one token id")
    response, response_ids = fields.text("response"), fields.ids("response_ids", vocabulary)
    if response is None and response_ids is None:
        raise fields.missing("response", "response_ids")
    return Rollout(
        problem_id=fields.problem_id(hashed=prompt if format.startswith("verl") else None),
        prompt=prompt,
        prompt_ids=prompt_ids,
        response=response,
        response_ids=response_ids,
        reward=fields.reward(),
        logprobs=fields.logprobs("logprobs", response_ids),
        reference_logprobs=fields.logprobs("reference_logprobs", response_ids),
        source=fields.text("source") or "",
        ground_truth=fields.ground_truth(),
        tags=fields.tags(),
        finish_reason=fields.text("finish_reason") or "",
        extra=fields.extra(),
        step=fields.step(),
    )


def detect_format(row: Any) -> str:
    """The format that matches the fields of a file's first row; "rollouts" if no other format matches."""
    if isinstance(row, Mapping):
        if "input" in row and "output" in row:
            return "verl"
        if "group_id" in row:
            return "gradalign"
    return "rollouts"


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
        return RequestError(f"{self.where}: missing field {listed} (found: {', '.join(self.row) or 'nothing'})")

    def problem_id(self, hashed: Prompt | None) -> str:
        _, value = self.get("problem_id")
        if value is None and isinstance(hashed, str):
            return text_id(hashed)
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

    def logprobs(self, part: str, response_ids: np.ndarray | None) -> np.ndarray | None:
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
        if isinstance(value, list) and not set(map(type, value)) <= {int, float}:
            j = next(j for j, item in enumerate(value) if type(item) not in (int, float))
            raise self.error(part, f"entry {j} is {_kind(value[j])}, expected a number")
        try:
            numbers = np.asarray(value, dtype=np.float64)
        except OverflowError:  # an integer beyond any float
            numbers = np.asarray([_float(item) for item in value])
        wrong = np.flatnonzero(~np.isfinite(numbers) | (numbers > LOGPROB_SLACK))
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


def _shortest_floats(values: np.ndarray) -> list[float]:
    """float32 values as Python floats, each with the fewest digits that give the same float32 again."""
    return [float(str(value)) for value in np.asarray(values, dtype=np.float32)]
