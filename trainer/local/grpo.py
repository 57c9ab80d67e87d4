"""The policy update: Adam on the engine's objective gradient, averaged over a step's problems.

The update uses the same gradients that the engine sketches, so a problem's alignment predicts the effect of training on
it. A step's gradient is the mean of its problems' gradients as in `engine.validation_gradient`; problems without signal
count as zero. Each prompt is run once for all its rollouts. Equal responses are run once, with the sum of their
weights.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from gradstore.engine.gradients.directions import summed_gradient
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.from_training_pass import SketchesFromTrainingPass
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.errors import RequestError
from gradstore.trainer.local.settings import UpdateSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Dealt:
    """The groups of a step with their weights; None: all 1. Minibatches are consecutive parts of this order."""

    groups: list[Group]
    weights: list[float] | None
    rollout_weights: list[np.ndarray] | None

    @classmethod
    def of(
        cls,
        groups: Sequence[Group],
        seed: int,
        weights: Sequence[float] | None,
        rollout_weights: Sequence[np.ndarray] | None,
    ) -> "_Dealt":
        """Shuffled by `seed`. RequestError for rollout weights that are not one finite number, 0 or more, a rollout."""
        if rollout_weights is not None:
            _check(groups, rollout_weights)
        whole = cls(
            list(groups),
            None if weights is None else list(weights),
            None if rollout_weights is None else list(rollout_weights),
        )
        return whole.taken(np.random.default_rng(seed).permutation(len(groups)).tolist())

    def taken(self, places: Sequence[int]) -> "_Dealt":
        """The groups at these places."""
        return _Dealt(
            [self.groups[i] for i in places],
            None if self.weights is None else [self.weights[i] for i in places],
            None if self.rollout_weights is None else [self.rollout_weights[i] for i in places],
        )


def _check(groups: Sequence[Group], rollout_weights: Sequence[np.ndarray]) -> None:
    if len(rollout_weights) != len(groups):
        raise RequestError(f"rollout weights of {len(rollout_weights)} groups for {len(groups)}")
    for group, own in zip(groups, rollout_weights, strict=True):
        if own.shape != group.rewards.shape or not (np.isfinite(own) & (own >= 0)).all():
            raise RequestError(
                f"problem {group.problem_id!r}: expected {len(group.rewards)} finite rollout weights of 0 or more"
            )


class Learner:
    """A model and its optimizer; trains every parameter that requires a gradient."""

    def __init__(self, model: nn.Module, settings: UpdateSettings) -> None:
        """RequestError when no parameter trains."""
        self.model, self.settings = model, settings
        self.parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if not self.parameters:
            raise RequestError("no parameter of the model trains: set requires_grad on those that do")
        self.lr = settings.rate(adapters=hasattr(model, "peft_config"))
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=self.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True if all(weight.is_cuda for weight in self.parameters.values()) else None,
        )  # on a GPU, the other implementations make a temporary copy of all weights
        self.updates = 0
        self._told = False
        self._pass = GradientPass(model, SketchSpec(objective=settings.rule, token_budget=settings.token_budget))

    def step(
        self,
        groups: Sequence[Group],
        seed: int = 0,
        weights: Sequence[float] | None = None,
        rollout_weights: Sequence[np.ndarray] | None = None,
    ) -> dict[str, float]:
        """Do one training step on a batch of groups; returns its metrics.

        groups: rollouts of the current policy. seed: for splitting the groups into minibatches. weights: factor of each
        group's term in the mean; None: all 1. rollout_weights: factor of each rollout's advantage, float64 [G] for each
        group; None: all 1. A minibatch without signal changes nothing. RequestError for a group that the model cannot
        run, or when the gradient is not finite; that update is then not applied.
        """
        return self._step(_Dealt.of(groups, seed, weights, rollout_weights), None)

    def step_and_sketch(
        self,
        groups: Sequence[Group],
        sketcher: Sketcher,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        rollout_weights: Sequence[np.ndarray] | None = None,
    ) -> tuple[dict[str, float], SketchBatch]:
        """`step`, plus sketches of its problems under the policy before the update, from the update's backward pass.

        Several groups of one problem share one sketch. A separate pass makes the sketches if there are minibatches, and
        for problems that the update's pass cannot sketch (engine/sketches/from_training_pass.py).
        """
        dealt = _Dealt.of(groups, seed, weights, rollout_weights)
        along = SketchesFromTrainingPass(
            sketcher, dealt.groups, self._pass.spec.objective, dealt.weights, dealt.rollout_weights
        )
        if along.n_separate and not self._told:
            self._told = True
            log.info("%d of %d groups are sketched in a pass of their own", along.n_separate, len(groups))
        return self._step(dealt, along), along.batch()

    def _step(self, dealt: "_Dealt", along: SketchesFromTrainingPass | None) -> dict[str, float]:
        groups = dealt.groups
        parts = np.array_split(np.arange(len(groups)), min(self.settings.minibatches, len(groups)))
        norms = [self._update(dealt.taken(part.tolist()), along) for part in parts]
        lengths = np.concatenate([group.n_written for group in groups])
        return {
            "reward": float(np.mean([group.rewards.mean() for group in groups])),
            "with_signal": float(np.mean([group.has_signal for group in groups])),
            "response_tokens": float(np.mean(lengths)),
            "grad_norm": float(np.mean(norms)),
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    def _update(self, dealt: "_Dealt", along: SketchesFromTrainingPass | None) -> float:
        """One optimizer step on the mean of the groups' gradients; returns the gradient norm before clipping."""
        watch = along.watch if along else None
        sums = summed_gradient(self._pass, dealt.groups, watch, dealt.weights, dealt.rollout_weights)
        if not sums:
            return 0.0
        for name, weight in self.parameters.items():
            if name in sums:  # the engine's gradients point uphill, an optimizer steps downhill
                weight.grad = sums[name].mul_(-1 / len(dealt.groups)).to(weight.dtype)
        weights = self.parameters.values()
        norm = float(nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None]))
        if not np.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise RequestError(
                "the gradient of this step is not finite; check the rewards, lower the learning rate or clip"
            )
        if self.settings.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(weights, self.settings.clip_grad, torch.tensor(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.updates + 1) / max(1, self.settings.warmup))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
