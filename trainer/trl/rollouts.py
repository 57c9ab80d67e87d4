"""TRL's batches as groups of rollouts.

Masks (`tool_mask`, a rollout function's `env_mask`) become `Group.masks`: the tokens that the policy wrote. A response
without any token that is trained on, such as a truncated one under `mask_truncated_completions`, becomes an empty one:
it counts in the baseline alone. A rollout that no reward function scored has no part in its group, as in TRL.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gradstore.engine.rollouts.group import Group


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """One rollout of a problem, as plain values."""

    problem_id: str
    prompt_ids: np.ndarray
    """int64 [prompt tokens]."""
    response_ids: np.ndarray
    """int64 [response tokens], with the tokens of tools."""
    mask: np.ndarray | None
    """Tokens that the policy wrote, bool [response tokens]; None: all."""
    reward: float
    """NaN if no reward function scored it."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What the reward functions were given, and what they said, of one process's rollouts."""

    completion_ids: list[list[int]]
    rewards: list[float]


def sampled_of(ids: Sequence[str], output: dict[str, Any], scored: Scored) -> list[Sampled]:
    """Rollouts of TRL's batch, one per row.

    ids: problem of each row. output: tensors of `_generate_and_score_completions`, before they are shuffled.
    """
    prompt_BT, kept_BT = output["prompt_ids"].cpu(), output["prompt_mask"].cpu().bool()
    trained_BT = output["completion_mask"].cpu().bool()
    tool_BT = output["tool_mask"].cpu().bool() if "tool_mask" in output else None
    found = []
    for row, (problem_id, response) in enumerate(zip(ids, scored.completion_ids, strict=True)):
        n = len(response)
        if not trained_BT[row].any():
            n = 0
        mask = None if tool_BT is None else tool_BT[row, :n].numpy()
        found.append(
            Sampled(
                problem_id,
                prompt_BT[row][kept_BT[row]].numpy().astype(np.int64),
                np.array(response[:n], dtype=np.int64),
                None if mask is None or mask.all() else mask,
                scored.rewards[row],
            )
        )
    return found


def groups_of(sampled: Sequence[Sampled]) -> list[Group]:
    """One group per problem, in the order of their first rollouts."""
    of: dict[str, list[Sampled]] = {}
    for one in sampled:
        of.setdefault(one.problem_id, []).append(one)
    return [_group(rollouts) for rollouts in of.values()]


def _group(rollouts: list[Sampled]) -> Group:
    kept = [one for one in rollouts if not math.isnan(one.reward)]
    # Nobody scored any: equal rewards, so that the problem has no signal.
    rewards = [one.reward for one in kept] or [0.0] * len(rollouts)
    kept = kept or rollouts
    masks = None
    if any(one.mask is not None for one in kept):
        masks = [np.ones(len(one.response_ids), dtype=bool) if one.mask is None else one.mask for one in kept]
    return Group(
        kept[0].problem_id,
        kept[0].prompt_ids,
        [one.response_ids for one in kept],
        np.array(rewards, dtype=np.float64),
        masks=masks,
    )


def weighted_rewards(rewards_BF: torch.Tensor, weights_F: torch.Tensor) -> list[float]:
    """Sum of the reward functions' values by their weights, as TRL sums them; NaN where no function gave one."""
    total_B = (rewards_BF * weights_F.to(rewards_BF.device)).nansum(dim=1)
    total_B[rewards_BF.isnan().all(dim=1)] = math.nan
    found: list[float] = total_B.double().cpu().tolist()
    return found
