"""Sequences packed into padded micro-batches under a token budget; prompts are shared if that saves enough tokens.

The unit is the rollout, not the problem: a group larger than the budget is spread over several micro-batches, and its
problem's sketch is their sum. A micro-batch is a grid of continuations: per rollout, the tokens that predict its
response. Unshared, a continuation is the whole sequence without its last token. Shared, the prompts without their last
tokens form a separate grid, run once, and a continuation begins with its prompt's last token. Padding is on the
right, where a causal model cannot see it, so a sequence's gradient does not depend on its neighbours.

Dimension letters: B sequences, Q prompts of the micro-batch, S prompt tokens, T tokens of a continuation,
N response tokens of the longest response, P problems, R responses of a problem.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from gradstore.engine.gradients.objectives import (
    Objective,
    kl_scales,
    likelihood_weights,
    rollout_weights,
    weight_rounding,
)
from gradstore.engine.gradients.sharding import largest
from gradstore.engine.rollouts.group import Group

_WIDTH = 8
"""Grid widths are multiples of this many tokens: attention to 191 tokens takes an eighth longer than to 192."""


@dataclass(frozen=True, slots=True)
class WeightedSequence:
    """One rollout with its weights, in a window of groups."""

    problem: int
    """Position of its group in the window."""
    index: int
    """Position of the response in its group."""
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    weight: float
    """Weight in the objective of each response token that the policy wrote."""
    behaviour: np.ndarray | None
    """The behaviour policy's log-probabilities, float32 [response tokens]."""
    kl_scale: float = 0.0
    """Factor of the KL term of each response token that the policy wrote."""
    reference: np.ndarray | None = None
    """The reference policy's log-probabilities, float32 [response tokens]; needed if there is a KL term."""
    written: np.ndarray | None = None
    """Whether the policy wrote each response token, bool [response tokens]; None: it wrote all."""
    prompt: int = 0
    """Number of its prompt among the different prompts of its group."""

    @property
    def prompt_key(self) -> tuple[int, int]:
        """Sequences with equal keys have the same problem and the same prompt."""
        return self.problem, self.prompt

    def n_tokens(self, shared: bool) -> int:
        """Tokens of the continuation."""
        return len(self.response_ids) + (0 if shared else len(self.prompt_ids) - 1)


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a shared micro-batch, without their last tokens."""

    token_ids_QS: Tensor
    length_Q: Tensor
    problem_Q: Tensor
    prompt_B: Tensor
    """Row of the prompt that each continuation follows."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Tensors of one forward and backward pass."""

    token_ids_BT: Tensor
    problem_B: Tensor
    """Problem of each continuation, as its position in the window."""
    rollout_B: Tensor
    """Rollout of each continuation, as its position among the packed rollouts."""
    first_B: Tensor
    """Position in the continuation that predicts the first response token; the other tokens follow one by one."""
    targets_BN: Tensor
    weights_BN: Tensor
    written_BN: Tensor
    """True at the tokens that the policy wrote; the weights of others, and of padding, are zero."""
    behaviour_BN: Tensor | None
    """None if a rollout has no recorded log-probabilities."""
    prompts: Prompts | None
    kl_scales_BN: Tensor | None = None
    """None without a KL term."""
    reference_BN: Tensor | None = None

    @property
    def n_tokens(self) -> int:
        """Computed tokens, padding included."""
        return self.token_ids_BT.numel() + (0 if self.prompts is None else self.prompts.token_ids_QS.numel())

    def to(self, device: torch.device) -> "MicroBatch":
        """The micro-batch, moved to a device."""
        return replace(
            self,
            **_moved(self, device),
            prompts=None if self.prompts is None else replace(self.prompts, **_moved(self.prompts, device)),
        )


def rollouts_of(
    groups: Sequence[Group],
    objective: Objective,
    factors_P: Sequence[float] | None = None,
    rollout_weights_PG: Sequence[np.ndarray] | None = None,
) -> list[WeightedSequence]:
    """The responses of the groups with nonzero weight; the others add nothing to any gradient.

    A repeated response is run once with the sum of its weights, because the gradient is linear in them; not if
    importance ratios multiply each weight. Weights that are rounding error become zero, and a group whose repeated
    responses cancel is not run. factors_P: factor of each group's gradient, 0 or more. rollout_weights_PG: factor of
    each rollout's advantage, 0 or more, float64 [G] for each group; the KL term does not have it.
    """
    rollouts = []
    for problem, group in enumerate(groups):
        lengths_R = group.n_written
        if group.solution:
            total_R, scales_R = likelihood_weights(lengths_R), np.zeros(len(lengths_R))
            slack_R = scales_R
        else:
            total_R = rollout_weights(group.rewards, lengths_R, objective, group.rollout_of)
            scales_R = kl_scales(group.rewards, lengths_R, objective)
            slack_R = weight_rounding(group.rewards, lengths_R, objective, group.rollout_of)
        if rollout_weights_PG is not None:
            factor_R = rollout_weights_PG[problem][group.rollouts]
            total_R, slack_R = total_R * factor_R, slack_R * factor_R
        prompt_R = prompt_numbers(group)
        merged_R = _merged(group, prompt_R, total_R, slack_R, objective)
        if not objective.importance or not merged_R.any():
            total_R = merged_R
        if factors_P is not None:
            total_R, scales_R = total_R * factors_P[problem], scales_R * factors_P[problem]
        rollouts += [
            _sequence(group, problem, j, prompt_R[j], float(total_R[j]), float(scales_R[j]))
            for j in np.flatnonzero((total_R != 0) | (scales_R != 0)).tolist()
        ]
    return rollouts


def _sequence(
    group: Group, problem: int, j: int, prompt: int, weight: float, kl_scale: float = 0.0
) -> WeightedSequence:
    return WeightedSequence(
        problem,
        j,
        group.prompt_of(j),
        group.responses[j],
        weight,
        None if group.logprobs is None else group.logprobs[j],
        kl_scale,
        None if group.reference_logprobs is None else group.reference_logprobs[j],
        None if group.masks is None else group.masks[j],
        prompt,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Apart:
    """Responses of groups, each a problem of its own: gradients of the single responses."""

    sequences: list[WeightedSequence]
    """What is run: a problem for each distinct response of a group whose weight is not zero."""
    groups: list[int]
    """Group of each sequence."""
    sequence_PR: list[np.ndarray]
    """Sequence of each response, int64 [R] for each group; -1 if its weight is zero."""
    factor_PR: list[np.ndarray]
    """A response's gradient is its sequence's times this, float64 [R]; 0 if its weight is zero."""


def apart(groups: Sequence[Group], objective: Objective) -> Apart:
    """The responses of the groups as problems of their own, with the weights that they have in their group's objective.

    The parts of a group's responses add up to its gradient. objective: without importance ratios and KL term, whose
    token weights no single factor turns into those of an equal response.
    """
    found = Apart([], [], [], [])
    for number, group in enumerate(groups):
        total_R = rollout_weights(group.rewards, group.n_written, objective, group.rollout_of)
        prompt_R = prompt_numbers(group)
        sequence_R, factor_R = np.full(len(total_R), -1), np.zeros(len(total_R))
        first: dict[tuple[int, bytes, bytes], int] = {}
        for j in np.flatnonzero(total_R).tolist():
            mask = b"" if group.masks is None else group.masks[j].tobytes()
            original = first.setdefault((prompt_R[j], group.responses[j].tobytes(), mask), j)
            if original == j:
                sequence_R[j] = len(found.sequences)
                weight = float(total_R[j])
                found.sequences.append(_sequence(group, len(found.sequences), j, prompt_R[j], weight))
                found.groups.append(number)
            sequence_R[j], factor_R[j] = sequence_R[original], total_R[j] / total_R[original]
        found.sequence_PR.append(sequence_R)
        found.factor_PR.append(factor_R)
    return found


def prompt_numbers(group: Group) -> list[int]:
    """Number of each response's prompt among the group's different prompts, in order of first appearance."""
    if group.prompts is None:
        return [0] * len(group.responses)
    first: dict[bytes, int] = {}
    return [first.setdefault(prompt.tobytes(), len(first)) for prompt in group.prompts]


def _merged(
    group: Group, prompt_R: list[int], total_R: np.ndarray, slack_R: np.ndarray, objective: Objective
) -> np.ndarray:
    """The weights, summed over equal responses into the first of them; zero if the sum is rounding error.

    prompt_R: as in `prompt_numbers`. total_R, slack_R: the weights and their rounding errors. Responses are equal if
    their prompts, tokens and masks are equal and, with importance ratios, the behaviour log-probabilities of the
    policy's tokens too. If the objective depends on a weight's sign, only weights of the same sign are summed.
    """
    sums_R, slacks_R = total_R.copy(), slack_R.copy()
    signs_R = objective.sign_dependent & (total_R > 0)
    first: dict[tuple[int, bytes, bytes, bytes, bool], int] = {}
    for j, response in enumerate(group.responses):
        recorded = group.logprobs if objective.importance else None
        behaviour = b"" if recorded is None else group.written(j, recorded[j]).tobytes()
        mask = b"" if group.masks is None else group.masks[j].tobytes()
        original = first.setdefault((prompt_R[j], response.tobytes(), mask, behaviour, bool(signs_R[j])), j)
        if original != j:
            sums_R[original] += sums_R[j]
            slacks_R[original] += slacks_R[j]
            sums_R[j] = 0.0
    return np.where(np.abs(sums_R) <= slacks_R, 0.0, sums_R)


def pays_to_share(rollouts: Sequence[WeightedSequence], saving: float = 0.15) -> bool:
    """Whether computing each prompt once saves at least this share of the tokens."""
    prompts = {rollout.prompt_key: len(rollout.prompt_ids) - 1 for rollout in rollouts}
    unshared = sum(rollout.n_tokens(shared=False) for rollout in rollouts)
    shared = sum(rollout.n_tokens(shared=True) for rollout in rollouts) + sum(prompts.values())
    return min(prompts.values(), default=0) > 0 and shared < (1 - saving) * unshared


def pack(rollouts: Sequence[WeightedSequence], token_budget: int, shared: bool) -> Iterator[MicroBatch]:
    """Micro-batches of similar lengths, at most token_budget tokens each with padding (or one rollout).

    Unshared, rollouts are sorted by length. Shared, prompts are sorted by their lengths and longest responses, and the
    rollouts of a prompt stay together. If they exceed the budget, several micro-batches run them, with the prompt
    in each.
    """
    longest: dict[tuple[int, int], int] = {}
    count: dict[tuple[int, int], int] = {}
    for rollout in rollouts:
        longest[rollout.prompt_key] = max(longest.get(rollout.prompt_key, 0), len(rollout.response_ids))
        count[rollout.prompt_key] = count.get(rollout.prompt_key, 0) + 1

    def order(item: tuple[int, WeightedSequence]) -> tuple:
        number, rollout = item
        if shared:
            key = rollout.prompt_key
            return -len(rollout.prompt_ids), -longest[key], key, -len(rollout.response_ids)
        return -rollout.n_tokens(shared=False), number

    batch: list[tuple[int, WeightedSequence]] = []
    width = prompt_width = 0
    prompts: set[tuple[int, int]] = set()
    for item in sorted(enumerate(rollouts), key=order):
        rollout = item[1]
        own, own_prompt = (
            padded_width(rollout.n_tokens(shared)),
            padded_width(len(rollout.prompt_ids) - 1) if shared else 0,
        )
        wider, prompt_wider = max(width, own), max(prompt_width, own_prompt)
        n_prompts = len(prompts | {rollout.prompt_key})
        n_coming = 1
        if shared and rollout.prompt_key not in prompts:
            n_all = count[rollout.prompt_key]
            fits_alone = own * n_all + own_prompt <= token_budget
            n_coming = n_all if fits_alone else 1  # kept whole if possible, so that its prompt is run once
        if batch and wider * (len(batch) + n_coming) + prompt_wider * n_prompts > token_budget:
            yield _collate(batch, shared)
            batch, prompts = [], set()
            wider, prompt_wider = own, own_prompt
        batch.append(item)
        prompts.add(rollout.prompt_key)
        width, prompt_width = wider, prompt_wider
    if batch:
        yield _collate(batch, shared)


def _collate(batch: Sequence[tuple[int, WeightedSequence]], shared: bool) -> MicroBatch:
    rollouts = [rollout for _, rollout in batch]
    starts = [len(rollout.prompt_ids) - 1 if shared else 0 for rollout in rollouts]
    continuations = [
        np.concatenate([rollout.prompt_ids[start:], rollout.response_ids[:-1]])
        for rollout, start in zip(rollouts, starts, strict=True)
    ]
    lengths = np.array([len(rollout.response_ids) for rollout in rollouts])
    written_BN = np.arange(padded_width(lengths.max())) < lengths[:, None]
    for row_N, rollout in zip(written_BN, rollouts, strict=True):
        if rollout.written is not None:
            row_N[: len(rollout.written)] = rollout.written
    weights_BN = written_BN * np.array([rollout.weight for rollout in rollouts])[:, None]
    scales_BN = written_BN * np.array([rollout.kl_scale for rollout in rollouts])[:, None]
    behaviours = [rollout.behaviour for rollout in rollouts]
    references_BN = _at_written([rollout.reference if rollout.kl_scale else None for rollout in rollouts], written_BN)
    return MicroBatch(
        torch.from_numpy(_padded(continuations)),
        torch.tensor([rollout.problem for rollout in rollouts]),
        torch.tensor([number for number, _ in batch]),
        torch.tensor([len(rollout.prompt_ids) - 1 - start for rollout, start in zip(rollouts, starts, strict=True)]),
        torch.from_numpy(_padded([rollout.response_ids for rollout in rollouts])),
        torch.from_numpy(weights_BN.astype(np.float32)),
        torch.from_numpy(written_BN),
        None if any(row is None for row in behaviours) else _at_written(behaviours, written_BN),
        _prompts(rollouts) if shared else None,
        None if references_BN is None else torch.from_numpy(scales_BN.astype(np.float32)),
        references_BN,
    )


def _at_written(rows: Sequence[np.ndarray | None], written_BN: np.ndarray) -> Tensor | None:
    """Log-probabilities as float32 [B, N], zero where the policy did not write: what was recorded there may be nan.

    None if no row has any.
    """
    if all(row is None for row in rows):
        return None
    grid_BN: np.ndarray = np.zeros(written_BN.shape, np.float32)
    for i, row in enumerate(rows):
        if row is not None:
            grid_BN[i, : len(row)] = row
    grid_BN[~written_BN] = 0.0
    return torch.from_numpy(grid_BN)


def _prompts(rollouts: Sequence[WeightedSequence]) -> Prompts:
    first = {rollout.prompt_key: rollout for rollout in reversed(rollouts)}
    keys = list(dict.fromkeys(rollout.prompt_key for rollout in rollouts))
    place = {key: i for i, key in enumerate(keys)}
    return Prompts(
        torch.from_numpy(_padded([first[key].prompt_ids[:-1] for key in keys])),
        torch.tensor([len(first[key].prompt_ids) - 1 for key in keys]),
        torch.tensor([problem for problem, _ in keys]),
        torch.tensor([place[rollout.prompt_key] for rollout in rollouts]),
    )


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Token ids of different lengths as one array, with zeros on the right."""
    grid: np.ndarray = np.zeros((len(rows), padded_width(max(len(row) for row in rows))), np.int64)
    for i, row in enumerate(rows):
        grid[i, : len(row)] = row
    return grid


def padded_width(n_tokens: int) -> int:
    """Width of a grid whose longest row has n_tokens."""
    return -(-n_tokens // _WIDTH) * _WIDTH


def _moved(batch: MicroBatch | Prompts, device: torch.device) -> dict[str, Tensor]:
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return {name: value.to(device, non_blocking=True) for name, value in fields.items() if isinstance(value, Tensor)}


def in_step(model: nn.Module, batches: list[MicroBatch], shared: bool) -> list[MicroBatch]:
    """The batches, extended to the same number on every rank by batches of one token with weight zero."""
    token = np.zeros(1, np.int64)
    idle = WeightedSequence(0, 0, np.zeros(2, np.int64), token, 0.0, None)
    missing = largest(model, len(batches)) - len(batches)
    return batches + [batch for _ in range(missing) for batch in pack([idle], 1, shared)]
