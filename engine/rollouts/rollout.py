"""The Rollout value: one sampled response of one problem."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradstore.engine.rollouts.digits import shortest
from gradstore.engine.rollouts.templates import Prompt

_TURNS = ("<tool_response>", "\nassistant\n", "\nuser\n", "<|im_start|>", "<|start_header_id|>", "[TOOL_RESULTS]")
"""Texts that chat templates put between turns."""
STOPPED, OVERLONG = "reward_stopped", "reward_overlong"
"""Fields of a rollout's extra that are no part of the problem: why its response was not graded, and the penalty for its
length that its reward includes (trainer/sampling/overlong.py)."""


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


def _shortest_floats(values: np.ndarray | None, written: np.ndarray | None) -> list[float | None] | None:
    """float32 values as Python floats, each with the fewest digits that give the same float32 again; None where the
    policy did not write and the value is not finite, which JSON cannot hold."""
    if values is None:
        return None
    found: list[float | None] = shortest(values).tolist()
    for j in [] if written is None else np.flatnonzero(~written & ~np.isfinite(values)).tolist():
        found[j] = None
    return found
