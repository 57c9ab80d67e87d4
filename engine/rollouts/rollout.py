"""The Rollout value, and the conversion of a row of each file format to it.

A format is only a table of field names (`FORMATS`): it maps each part of a rollout to fields of a row. So rows of all
formats get the same checks with the same messages. They name the file, the row and the field as spelled in the file.

Only our own format says which tokens the policy wrote. The others hold one text per response: rows that show several
turns or outputs are refused, or counted for a warning where only the text hints at them (`Rollout.hints_at_turns`).
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.engine.rollouts.digits import shortest
from gradstore.engine.rollouts.templates import Prompt
from gradstore.errors import RequestError, near_miss
from gradstore.keepable import check_keepable, parsed, parsed_field
from gradstore.reading.columns import check_spelling

_OWN = (
    "problem_id", "prompt", "prompt_ids", "response", "response_ids", "response_mask", "rollout", "reward", "logprobs",
    "reference_logprobs", "source", "ground_truth", "tags", "finish_reason", "extra", "step",
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
        "key": ("uid",),
    },
    "gradalign": {
        "problem_id": ("group_id",),
        "prompt": ("prompt",),
        "response": ("response",),
        "reward": ("passed", "is_correct"),
        "ground_truth": ("expected_answer",),
        "source": ("data_source",),
    },
    "trl": {
        "problem_id": ("problem_id",),
        "prompt": ("prompt",),
        "response": ("completion",),
        "reward": (),
        "advantage": ("advantage",),
        "step": ("step",),
    },
}
"""Field names per format and part of a rollout; the first field whose value is not null is used. TRL names its columns
of rewards as the reward functions are: `trl:NAME` or `trl:NAME+NAME` is the format with these, summed."""
FORMATS["verl-validation"] = FORMATS["verl"]
COLUMNS = sorted({name.split(".")[0] for names in FORMATS.values() for alias in names.values() for name in alias})
"""Every field of a row that any format reads."""

TRL = "trl"
_BESIDE = ("image", "images")
"""Columns of TRL's dumps that are neither read nor rewards."""
_OUTPUT = re.compile(r".+_\d+_(\d+)")
"""Key of an output in verl's dumps: prompt, rollout, number of the output."""
_TURNS = ("<tool_response>", "\nassistant\n", "\nuser\n", "<|im_start|>", "<|start_header_id|>", "[TOOL_RESULTS]")
"""Texts that chat templates put between turns."""
STOPPED, OVERLONG = "reward_stopped", "reward_overlong"
"""Fields of a rollout's extra that are no part of the problem: why its response was not graded, and the penalty for its
length that its reward includes (trainer/sampling/overlong.py)."""
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
    response_mask: np.ndarray | None = None
    """Which response ids the policy wrote, bool [tokens] (the others are of tools, users or the environment); None: it
    wrote all."""
    rollout: str | None = None
    """Name of the rollout that this is an output of, where rollouts have several; its outputs share a reward."""
    logprobs: np.ndarray | None = None
    """Log-probability of each response id under the policy that sampled it, at temperature 1, float32 [tokens]; nan
    where the policy did not write and nothing was recorded."""
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
            "response_mask": None if self.response_mask is None else self.response_mask.astype(np.int64).tolist(),
            "rollout": self.rollout,
            "reward": float(self.reward),
            "logprobs": _shortest_floats(self.logprobs, self.response_mask),
            "reference_logprobs": _shortest_floats(self.reference_logprobs, self.response_mask),
            "source": self.source or None,
            "ground_truth": self.ground_truth or None,
            "tags": self.tags or None,
            "finish_reason": self.finish_reason or None,
            "extra": self.extra or None,
            "step": self.step,
        }
        return {name: value for name, value in values.items() if value is not None}

    @property
    def hints_at_turns(self) -> bool:
        """Whether the text of a response without token ids has what stands between turns of a conversation."""
        text = self.response if self.response_ids is None else None
        return text is not None and any(mark in text for mark in _TURNS)

    def prompt_digest(self) -> bytes:
        """16 bytes that differ when the prompts of two rollouts differ."""
        ids = None if self.prompt_ids is None else self.prompt_ids.tolist()
        return hashlib.sha256(json.dumps([self.prompt, ids], sort_keys=True).encode()).digest()[:16]


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


def names_of(format: str) -> dict[str, tuple[str, ...]]:
    """The table of a format: of FORMATS, or `trl:` and its columns of rewards."""
    base, _, rewards = format.partition(":")
    return FORMATS[base] | ({"reward": tuple(rewards.split("+"))} if rewards else {})


@lru_cache(maxsize=64)
def names_in(format: str) -> tuple[str, ...]:
    """Fields of a row that a format reads."""
    return tuple(dict.fromkeys(name.split(".")[0] for aliases in names_of(format).values() for name in aliases))


def detect_format(row: Any) -> str:
    """The format that matches the fields of a file's first row; "rollouts" if no other format matches."""
    if isinstance(row, Mapping):
        if "input" in row and "output" in row:
            return "verl"
        if "group_id" in row:
            return "gradalign"
        if "completion" in row and "advantage" in row:
            return TRL
    return "rollouts"


def with_rewards(format: str, columns: Sequence[str], path: Path) -> str:
    """The format `trl` with the one column of the file that can be rewards; other formats as they are.

    columns: all columns of the file. RequestError if no column can be, or several.
    """
    if format != TRL:
        return format
    found = [name for name in columns if name not in (*names_in(TRL), *_BESIDE)]
    if len(found) == 1:
        return f"{TRL}:{found[0]}"
    told = (
        f"columns {', '.join(found)} may be: choose, as in trl:{'+'.join(found[:2])}" if found else "no column can be"
    )
    raise RequestError(f"{path}: TRL names rewards by their functions; {told}")


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


def _shortest_floats(values: np.ndarray | None, written: np.ndarray | None) -> list[float | None] | None:
    """float32 values as Python floats, each with the fewest digits that give the same float32 again; None where the
    policy did not write and the value is not finite, which JSON cannot hold."""
    if values is None:
        return None
    found: list[float | None] = shortest(values).tolist()
    for j in [] if written is None else np.flatnonzero(~written & ~np.isfinite(values)).tolist():
        found[j] = None
    return found
