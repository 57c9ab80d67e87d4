"""Coverage: which share of the trainable parameters, and of the squared policy gradient, the sketched layers see.

Coverage is measured, not assumed: plain autograd back-propagates a few groups to every trainable parameter. A layer
that no hook sees (a norm, an embedding, a packed weight) is reported by name. Definitions: docs/methods.md, coverage.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from gradstore.engine.gradients.adapters import active_adapters, is_trained
from gradstore.engine.gradients.budget import give_back
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.hooks import NoObserver, Observation, PausableObserver, frozen
from gradstore.engine.gradients.layers import Layer
from gradstore.engine.gradients.microbatch import pack, pays_to_share, rollouts_of
from gradstore.engine.gradients.packed import packed_weights
from gradstore.engine.gradients.retrying import noticing
from gradstore.engine.gradients.settings import GradientSpec
from gradstore.engine.gradients.sharding import inner, is_sharded
from gradstore.engine.rollouts.group import Group
from gradstore.errors import RequestError

LEAST = 0.95
"""Coverage below which a new store is refused, unless the caller accepts less."""
_GROUPS = 8

Spec = TypeVar("Spec", bound=GradientSpec)

_Key = tuple[int, str]
"""A parameter: id of its module, and its name there."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Parameters of one name that the sketch does not see, summed over all layers."""

    name: str
    """Parameter name, with `*` in place of the layer number."""
    parameters: float
    """Share of the trainable parameters."""
    gradient: float | None
    """Share of the squared gradient; None if not measured."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Shares of the trainable parameters and of the squared gradient that the sketched layers see."""

    parameters: float
    gradient: float | None
    """Mean over the measured groups; None if there is none (no group has a gradient, or the model is sharded)."""
    n_groups: int
    left_out: tuple[LeftOut, ...] = ()
    """Sorted by share of the gradient, largest first."""
    lookups: float = 0.0
    """Share of the parameters that lie in unsketched embeddings."""

    @property
    def share(self) -> float:
        """The share that `require` checks: of the squared gradient if measured, else of the parameters. The latter
        ignores unsketched embeddings: most of their rows have no gradient, so their size says nothing about it."""
        return self.parameters / (1 - self.lookups) if self.gradient is None else self.gradient

    def describe(self) -> dict:
        """The fields as a JSON-ready dict."""
        return asdict(self)

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> "Coverage":
        """The coverage from the dict that `describe` returned and a store keeps."""
        parts = (LeftOut(part["name"], part["parameters"], part["gradient"]) for part in kept["left_out"])
        return cls(kept["parameters"], kept["gradient"], kept["n_groups"], tuple(parts), kept.get("lookups", 0.0))

    def sentence(self) -> str:
        """One-line summary, with the names of unseen parameters."""
        measured = "" if self.gradient is None else f"{self.gradient:.1%} of the squared gradient and "
        line = f"the sketch sees {measured}{self.parameters:.1%} of the parameters that train"
        names = [f"{part.name} ({_percent(part)})" for part in self.left_out[:4]]
        rest = len(self.left_out) - len(names)
        return line + (f"; left out: {', '.join(names)}" if names else "") + (f" and {rest} more" if rest else "")

    def require(self, least: float, option: str = "accept_coverage=") -> None:
        """Raise RequestError if the share is below `least`, naming the unseen parameters and the option to accept it.

        option: the caller's spelling of that option; the message appends the accepted share.
        """
        if self.share < least:
            accepted = f"{option}{math.floor(self.share * 100) / 100:g}"
            raise RequestError(
                f"{self.sentence()}. That is less than {least:g}: rankings would be of a part of the gradient. "
                "Sketch the input embedding too (--embeddings, in rounds spec.embeddings=true) where that is what is "
                f"missing, train LoRA adapters on linear layers, or accept it: {accepted}"
            )

    def to_bytes(self) -> bytes:
        """JSON bytes that a store keeps (gradstore.attachments.COVERAGE)."""
        return json.dumps(self.describe(), sort_keys=True).encode()


def least_of(spec: GradientSpec, accepted: float | None) -> float:
    """Coverage required of a new store: `accepted` if given, else 0 if the spec chooses layers, else LEAST."""
    if accepted is not None:
        return accepted
    return 0.0 if spec.head_only or spec.modules is not None else LEAST


def measure(gradients: GradientPass, groups: Sequence[Group], most: int = _GROUPS) -> Coverage:
    """Coverage of a pass's layers, measured on the first groups with a gradient, at most `most`.

    Memory: gradients of all trainable parameters, as much as one more copy of them. The model is left unchanged. A
    weight shared by several modules counts once for each: of a tied embedding the sketch sees the output layer's
    gradient, not the lookup's. RequestError as in `GradientPass.check`.
    """
    model = gradients.model
    seen = {(id(layer.module), layer.parameter) for layer in gradients.layers}
    sizes = _sizes(model, gradients.layers)
    squares: list[dict[str, float]] = []
    if not (is_sharded(model) or gradients.device.type == "meta"):
        with _trainable(model, seen) as named:
            for group in groups:
                if len(squares) == most:
                    break
                found = _squares(gradients, group, named) if group.has_signal else {}
                total = sum(found.values())
                if total > 0 and math.isfinite(total):
                    squares.append({name: square / total for name, square in found.items()})
        give_back(model)  # the gradients of all trainable parameters
    shares = {name: sum(one[name] for one in squares) / len(squares) for name in (squares[0] if squares else ())}
    covered = {f"{layer.name.removesuffix('.' + layer.parameter)}.{layer.parameter}" for layer in gradients.layers}
    lookups = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return _coverage(sizes, shares, covered, lookups, len(squares))


def seeing_enough(model: nn.Module, spec: Spec, groups: Sequence[Group], least: float) -> tuple[Spec, Coverage]:
    """The spec and its coverage; the spec gets the input embedding if coverage without it is below `least`."""
    gradients = GradientPass(model, spec)
    coverage = measure(gradients, groups)
    if coverage.share >= least or spec.embeddings or spec.head_only:
        return spec, coverage
    wider = replace(spec, embeddings=True)
    try:
        with_embedding = GradientPass(model, wider)
    except RequestError:  # an embedding that does more than look rows up
        return spec, coverage
    if len(with_embedding.layers) == len(gradients.layers):
        return spec, coverage
    return wider, measure(with_embedding, groups)


def _coverage(
    sizes: Mapping[str, int], shares: Mapping[str, float], covered: set[str], lookups: set[str], n_groups: int
) -> Coverage:
    n_all = max(sum(sizes.values()), 1)
    parts: dict[str, list[float]] = {}
    for name in sorted(sizes.keys() | shares.keys()):
        if name not in covered:
            part = parts.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), [0.0, 0.0])
            part[0] += sizes.get(name, 0) / n_all
            part[1] += shares.get(name, 0.0)
    left_out = [LeftOut(name, size, share if n_groups else None) for name, (size, share) in parts.items()]
    left_out.sort(key=lambda part: (-(part.gradient or 0.0), -part.parameters))
    lost = math.fsum(part.parameters for part in left_out)
    gradient = 1.0 - math.fsum(part.gradient or 0.0 for part in left_out) if n_groups else None
    unseen = sum(size for name, size in sizes.items() if name in lookups - covered) / n_all
    return Coverage(1.0 - lost, gradient, n_groups, tuple(left_out), unseen)


def _sizes(model: nn.Module, layers: Sequence[Layer]) -> dict[str, int]:
    """Elements of each trainable parameter. A shared one counts once, under the name of its sketched layer if any."""
    sizes = {
        f"{layer.name.removesuffix('.' + layer.parameter)}.{layer.parameter}": _elements(layer) for layer in layers
    }
    known = {id(layer.weight) for layer in layers}
    for name, parameter in _training(model):
        if id(parameter) not in known:
            sizes[name] = parameter.numel()
    return sizes | dict(
        packed_weights(model, {id(layer.module) for layer in layers}) if not active_adapters(model) else ()
    )


def _elements(layer: Layer) -> int:
    return layer.n_outputs * layer.n_inputs * (layer.n_experts or 1)


def _training(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trainable parameters: those of active adapters or that require a gradient; all parameters if none does."""
    active = active_adapters(model)
    named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
    required = [(name, p) for name, p in named if p.requires_grad or is_trained(name, active)]
    return required or named


@contextmanager
def _trainable(model: nn.Module, seen: set[_Key]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Require gradients of all trainable parameters in the context; yields them by name. A parameter that a sketched
    layer shares with another module becomes a separate parameter there."""
    trained = {id(p) for _, p in _training(model)}
    own = {id(p) for module in model.modules() for n, p in module._parameters.items() if (id(module), n) in seen}
    kept = [(p, p.grad) for p in model.parameters()]
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    with frozen(model):
        try:
            for module in list(model.modules()):
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None and id(parameter) in own and (id(module), name) not in seen:
                        swapped.append((module, name, parameter))
                        module._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
            copies = {id(module._parameters[name]) for module, name, _ in swapped}
            wanted = trained | own | copies
            named = [(n, p) for n, p in model.named_parameters() if id(p) in wanted and p.is_floating_point()]
            for _, parameter in named:
                parameter.grad = None
                parameter.requires_grad_(True)
            yield named
        finally:
            for module, name, parameter in swapped:
                module._parameters[name] = parameter
            for parameter, gradient in kept:
                parameter.requires_grad_(False)
                parameter.grad = gradient


def _squares(gradients: GradientPass, group: Group, named: Sequence[tuple[str, nn.Parameter]]) -> dict[str, float]:
    """Squared norm of the group's gradient per parameter; empty if no rollout carries weight."""
    gradients.check(group)
    rollouts, policy = rollouts_of([group], gradients.spec.objective), gradients.policy
    if not rollouts:
        return {}
    policy.verify(rollouts)
    shared = policy.shares_prompts and gradients.spec.share_prompts and pays_to_share(rollouts)
    observation = Observation(gradients.model, [], PausableObserver(NoObserver()))

    def attempt(tokens: int) -> None:
        for _, parameter in named:
            parameter.grad = None
        for batch in pack(rollouts, tokens, shared):
            with noticing(batch):
                policy.backward(batch.to(gradients.device), gradients.spec.objective, observation)

    try:
        with torch.enable_grad():
            gradients.budget.fitting(attempt, [group], inputs_kept=True)
    finally:
        observation.remove()
    squares = {n: 0.0 if p.grad is None else inner(p.grad, p.grad) for n, p in named}
    for _, parameter in named:
        parameter.grad = None
    return squares


def _percent(part: LeftOut) -> str:
    return f"{part.parameters if part.gradient is None else part.gradient:.1%}"
