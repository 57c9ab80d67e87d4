"""The update: gradients of the engine's objective, averaged over a step's problems, into Adam.

What trains the policy is what the engine sketches: the gradient of a step is the mean of its problems' gradients as
`engine.validation_gradient` gives them, those without signal counting as zero, so that a problem's alignment says what
training on it does. Prompts are run once for all their rollouts, and equal responses once with the sum of their
weights.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from gradstore.engine.gradients.directions import summed_gradient
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.objectives import Objective, objective
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.from_training_pass import SketchesFromTrainingPass
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.errors import RequestError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """How a step's rollouts become an update of the weights."""

    lr: float = 1e-6
    """Learning rate."""
    warmup: int = 0
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """Decoupled, as in AdamW; 0 is Adam."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad: float | None = 1.0
    """Largest norm of the gradient; None: as it comes."""
    objective: Objective = field(default_factory=lambda: objective("grpo"))
    minibatches: int = 1
    """Updates a step's problems are dealt to. With more than one the later ones are off-policy: PPO's clipped
    surrogate is used, against the log-probabilities the responses were sampled with."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """Bounds of PPO's ratio, below and above 1; with minibatches > 1 only."""
    token_budget: int | None = None
    """Tokens of a micro-batch, with padding; None: as memory allows (engine/gradients/budget.py)."""

    def __post_init__(self) -> None:
        if not 0 <= self.lr < float("inf"):
            raise RequestError(f"lr is {self.lr}, expected a finite number of 0 or more")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise RequestError(f"clip_grad is {self.clip_grad}, expected a number above 0, or None")
        for name in ("minibatches", "token_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} is {value}, expected 1 or more")


class Learner:
    """A model with its optimizer; every parameter that requires a gradient is trained."""

    def __init__(self, model: nn.Module, settings: UpdateSettings) -> None:
        """RequestError when no parameter trains."""
        self.model, self.settings = model, settings
        self.parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if not self.parameters:
            raise RequestError("no parameter of the model trains: set requires_grad on those that do")
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True if all(weight.is_cuda for weight in self.parameters.values()) else None,
        )  # a GPU's other ways make a copy of all weights in between
        self.updates = 0
        rule = settings.objective
        if settings.minibatches > 1:
            rule = replace(rule, importance=True, clip_low=settings.clip_low, clip_high=settings.clip_high)
        self._told = False
        self._pass = GradientPass(model, SketchSpec(objective=rule, token_budget=settings.token_budget))

    def step(self, groups: Sequence[Group], seed: int = 0, weights: Sequence[float] | None = None) -> dict[str, float]:
        """One training step on a batch of groups; metrics of it. seed: how the minibatches are dealt.

        The rollouts are of the policy as it is. Nothing moves on a minibatch without any signal. weights: what each
        group's part of the mean is multiplied by; None: all count alike. RequestError for a group that the model cannot
        run, or when the gradient is not finite: the policy is then as before it.
        """
        dealt, shares = self._dealt(groups, seed, weights)
        return self._step(dealt, shares, None)

    def step_and_sketch(
        self, groups: Sequence[Group], sketcher: Sketcher, seed: int = 0, weights: Sequence[float] | None = None
    ) -> tuple[dict[str, float], SketchBatch]:
        """The same step, and sketches of its problems by the policy before it, from the backward pass of the update.

        Several groups of a problem have one sketch together. With minibatches, and for problems whose sketch the pass
        does not give (engine/sketches/from_training_pass.py), a pass is run for sketches alone.
        """
        dealt, shares = self._dealt(groups, seed, weights)
        along = SketchesFromTrainingPass(sketcher, dealt, self._pass.spec.objective, shares)
        if along.n_separate and not self._told:
            self._told = True
            log.info("%d of %d groups are sketched in a pass of their own", along.n_separate, len(groups))
        return self._step(dealt, shares, along), along.batch()

    def _dealt(
        self, groups: Sequence[Group], seed: int, weights: Sequence[float] | None
    ) -> tuple[list[Group], list[float] | None]:
        """The groups and their weights in the order in which minibatches are cut from them."""
        order = np.random.default_rng(seed).permutation(len(groups)).tolist()
        return [groups[i] for i in order], None if weights is None else [weights[i] for i in order]

    def _step(
        self, groups: Sequence[Group], shares: Sequence[float] | None, along: SketchesFromTrainingPass | None
    ) -> dict[str, float]:
        parts = np.array_split(np.arange(len(groups)), min(self.settings.minibatches, len(groups)))
        norms = [
            self._update([groups[i] for i in part], None if shares is None else [shares[i] for i in part], along)
            for part in (part.tolist() for part in parts)
        ]
        lengths = [len(response) for group in groups for response in group.responses]
        return {
            "reward": float(np.mean([group.rewards.mean() for group in groups])),
            "with_signal": float(np.mean([group.has_signal for group in groups])),
            "response_tokens": float(np.mean(lengths)),
            "grad_norm": float(np.mean(norms)),
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    def _update(
        self, groups: Sequence[Group], shares: Sequence[float] | None, along: SketchesFromTrainingPass | None
    ) -> float:
        """One optimizer step on the mean of the groups' gradients; its norm before clipping."""
        sums = summed_gradient(self._pass, groups, along.watch if along else None, shares)
        if not sums:
            return 0.0
        for name, weight in self.parameters.items():
            if name in sums:  # the engine's gradients ascend, an optimizer descends
                weight.grad = sums[name].mul_(-1 / len(groups)).to(weight.dtype)
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
            group["lr"] = self.settings.lr * min(1.0, (self.updates + 1) / max(1, self.settings.warmup))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
