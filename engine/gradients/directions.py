"""A direction in parameter space: the full gradient of a benchmark, for probes to step along.

Unlike a sketched target, it covers every trainable parameter, including embeddings, norms and biases, and takes as
much memory as they do. It costs one ordinary backward over the benchmark's rollouts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.hooks import NoObserver, Observation, Observer, PausableObserver, evaluating
from gradstore.engine.gradients.layers import Layer
from gradstore.engine.gradients.microbatch import in_step, pack, pays_to_share, rollouts_of
from gradstore.engine.gradients.objectives import Objective, objective
from gradstore.engine.gradients.retrying import noticing
from gradstore.engine.gradients.settings import GradientSpec
from gradstore.engine.gradients.sharding import inner, is_sharded, n_shards, plain_inner, reshard, total
from gradstore.engine.rollouts.group import Group
from gradstore.errors import RequestError


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """An ascent direction: one tensor per trainable parameter."""

    tensors: Mapping[str, Tensor]
    """Parameter name -> float32 (float64 for a float64 parameter), shaped and sharded as the parameter."""
    norm: float
    """Euclidean norm over all parameters and ranks."""
    n_problems: int
    """Problems that the direction is the mean over, including those without signal; 0 if made elsewhere."""

    @classmethod
    def mean(cls, sums: Mapping[str, Tensor], n_problems: int) -> "Direction":
        """From the sum of n_problems gradients; the tensors are divided in place. RequestError as in `of`, also for an
        empty benchmark, whose sum is zero."""
        return cls.of({name: tensor.div_(max(n_problems, 1)) for name, tensor in sums.items()}, n_problems)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], n_problems: int = 0) -> "Direction":
        """From tensors by parameter name; RequestError when they are not finite or all zero."""
        squares = sum(inner(tensor, tensor) for tensor in tensors.values())
        if not math.isfinite(squares):
            bad = next((n for n, t in tensors.items() if not math.isfinite(inner(t, t))), "their sum")
            raise RequestError(f"the direction is not finite: {bad}; check the model's weights and the rewards")
        if squares == 0:
            raise RequestError("the direction is zero: no validation problem has rewards that differ")
        return cls(dict(tensors), math.sqrt(squares), n_problems)

    def dot(self, other: Mapping[str, Tensor]) -> float:
        """Inner product with tensors of the same names; a missing name counts as zero."""
        return sum(inner(tensor, other[name]) for name, tensor in self.tensors.items() if name in other)


def validation_gradient(
    model: nn.Module, groups: Sequence[Group], settings: Objective | None = None, *, token_budget: int | None = None
) -> Direction:
    """Mean gradient of the groups' objective (ascent direction) with respect to every trainable parameter.

    settings: default the preset `gradalign`. Groups without signal count as zero, as in `engine.target`. The model's
    own gradients and flags are left unchanged. Under FSDP2 each rank brings its own groups, the mean is over those
    of all ranks and the tensors stay sharded. RequestError if no parameter is trainable, if no group has signal, or for
    a group that the model cannot run.
    """
    spec = GradientSpec(objective=settings or objective("gradalign"), token_budget=token_budget)
    runner = GradientPass(model, spec)
    return Direction.mean(summed_gradient(runner, groups), int(total(model, [len(groups)])[0]))


def summed_gradient(
    runner: GradientPass,
    groups: Sequence[Group],
    watch: tuple[Sequence[Layer], Observer] | None = None,
    factors_P: Sequence[float] | None = None,
    rollout_weights_PG: Sequence[np.ndarray] | None = None,
) -> dict[str, Tensor]:
    """Sum of the groups' gradients over all ranks, by name of the trainable parameter.

    watch: layers, and an observer that sees their inputs and output gradients during the pass; its problems are
    positions in `groups`. factors_P, rollout_weights_PG: as in `rollouts_of`.
    """
    model, policy, spec = runner.model, runner.policy, runner.spec
    for group in groups:
        runner.check(group)
    rollouts = rollouts_of(groups, spec.objective, factors_P, rollout_weights_PG)
    policy.verify(rollouts)
    scale = n_shards(model)
    plain = policy.plain() if is_sharded(model) else nullcontext()
    sums: dict[str, Tensor] = {}
    with plain, _own_gradients(model) as trained, torch.enable_grad():
        shared = policy.shares_prompts and spec.share_prompts and pays_to_share(rollouts)
        layers, observer = watch or ([], NoObserver())
        muted = PausableObserver(observer)
        observation = Observation(model, layers, muted)

        def attempt(tokens: int) -> None:
            sums.clear()
            observer.reset()
            for parameter in trained.values():
                parameter.grad = None
            batches = list(pack(rollouts, tokens, shared))
            for number, batch in enumerate(in_step(model, batches, shared)):
                muted.on = number < len(batches)
                with noticing(batch):
                    policy.backward(batch.to(runner.device), spec.objective, observation)
                reshard(model)
                _take(sums, {name: trained[name] for name in coarse})

        coarse = [name for name, parameter in trained.items() if parameter.itemsize < 4]
        try:
            runner.budget.fitting(attempt, groups, inputs_kept=True)
            _take(sums, trained)
        finally:
            observation.remove()
    return {name: tensor.mul_(scale) if scale > 1 else tensor for name, tensor in sums.items()}


def dot_along(runner: GradientPass, groups: Sequence[Group], direction: Direction) -> float:
    """Inner product of the groups' summed gradient with a direction; errors as in `summed_gradient`.

    Each parameter's gradient is used and freed during the backward, so no copy of the weights is held. For a model
    sharded by FSDP2, the whole sum is held.
    """
    if is_sharded(runner.model):
        return direction.dot(summed_gradient(runner, groups))
    taker = _Along(direction.tensors)
    handles = [
        parameter.register_post_accumulate_grad_hook(partial(taker.take, name))
        for name, parameter in runner.model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        summed_gradient(runner, groups, ([], taker))
    finally:
        for handle in handles:
            handle.remove()
    return float(sum(taker.products))


def _take(sums: dict[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Move the parameters' gradients to the sums, in float32 or finer. Autograd itself sums the gradients of float32 or
    finer weights in place; those are moved once."""
    for name, parameter in parameters.items():
        if parameter.grad is None:
            continue
        gradient = parameter.grad if parameter.grad.itemsize >= 4 else parameter.grad.float()
        parameter.grad = None
        sums[name] = gradient if name not in sums else sums[name].add_(gradient)


@contextmanager
def _own_gradients(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Clear the gradients of the trainable parameters in the context, and restore the old ones at its end."""
    reshard(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise RequestError("no parameter of the model trains: set requires_grad on those that do")
    before = {name: parameter.grad for name, parameter in trained.items()}
    try:
        for parameter in trained.values():
            parameter.grad = None
        with evaluating(model):
            yield trained
    finally:
        reshard(model)
        for name, parameter in trained.items():
            parameter.grad = before[name]


class _Along(NoObserver):
    """Frees each gradient and keeps its product with a direction; `reset` drops the products of a failed pass."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.products: list[Tensor] = []

    def take(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is not None and name in self._tensors:
            self.products.append(plain_inner(parameter.grad, self._tensors[name]))
        parameter.grad = None

    def reset(self) -> None:
        self.products.clear()
