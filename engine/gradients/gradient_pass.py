"""One forward and backward of groups of rollouts; an observer sees each layer's inputs and output gradients.

This module holds what all gradient measurements share: choice of layers, token weights, micro-batches, checks. The
observer decides what to keep of the gradients: a projection, dot products, or the gradients themselves.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from gradstore.engine.gradients.adapters import check_adapters
from gradstore.engine.gradients.hooks import Observer, PausableObserver, observed
from gradstore.engine.gradients.layers import Layer, find_layers, output_layer
from gradstore.engine.gradients.microbatch import (
    Apart,
    WeightedSequence,
    apart,
    in_step,
    pack,
    pays_to_share,
    rollouts_of,
)
from gradstore.engine.gradients.objectives import Objective, Ratio
from gradstore.engine.gradients.packed import check_packed
from gradstore.engine.gradients.passes import OnWeights, PolicyForward
from gradstore.engine.gradients.retrying import TokenBudget, noticing
from gradstore.engine.gradients.settings import GradientSpec
from gradstore.engine.gradients.sharding import gathered, is_sharded, largest, reshard
from gradstore.engine.rollouts.group import Group
from gradstore.errors import RequestError


class GradientPass:
    """Runs groups through the model in its current state, and leaves the model unchanged."""

    def __init__(self, model: nn.Module, spec: GradientSpec) -> None:
        self.model = model
        self.spec = spec
        check_adapters(model)
        self.policy = PolicyForward(model)
        self.budget = TokenBudget(model, spec.token_budget)
        self.layers = (
            [output_layer(model)]
            if spec.head_only
            else find_layers(model, spec.modules, embeddings=spec.embeddings, vectors=spec.vectors)
        )
        if not (spec.head_only or spec.modules):
            check_packed(model, self.layers)
        self.device = next(model.parameters()).device

    def of_layers(self, layers: Sequence[Layer]) -> "GradientPass":
        """The same pass, observing these layers alone."""
        other = copy(self)
        other.layers = list(layers)
        return other

    def under(self, objective: Objective) -> "GradientPass":
        """The same pass under another objective."""
        other = copy(self)
        other.spec = replace(self.spec, objective=objective)
        return other

    @property
    def context(self) -> int | None:
        """Longest sequence the model accepts, in tokens; None if its configuration does not say."""
        config = getattr(self.model, "config", None)
        return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)

    def check(self, group: Group) -> None:
        """Raise RequestError for a sequence longer than the model's context, a token id outside the vocabulary, or
        missing log-probabilities (of the behaviour or reference policy) that the objective needs."""
        name = f"problem {group.problem_id!r}"
        if self.context and group.n_tokens > self.context:
            raise RequestError(
                f"{name}: prompt and longest response have {group.n_tokens} tokens, "
                f"the model's context is {self.context}"
            )
        n_vocabulary = self.policy.n_vocabulary
        largest = max(
            int(ids.max()) for ids in (group.prompt_ids, *(group.prompts or ()), *group.responses) if len(ids)
        )
        if largest >= n_vocabulary:
            raise RequestError(f"{name}: token id {largest} is outside the model's vocabulary of {n_vocabulary}")
        if group.solution:
            return
        if self.spec.objective.importance and group.logprobs is None:
            raise RequestError(f"{name}: has no log-probabilities, which an importance-weighted objective needs")
        beta = self.spec.objective.kl_beta
        if beta and group.has_signal and group.reference_logprobs is None:
            raise RequestError(
                f"{name}: has no reference log-probabilities, which kl_beta = {beta:g} needs: give a reference policy "
                "(`collect --reference`, engine.Reference), or rollouts with `reference_logprobs`"
            )

    def run(
        self,
        groups: Sequence[Group],
        observer: Observer,
        on_weights: OnWeights | None = None,
        *,
        inputs_kept: bool = False,
    ) -> int:
        """Back-propagate each group's objective; the observer's problems are positions in `groups`.

        Returns the tokens that went through the model, without padding and repeated responses. Groups whose rewards
        are all equal are not run. Under FSDP2 each rank runs its own groups through the whole model, all ranks must
        call this together, and no gradient is reduced.
        inputs_kept: the observer keeps the layers' whole inputs, so micro-batches are smaller unless their size is
        given. After an out-of-memory error the observer is reset and all groups run again in smaller micro-batches;
        on_weights is called at the end, once per chunk of sequences. RequestError as in `check`, and for a response
        that does not fit into memory.
        """
        for group in groups:
            self.check(group)
        return self._run(rollouts_of(groups, self.spec.objective), groups, observer, on_weights, inputs_kept)

    def run_apart(self, groups: Sequence[Group], observer_of: Callable[[int], Observer]) -> tuple[Apart, int]:
        """Back-propagate each rollout for itself, its prompt too; returns what was run, and its tokens.

        observer_of: makes the observer from the number of sequences; its problems are `Apart.sequences`. A prompt's
        keys and values get the gradients of all its rollouts at once, so prompts are not shared. Otherwise as `run`.
        RequestError for an objective with importance ratios or a KL term.
        """
        rule = self.spec.objective
        if rule.importance or rule.kl_beta:
            raise RequestError("gradients of single rollouts are of objectives without importance ratios and KL term")
        for group in groups:
            self.check(group)
        found = apart(groups, rule)
        own = [groups[number] for number in found.groups]
        return found, self._run(found.sequences, own, observer_of(len(own)), None, False)

    def _run(
        self,
        rollouts: list[WeightedSequence],
        groups: Sequence[Group],
        observer: Observer,
        on_weights: OnWeights | None,
        inputs_kept: bool,
    ) -> int:
        """`run` for these rollouts. groups: those of the rollouts' problems."""
        self.policy.verify(rollouts)
        muted = PausableObserver(observer)
        reshard(self.model)
        with (
            observed(self.model, self.layers, muted) as observation,
            gathered(self.model) as whole,
            nullcontext() if whole else self.policy.by_layer(),
        ):
            pays = pays_to_share(rollouts)
            if is_sharded(self.model) and not whole:  # all ranks must gather the layers equally often
                pays = not largest(self.model, int(bool(rollouts) and not pays))
            shared = self.policy.shares_prompts and self.spec.share_prompts and pays
            told: list[tuple[Tensor, Tensor, Tensor]] = []

            def attempt(tokens: int) -> None:
                told.clear()
                observer.reset()
                batches = list(pack(rollouts, tokens, shared))
                for number, batch in enumerate(in_step(self.model, batches, shared)):
                    muted.on = number < len(batches)
                    tell = _kept_in(told) if on_weights and muted.on else None
                    with noticing(batch):
                        self.policy.backward(batch.to(self.device), self.spec.objective, observation, tell)

            self.budget.fitting(attempt, groups, inputs_kept=inputs_kept)
        reshard(self.model)
        if on_weights:
            for weights in told:
                on_weights(*weights)
        return sum(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts)


def _kept_in(told: list[tuple[Tensor, Tensor, Tensor]]) -> OnWeights:
    return lambda problem_B, before_BN, after_BN: told.append((problem_B, before_BN, after_BN))


class EffectiveSampleSize:
    """Effective sample size (Kish) of a group's importance-weighted rollouts: G (sum rho)^2 / (n sum rho^2).

    rho: importance ratio of each of the n tokens of the policy with nonzero weight, as the objective's rule bounds it,
    0 where that is flat. If ratios are of whole responses, each response counts once. The size is G for on-policy
    rollouts, and less if a few ratios dominate or some have no gradient.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device, ratio: Ratio = "token") -> None:
        self._n_rollouts_P = np.array([group.n_rollouts for group in groups])
        self._sums_P3 = torch.zeros(len(groups), 3, dtype=torch.float64, device=device)
        self._by_token = ratio == "token"

    def __call__(self, problem_B: Tensor, before_BN: Tensor, after_BN: Tensor) -> None:
        """Adds one micro-batch: token weights before and after importance ratios."""
        weighted_BN = before_BN != 0
        ratio_BN = torch.where(weighted_BN, after_BN.double() / torch.where(weighted_BN, before_BN, 1.0), 0.0)
        if not self._by_token:  # the same at all tokens with a weight
            weighted_BN, ratio_BN = weighted_BN.any(1, keepdim=True), ratio_BN.amax(1, keepdim=True)
        sums_B3 = torch.stack([weighted_BN.sum(1).double(), ratio_BN.sum(1), ratio_BN.square().sum(1)], 1)
        self._sums_P3.index_add_(0, problem_B, sums_B3)

    def of_groups(self) -> np.ndarray:
        """Effective sample size per group, float32 [P]; 0 if no token has weight or all are clipped."""
        n_P, sum_P, squares_P = self._sums_P3.cpu().numpy().T
        lengths_P = n_P * squares_P
        ess_P = np.divide(sum_P**2, lengths_P, out=np.zeros_like(sum_P), where=lengths_P > 0)
        return (self._n_rollouts_P * ess_P).astype(np.float32)
