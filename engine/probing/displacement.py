"""Moving a model along a direction and back, in one of two ways.

`displaced` moves the weights themselves, each rank its own shard, and puts the very bytes back. `LowRankBranch` leaves
them alone and adds the move to the layers' outputs: the direction of each linear or embedding layer, cut to a low
rank, as a float32 branch beside the layer. That is for weights too coarse to be moved by little (bf16, quantised) and
for engines that serve LoRA adapters; what the cut loses is reported.

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
from gradstore.errors import RequestError

Move = Callable[[float], None]
"""Puts the model at theta + eps V; 0 puts it at theta."""

_EXACT_SIDE = 512
"""Matrices with a side up to this get a full singular value decomposition."""


@contextmanager
def displaced(model: nn.Module, direction: Direction) -> Iterator[Move]:
    """Yields the move along the direction; at the end, also after an error, every weight has its old bytes again.

    Keeps a copy of the weights that the direction covers. Gradients, flags and autograd's version counters do not
    change. RequestError when the direction is not that of this model or a weight is coarser than float32.
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
    """The direction of one layer's weight as [I, R] x [R, O], and of its bias."""

    module: nn.Module
    right_IR: Tensor | None
    left_RO: Tensor | None
    bias_O: Tensor | None


class LowRankBranch:
    """A direction cut to a low rank per linear and embedding layer; biases whole, other parameters left out."""

    def __init__(self, model: nn.Module, direction: Direction, rank: int) -> None:
        if rank < 1:
            raise RequestError(f"rank is {rank}, expected at least 1")
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
        """|V - V cut| / |V|: what the branch leaves out."""

    @contextmanager
    def attached(self) -> Iterator[Move]:
        """Yields the move along the cut direction; the hooks go at the end."""
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
    """The closest [I, R] x [R, O] to a matrix; found by a seeded randomised decomposition for large ones."""
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
