"""Sequences packed into padded micro-batches under a token budget.

Rollouts are the unit, not problems: a group larger than the budget is spread over several micro-batches and its
problem's sketch is their sum. Padding is on the right, where a causal model cannot see it, so no mask is needed and
a sequence's gradient does not depend on its neighbours.

Dimension letters: B sequences, T tokens, N response tokens of the micro-batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.rollouts.group import Group


@dataclass(frozen=True, slots=True)
class Rollout:
    """One weighted sequence of a window of groups."""

    problem: int
    """Position of its group in the window."""
    token_ids: np.ndarray
    n_prompt: int
    weight: float
    behaviour: np.ndarray | None


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Tensors of one forward and backward pass."""

    token_ids_BT: Tensor
    problem_B: Tensor
    """Which problem of the window each sequence belongs to."""
    rows_N: Tensor
    positions_N: Tensor
    """Where the response tokens are predicted: logits[rows, positions] are theirs."""
    targets_N: Tensor
    weights_N: Tensor
    behaviour_N: Tensor | None

    def to(self, device: torch.device) -> "MicroBatch":
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return MicroBatch(
            move(self.token_ids_BT),
            move(self.problem_B),
            move(self.rows_N),
            move(self.positions_N),
            move(self.targets_N),
            move(self.weights_N),
            None if self.behaviour_N is None else move(self.behaviour_N),
        )


def rollouts_of(groups: Sequence[Group], weights: Sequence[np.ndarray], merge: bool) -> list[Rollout]:
    """The sequences of the groups that carry weight; the others add nothing to any gradient.

    merge: run a response sampled more than once only once, with the sum of its weights, since a gradient is linear in
    them. Not for importance weights, which depend on what the behaviour policy gave each.
    """
    rollouts = []
    for problem, (group, weights_G) in enumerate(zip(groups, weights, strict=True)):
        first: dict[bytes, int] = {}
        total_G = weights_G.copy()
        for j, response in enumerate(group.responses if merge else ()):
            original = first.setdefault(response.tobytes(), j)
            if original != j:
                total_G[original] += total_G[j]
                total_G[j] = 0.0
        rollouts += [
            Rollout(
                problem,
                np.concatenate([group.prompt_ids, group.responses[j]]),
                len(group.prompt_ids),
                float(total_G[j]),
                None if group.logprobs is None else group.logprobs[j],
            )
            for j in np.flatnonzero(total_G).tolist()
        ]
    return rollouts


def pack(rollouts: Sequence[Rollout], token_budget: int) -> Iterator[MicroBatch]:
    """Micro-batches of sequences of like length, at most token_budget tokens each with padding (or one sequence)."""
    by_length = sorted(rollouts, key=lambda rollout: -len(rollout.token_ids))
    start = 0
    while start < len(by_length):
        size = max(1, token_budget // len(by_length[start].token_ids))
        yield _collate(by_length[start : start + size])
        start += size


def _collate(rollouts: Sequence[Rollout]) -> MicroBatch:
    token_ids_BT = np.zeros((len(rollouts), max(len(rollout.token_ids) for rollout in rollouts)), np.int64)
    lengths = []
    for row, rollout in enumerate(rollouts):
        token_ids_BT[row, : len(rollout.token_ids)] = rollout.token_ids
        lengths.append(len(rollout.token_ids) - rollout.n_prompt)
    behaviours = [rollout.behaviour for rollout in rollouts if rollout.behaviour is not None]
    return MicroBatch(
        torch.from_numpy(token_ids_BT),
        torch.tensor([rollout.problem for rollout in rollouts]),
        torch.from_numpy(np.repeat(np.arange(len(rollouts)), lengths)),
        torch.from_numpy(np.concatenate([np.arange(r.n_prompt - 1, len(r.token_ids) - 1) for r in rollouts])),
        torch.from_numpy(np.concatenate([r.token_ids[r.n_prompt :] for r in rollouts])),
        torch.from_numpy(np.repeat([r.weight for r in rollouts], lengths).astype(np.float32)),
        torch.from_numpy(np.concatenate(behaviours).astype(np.float32)) if behaviours else None,
    )
