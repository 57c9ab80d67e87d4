"""Per-problem sketches of the policy gradient from one forward and one input-gradient backward.

Hooks on the linear layers project what enters a layer (x R) during the forward and what comes back (g L) during the
backward, and add sum_t (g_t L)^T (x_t R) to the sketch of the problem each sequence belongs to. Parameters are
frozen, so no weight gradient is ever formed, and the lowest hooked layer's output is made a leaf, so nothing below it
is back-propagated. Cost per token of a layer I -> O: 4 I O FLOPs plus 2 R (I + O + R), against 6 I O for training.

Dimension letters: P problems, B sequences, T tokens, N response tokens, D sketch dimensions, R rank, I and O a
layer's inputs and outputs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from engine.layers import Layer, adapter_identity, find_layers, model_identity, vocabulary_size
from engine.microbatch import MicroBatch, pack, rollouts_of
from engine.objectives import Objective, importance_weights, objective, rollout_weights
from engine.projection import LayerBasis, basis_hash, random_bases
from engine.rollouts.group import Group
from gradstore.errors import RequestError
from gradstore.state import State


@dataclass(frozen=True, slots=True)
class SketchSpec:
    """How gradients become sketches: everything of it enters the store's fingerprint but the token budget."""

    rank: int = 16
    """Width of each side of a layer's projection; a layer fills at most rank x rank dimensions."""
    seed: int = 0
    """Seed of the random bases."""
    objective: Objective = field(default_factory=lambda: objective("gradalign"))
    modules: tuple[str, ...] | None = None
    """Regular expressions choosing the linear layers; None: LoRA matrices if there are any, else all."""
    token_budget: int = 4096
    """Tokens of one micro-batch, padding included."""

    @classmethod
    def of(cls, fingerprint: dict) -> "SketchSpec":
        """The spec that made a store's rows, from its fingerprint; RequestError for rows made in another way."""
        try:
            projection, modules = fingerprint["projection"], fingerprint["modules"]
            settings = Objective(**fingerprint["objective"])
            return cls(projection["rank"], projection["seed"], settings, tuple(modules) if modules else None)
        except (KeyError, TypeError):
            raise RequestError(
                "the store's rows were not made by this sketcher: its fingerprint has no settings"
            ) from None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RequestError(f"rank is {self.rank}, expected at least 1")
        if self.token_budget < 1:
            raise RequestError(f"token budget is {self.token_budget}, expected at least 1")


@dataclass(frozen=True, slots=True, eq=False)
class SketchBatch:
    """Sketches of some problems, ready for `Writer.append`."""

    ids: list[str]
    sketches: np.ndarray
    """float32 [P, D], the projected ascent direction of each problem's objective; zero rows where not live."""
    states: list[State]
    reasons: list[str]
    """Why a row failed; empty for the others."""
    pass_rates: np.ndarray
    """float32 [P]."""
    n_rollouts: np.ndarray
    """int32 [P]."""
    n_tokens: int
    """Tokens that went through the model, padding and responses sampled before not counted."""


class Sketcher:
    """Sketches groups of rollouts with the model as it is now; the model is left as it was found."""

    def __init__(self, model: nn.Module, spec: SketchSpec | None = None) -> None:
        self.model = model
        self.spec = spec or SketchSpec()
        self._layers = find_layers(model, self.spec.modules)
        shapes = [(layer.name, layer.n_outputs, layer.n_inputs) for layer in self._layers]
        self.bases = random_bases(shapes, self.spec.rank, self.spec.seed)
        self.device = next(model.parameters()).device
        self._sides = [_sides_on(self.device, basis) for basis in self.bases]

    @property
    def dim(self) -> int:
        """Dimensions of a sketch."""
        return self.bases[-1].stop

    @property
    def context(self) -> int | None:
        """Longest sequence the model takes; None when its configuration does not say."""
        config = getattr(self.model, "config", None)
        return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)

    @property
    def fingerprint(self) -> dict:
        """What makes sketches comparable: a store holds rows of one fingerprint only."""
        return {
            "model": model_identity(self.model),
            "adapters": adapter_identity(self.model),
            "projection": {
                "kind": "random",
                "rank": self.spec.rank,
                "seed": self.spec.seed,
                "scaling": "signs / sqrt(rank)",
                "basis": basis_hash(self.bases),
            },
            "modules": list(self.spec.modules) if self.spec.modules else None,
            "objective": self.spec.objective.as_dict(),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "layout": [[basis.name, basis.start, basis.stop] for basis in self.bases],
        }

    def sketch(self, groups: Sequence[Group]) -> SketchBatch:
        """Sketches of the groups, in their order.

        Groups whose rewards are all equal are not run and, like any zero gradient, are `no_signal`; a problem whose
        gradient is not finite is `failed` with the reason. RequestError for a sequence longer than the model's
        context, a token id outside the vocabulary, or missing log-probabilities under an importance-weighted
        objective.
        """
        for group in groups:
            self.check(group)
        weights = [
            rollout_weights(
                group.rewards, np.array([len(response) for response in group.responses]), self.spec.objective
            )
            for group in groups
        ]
        sums_PD = torch.zeros(len(groups), self.dim, dtype=torch.float32, device=self.device)
        rollouts = rollouts_of(groups, weights, merge=not self.spec.objective.importance)
        with self._hooked() as hooks:
            for batch in pack(rollouts, self.spec.token_budget):
                batch = batch.to(self.device)
                hooks.begin(sums_PD, batch)
                self._backward(batch)
        return _label(groups, sums_PD.cpu().numpy(), sum(len(rollout.token_ids) for rollout in rollouts))

    def _backward(self, batch: MicroBatch) -> None:
        """Back-propagates the weighted log-probability of the response tokens to the hooked layers."""
        logits_BTV = self.model(input_ids=batch.token_ids_BT, use_cache=False).logits
        logits_NV = logits_BTV[batch.rows_N, batch.positions_N].float() / self.spec.objective.temperature
        logprobs_N = -nn.functional.cross_entropy(logits_NV, batch.targets_N, reduction="none")
        weights_N = batch.weights_N
        settings = self.spec.objective
        if settings.importance and batch.behaviour_N is not None:
            weights_N = importance_weights(
                logprobs_N.detach(), batch.behaviour_N, weights_N, settings.clip_low, settings.clip_high
            )
        torch.dot(weights_N, logprobs_N).backward()

    def check(self, group: Group) -> None:
        """RequestError where the model cannot run the group: see `sketch`."""
        name = f"problem {group.problem_id!r}"
        if self.context and group.n_tokens > self.context:
            raise RequestError(
                f"{name}: prompt and longest response have {group.n_tokens} tokens, "
                f"the model's context is {self.context}"
            )
        n_vocabulary = vocabulary_size(self.model)
        largest = max(int(ids.max()) for ids in (group.prompt_ids, *group.responses) if len(ids))
        if largest >= n_vocabulary:
            raise RequestError(f"{name}: token id {largest} is outside the model's vocabulary of {n_vocabulary}")
        if self.spec.objective.importance and group.logprobs is None:
            raise RequestError(f"{name}: has no log-probabilities, which an importance-weighted objective needs")

    @contextmanager
    def _hooked(self) -> Iterator["_Hooks"]:
        """Freezes the parameters, hooks the layers, switches dropout off; undoes all of it at the end."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        training = [module for module in self.model.modules() if module.training]
        hooks = _Hooks(self._layers, self._sides)
        try:
            self.model.eval()
            for parameter in trained:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                yield hooks
        finally:
            hooks.remove()
            for parameter in trained:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True


@dataclass(frozen=True, slots=True)
class _Sides:
    """One layer's basis on the model's device; None keeps the side."""

    basis: LayerBasis
    left_OR: Tensor | None
    right_IR: Tensor | None


class _Hooks:
    """Forward hooks of the layers, adding to the sums of the micro-batch begun last."""

    def __init__(self, layers: Sequence[Layer], sides: Sequence[_Sides]) -> None:
        self._handles = [
            layer.module.register_forward_hook(partial(self._forward, side))
            for layer, side in zip(layers, sides, strict=True)
        ]

    def begin(self, sums_PD: Tensor, batch: MicroBatch) -> None:
        self._sums_PD, self._problem_B, self._shape_BT = sums_PD, batch.problem_B, batch.token_ids_BT.shape

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _forward(self, side: _Sides, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if inputs[0].shape[:-1] != self._shape_BT:
            raise RequestError(
                f"layer {side.basis.name} sees inputs of shape {tuple(inputs[0].shape)} instead of one row per token "
                f"{tuple(self._shape_BT)}; leave it out with `modules`"
            )
        right_BTR = _project(inputs[0].detach(), side.right_IR)
        if not output.requires_grad:  # the lowest layer: nothing below it is back-propagated
            output.requires_grad_(True)
        output.register_hook(partial(self._backward, side, right_BTR))

    def _backward(self, side: _Sides, right_BTR: Tensor, grad_BTO: Tensor) -> None:
        left_BTR = _project(grad_BTO, side.left_OR)
        products_BRR = torch.bmm(left_BTR.transpose(1, 2), right_BTR)
        start, stop = side.basis.start, side.basis.stop
        self._sums_PD[:, start:stop].index_add_(0, self._problem_B, products_BRR.flatten(1))


def _project(x_BTW: Tensor, side_WR: Tensor | None) -> Tensor:
    """The tokens' vectors on one side of the basis, float32 [B, T, R]."""
    return x_BTW.float() if side_WR is None else x_BTW.float() @ side_WR


def _sides_on(device: torch.device, basis: LayerBasis) -> _Sides:
    left_OR = None if basis.left_OR is None else torch.from_numpy(basis.left_OR).to(device)
    right_IR = None if basis.right_IR is None else torch.from_numpy(basis.right_IR).to(device)
    return _Sides(basis, left_OR, right_IR)


def _label(groups: Sequence[Group], sketches_PD: np.ndarray, n_tokens: int) -> SketchBatch:
    """The batch with each problem's state; rows of problems that are not live are set to zero."""
    states, reasons = [], []
    for row in range(len(groups)):
        state, reason = State.LIVE, ""
        if not np.isfinite(sketches_PD[row]).all():
            state, reason = State.FAILED, "the gradient is not finite"
        elif not sketches_PD[row].any():
            state = State.NO_SIGNAL
        if state is not State.LIVE:
            sketches_PD[row] = 0.0
        states.append(state)
        reasons.append(reason)
    return SketchBatch(
        [group.problem_id for group in groups],
        sketches_PD,
        states,
        reasons,
        np.array([group.pass_rate for group in groups], np.float32),
        np.array([len(group.responses) for group in groups], np.int32),
        n_tokens,
    )
