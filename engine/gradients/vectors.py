"""Vectors that a module multiplies or adds elementwise: norm weights, and the biases of norms and linear layers.

A module has the form y = c(x) + w * n(x) + b. With g the gradient of y, the gradient of w is sum_t g_t * n(x_t), and
that of b is sum_t g_t. n(x) is y at w = 1 minus y at w = 0. So one formula covers RMS norms, norms of (1 + w), gated
norms and LayerNorm. A test on a few random numbers shows whether a module has this form. If not, its vectors are not
sketched, and the coverage reports them (coverage.py).

Cost: one or two elementwise forwards of the module in the backward, and one sum over the tokens.

Dimension letters: B sequences, T tokens, W width of the vector.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

_TOLERANCE = 1e-4
_OTHER_ARGUMENTS = (TypeError, ValueError, RuntimeError, AttributeError, IndexError)
"""Errors of a forward that expects other arguments than a norm: its module does not count as elementwise."""


@dataclass(frozen=True, slots=True)
class Vector:
    """How a parameter [W] acts on its module's output."""

    acts: Literal["scale", "shift"]
    vanishes: bool = True
    """Whether c(x) is zero, so that w = 0 need not be run; False for norms of (1 + w)."""


def vectors_of(module: nn.Module) -> dict[str, Vector]:
    """The vectors of a module that multiplies by a `weight` [W], by parameter name; empty for any other module."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1:
        return {}
    has_bias = module._parameters.get("bias") is not None
    random = torch.Generator().manual_seed(0)
    x_BTW, gate_BTW = torch.randn(2, 1, 3, len(weight), generator=random)
    scale_W, shift_W = torch.randn(2, len(weight), generator=random)
    zero_W, one_W = torch.zeros_like(scale_W), torch.ones_like(scale_W)
    for given in ((x_BTW,), (x_BTW, gate_BTW)):  # some norms take a gate
        try:
            found, at_zero, at_one = (
                _run(module, {"weight": w_W, "bias": b_W}, given)
                for w_W, b_W in ((scale_W, shift_W), (zero_W, zero_W), (one_W, zero_W))
            )
        except _OTHER_ARGUMENTS:
            continue
        if not isinstance(found, Tensor) or found.shape != x_BTW.shape:
            continue
        expected = at_zero + scale_W * (at_one - at_zero) + (shift_W if has_bias else 0)
        if float((found - expected).abs().max()) <= _TOLERANCE * (1 + float(found.abs().max())):
            scale = Vector("scale", not bool(at_zero.any()))
            return {"weight": scale, "bias": Vector("shift")} if has_bias else {"weight": scale}
    return {}


def multiplied(
    module: nn.Module, vector: Vector, given: tuple[Any, ...], named: Mapping[str, Any], like: Tensor
) -> Tensor:
    """n(x), the factor of the weight, in the output's shape. given, named: the module's arguments; like: a tensor of
    the output's dtype and device."""
    zero_W = torch.zeros_like(cast(Tensor, module._parameters["weight"]), dtype=like.dtype, device=like.device)
    found = _run(module, {"weight": zero_W + 1, "bias": zero_W}, given, named)
    return found if vector.vanishes else found - _run(module, {"weight": zero_W, "bias": zero_W}, given, named)


def _run(
    module: nn.Module, values: Mapping[str, Tensor], given: tuple[Any, ...], named: Mapping[str, Any] | None = None
) -> Tensor:
    with torch.no_grad(), _holding(module, values):
        return cast(Tensor, module.forward(*given, **(named or {})))


@contextmanager
def _holding(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace the module's own parameters of these names by other tensors in the context; hooks are not called."""
    kept = dict(module._parameters)
    try:
        for name, value in values.items():
            if kept.get(name) is not None:
                module._parameters[name] = cast(Any, value)
        yield
    finally:
        module._parameters.update(kept)
