"""Formats of rollout files: a format is only a table of field names, which maps each part of a rollout to fields."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from gradstore.errors import RequestError

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
