"""Moves a model along a direction and back, in one of two ways.

`displaced` changes the weights, each rank its own shard, and restores their exact bytes. `LowRankBranch` leaves the
weights unchanged and adds the move to the layers' outputs: a float32 branch beside each linear or embedding layer holds
the direction, truncated to a low rank. It serves weights too coarse for small moves (bf16, quantised), and engines
that serve LoRA adapters. The truncation error is reported.

Dimension letters: I and O a layer's inputs and outputs, R rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from gradstore.engine.gradients.directions import Direction
from gradstore.engine.gradients.sharding import inner, own_part, reshard
from gradstore.errors import RequestError, check_number

Move = Callable[[float], None]
"""Callback(eps): sets the model to theta + eps V; 0 sets it to theta."""

_EXACT_SIDE = 512
"""Matrices whose smaller side is at most this get a full singular value decomposition."""


@contextmanager
def displaced(model: nn.Module, direction: Direction) -> Iterator[Move]:
    """Yield the move along the direction; at the end, also after an error, every weight has its old bytes again.

    Memory: a copy of the weights that the direction covers. Gradients, flags and autograd's version counters do not
    change. RequestError if the direction belongs to another model, or if a weight is coarser than float32.
    """
    reshard(model)
    parameters = dict(model.named_parameters())
    for name, tensor in direction.tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            has = f"shape {tuple(parameters[name].shape)}" if name in parameters else "no such parameter"
            raise RequestError(f"the direction has {name} of shape {tuple(tensor.shape)}, the model {has}")
        if parameters[name].itemsize < 4 or not parameters[name].is_floating_point():
            raise RequestError(
                f"{name} is {str(parameters[name].dtype).removeprefix('torch.')}, too coarse to be moved by a small "
                "step: load the model in float32, or give `rank` for a low-rank branch beside the layers"
            )
    places = [(own_part(parameters[name]), own_part(tensor)) for name, tensor in direction.tensors.items()]
    kept = [weights.clone() for weights, _ in places]

    def move(eps: float) -> None:
        reshard(model)
        for (weights, along), old in zip(places, kept, strict=True):
            torch.add(old, along, alpha=eps, out=weights)

    try:
        yield move
    finally:
        reshard(model)
        for (weights, _), old in zip(places, kept, strict=True):
            weights.copy_(old)


@dataclass(frozen=True, slots=True)
class _Factors:
    """The direction of one layer: of its weight as [I, R] x [R, O], and of its bias."""

    module: nn.Module
    right_IR: Tensor | None
    left_RO: Tensor | None
    bias_O: Tensor | None


class LowRankBranch:
    """A direction truncated to a low rank per linear and embedding layer; biases in full, other parameters omitted."""

    def __init__(self, model: nn.Module, direction: Direction, rank: int) -> None:
        check_number("rank", rank, least=1)
        reshard(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._factors: list[_Factors] = []
        kept: dict[str, float] = {}
        for module in model.modules():
            if not isinstance(module, nn.Linear | Conv1D | nn.Embedding):
                continue
            weight = names.get(id(module.weight), "")
            bias = names.get(id(getattr(module, "bias", None)), "")
            right_IR = left_RO = bias_O = None
            if weight in direction.tensors:
                matrix = _whole(direction.tensors[weight])
                right_IR, left_RO = _factors(matrix.T if isinstance(module, nn.Linear) else matrix, rank)
                kept[weight] = inner(right_IR.T @ right_IR, left_RO @ left_RO.T)
            if bias in direction.tensors:
                bias_O = _whole(direction.tensors[bias])
                kept[bias] = inner(bias_O, bias_O)
            if right_IR is not None or bias_O is not None:
                self._factors.append(_Factors(module, right_IR, left_RO, bias_O))
        self.truncation = max(0.0, 1 - sum(kept.values()) / direction.norm**2) ** 0.5
        """|V - V truncated| / |V|: relative norm of the part that the branch leaves out."""

    @contextmanager
    def attached(self) -> Iterator[Move]:
        """Yield the move along the truncated direction; the hooks are removed at the end."""
        scale = [0.0]
        handles = [
            factors.module.register_forward_hook(partial(self._add, factors, scale)) for factors in self._factors
        ]
        try:
            yield lambda eps: scale.__setitem__(0, eps)
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _add(factors: _Factors, scale: list[float], module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        if scale[0] == 0:
            return None
        moved = output.float()
        if factors.right_IR is not None and factors.left_RO is not None:
            x = inputs[0]
            narrow = factors.right_IR[x] if isinstance(module, nn.Embedding) else x.float() @ factors.right_IR
            moved = moved + scale[0] * (narrow @ factors.left_RO)
        if factors.bias_O is not None:
            moved = moved + scale[0] * factors.bias_O
        return moved.to(output.dtype)


def _factors(matrix_IO: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix as [I, R] x [R, O]; large ones use a seeded randomised decomposition."""
    if min(matrix_IO.shape) <= _EXACT_SIDE:
        U, S, Vh = torch.linalg.svd(matrix_IO, full_matrices=False)
        V = Vh.T
    else:
        with torch.random.fork_rng(devices=[matrix_IO.device] if matrix_IO.is_cuda else []):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(matrix_IO, q=min(rank + 8, *matrix_IO.shape), niter=4)
    return (U[:, :rank] * S[:rank]).contiguous(), V[:, :rank].T.contiguous()


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return cast(Any, tensor).full_tensor().float() if isinstance(tensor, DTensor) else tensor.float()
