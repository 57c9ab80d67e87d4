"""Log-probabilities of responses from forward passes: under the policy, or under a reference for a KL term."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.hooks import evaluating
from gradstore.engine.gradients.microbatch import (
    MicroBatch,
    WeightedSequence,
    in_step,
    pack,
    pays_to_share,
    prompt_numbers,
)
from gradstore.engine.gradients.models import weights_digest
from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.gradients.retrying import noticing
from gradstore.engine.gradients.settings import GradientSpec
from gradstore.engine.gradients.sharding import gather, largest, reshard
from gradstore.engine.rollouts.group import Group

TokenLogprobs = Sequence[Sequence[np.ndarray]]
"""Log-probability of each response token, per group and rollout."""


class Reference:
    """Adds log-probabilities under a reference policy to groups, one at a time or many together (`of`)."""

    def __init__(self, model: nn.Module, *, temperature: float = 1.0, token_budget: int | None = None) -> None:
        """temperature: that of the objective. token_budget: tokens of a micro-batch, padding included; None: as memory
        allows."""
        self.model = model
        self._pass = GradientPass(
            model, GradientSpec(objective=Objective(temperature=temperature), token_budget=token_budget)
        )

    @property
    def digest(self) -> str:
        """Digest of the weights, as in `Objective.reference`."""
        return weights_digest(self.model)

    def __call__(self, group: Group) -> Group:
        """The group with `reference_logprobs`; a group without signal is returned unchanged, as it has no gradient.

        RequestError for a sequence that the reference cannot run (context, vocabulary).
        """
        return self.of([group])[0]

    def of(self, groups: Sequence[Group]) -> list[Group]:
        """The same for several groups at once. Under FSDP2 all ranks call this together, each with its own groups."""
        places = [place for place, group in enumerate(groups) if group.has_signal]
        for place in places:
            self._pass.check(groups[place])
        with evaluating(self.model):
            found = response_logprobs(self._pass, [groups[place] for place in places])
            reshard(self.model)
        filled = list(groups)
        for place, logprobs in zip(places, found, strict=True):
            filled[place] = replace(groups[place], reference_logprobs=logprobs)
        return filled


def response_logprobs(runner: GradientPass, groups: Sequence[Group]) -> list[list[np.ndarray]]:
    """Log-probability of every response token at the objective's temperature, [response tokens] each: float32, or
    float64 of a float64 model.

    A response repeated after the same prompt is run once. The model must be in evaluation mode; under FSDP2 all ranks
    call this together.
    """
    first: list[list[int]] = []
    rollouts: list[WeightedSequence] = []
    for problem, group in enumerate(groups):
        seen: dict[tuple[int, bytes], int] = {}
        first.append([])
        for j, (response, prompt) in enumerate(zip(group.responses, prompt_numbers(group), strict=True)):
            place = seen.setdefault((prompt, response.tobytes()), len(rollouts) if len(response) else -1)
            first[-1].append(place)
            if place == len(rollouts):
                rollouts.append(WeightedSequence(problem, j, group.prompt_of(j), response, 1.0, None, prompt=prompt))
    spec, policy = runner.spec, runner.policy
    policy.verify(rollouts)
    shares = policy.shares_prompts and spec.share_prompts
    # Either all ranks share prompts or none does: running prompts separately is one more forward.
    shared = shares and not largest(runner.model, len(rollouts) > 0 and not pays_to_share(rollouts))

    def attempt(tokens: int) -> tuple[list[MicroBatch], list[Tensor]]:
        batches = list(pack(rollouts, tokens, shared))
        gather(runner.model)
        grids = []
        for batch in in_step(runner.model, batches, shared):
            with noticing(batch):
                grids.append(policy.logprobs(batch.to(runner.device), spec.objective.temperature))
        return batches, grids  # fetched after the last batch: no wait for the GPU in between

    batches, grids = runner.budget.fitting(attempt, groups)
    found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rollouts)
    if grids:
        numbers = torch.cat([grid_BN.flatten() for grid_BN in grids]).cpu().numpy()  # one copy to the host
        parts = np.split(numbers, np.cumsum([grid_BN.numel() for grid_BN in grids])[:-1])
        for batch, grid_BN, part in zip(batches, grids, parts, strict=False):
            for row, number in zip(part.reshape(grid_BN.shape), batch.rollout_B.tolist(), strict=True):
                found[number] = row[: len(rollouts[number].response_ids)]
    empty = np.zeros(0, np.float32)
    return [[found[place] if place >= 0 else empty for place in places] for places in first]
