"""Helpers for code that reads or moves the parameters of a model sharded by FSDP2.

A sharded parameter is a DTensor: every rank holds its part, and moving all parts moves the parameter. Between passes
some parameters may still be gathered, hidden behind plain tensors; `reshard` puts the parts back. Each forward and
backward communicates among the ranks, so all ranks must run equally many. `largest` agrees on their number; a rank with
less to do runs batches that do not count.
"""

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gradstore.engine.gradients.budget import free_bytes, return_large_blocks

log = logging.getLogger(__name__)

T = TypeVar("T")
S = TypeVar("S")
K = TypeVar("K", bound=Hashable)

_PART = 1 << 22
"""Numbers converted to float64 at once."""
_GATHERED: WeakSet[nn.Module] = WeakSet()
"""Models inside `gathered`."""
_TOLD: WeakSet[nn.Module] = WeakSet()
"""Models that could not be gathered, of which this was said."""
_SPARED: WeakSet[nn.Module] = WeakSet()
"""Models on a CPU that `spare_memory` was called for."""
_OF_FREE = 0.5
"""Share of a GPU's free memory that a whole model's weights may take when they are gathered for a pass."""


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards any of the model's modules."""
    if not (dist.is_available() and dist.is_initialized()):  # asked a thousand times in a fit
        return False
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, so that `model.parameters()` are the rank's own parts. No effect on a plain model, and
    inside `gathered`."""
    if model in _GATHERED:
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(model: nn.Module) -> None:
    """Gather the parameters of the outermost module itself (embedding, output layer), so that its submodules can be
    called directly; those gather their own. No effect on a plain model."""
    if isinstance(model, FSDPModule):
        model.unshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[bool]:
    """Keep all parameters gathered in the context, if there is room; yields whether they are.

    Submodules can then be called directly, in any order, and nothing is communicated between micro-batches. Room: on a
    GPU half of the free memory of every rank; a CPU always has it, except after `spare_memory`. Gradients must not be
    reduced in the context. All ranks enter it together. Yields True for a plain model, and inside another such context
    of the same model.
    """
    if model in _GATHERED or not is_sharded(model):
        yield True
        return
    reshard(model)  # parameters that a forward left gathered would not count
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in modules for group in _parameter_groups(module)]
    if len(groups) < len(modules) or largest(model, int(not _has_room(model))):
        if model not in _TOLD:
            log.info("no room for the whole sharded model: it is gathered layer by layer")
            _TOLD.add(model)
        yield False
        return
    before = [(group.post_forward_mesh_info, group.reshard_after_backward) for group in groups]
    try:
        for group in groups:
            group.post_forward_mesh_info, group.reshard_after_backward = None, False
        for module in modules:
            module.unshard()
        _GATHERED.add(model)
        yield True
    finally:
        _GATHERED.discard(model)
        for group, (mesh, after_backward) in zip(groups, before, strict=True):
            group.post_forward_mesh_info, group.reshard_after_backward = mesh, after_backward
        reshard(model)


def spare_memory(model: nn.Module) -> None:
    """Never gather this model whole on a CPU, and return a layer's weights to the system as soon as they are freed.

    For a model that is sharded because it is large. On one machine, a whole copy on every rank would take more memory
    than ranks without shards. It is slower (docs/scaling.md). No effect on a GPU, where the free memory decides.
    """
    if own_part(next(model.parameters())).device.type == "cpu":
        _SPARED.add(model)
        return_large_blocks()


@contextmanager
def layer_by_layer(model: nn.Module) -> Iterator[None]:
    """Keep the outermost module's own parameters (embedding, output layer) gathered in the context.

    Its sharded submodules (the layers) can then be called directly: FSDP2 gathers each one for its forward, and for its
    backward once the gradient of its output has arrived. Gradients must not be reduced in the context. All ranks enter
    it together. No effect on a model whose outermost module is not sharded.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    groups = _parameter_groups(model)
    before = [(group.post_forward_mesh_info, group.reshard_after_backward) for group in groups]
    try:
        for group in groups:
            group.post_forward_mesh_info, group.reshard_after_backward = None, False
        model.unshard()
        yield
    finally:
        for group, (mesh, after_backward) in zip(groups, before, strict=True):
            group.post_forward_mesh_info, group.reshard_after_backward = mesh, after_backward
        reshard(model)


def _parameter_groups(module: FSDPModule) -> list[Any]:
    """FSDP2's groups of a module's own parameters: there is no public way to read when they are resharded."""
    state = module._get_fsdp_state()
    found: list[Any] = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [group for group in found if hasattr(group, "post_forward_mesh_info")]


def _has_room(model: nn.Module) -> bool:
    """Whether this rank's GPU has room for the whole model's weights; on a CPU, unless memory is to be spared."""
    parameters = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    device = own_part(parameters[0]).device
    if device.type != "cuda":
        return model not in _SPARED
    return sum(p.numel() * p.element_size() for p in parameters) <= _OF_FREE * free_bytes(device)


def n_shards(model: nn.Module) -> int:
    """Number of ranks that FSDP2 averages gradients over; 1 for a plain model."""
    if not is_sharded(model):
        return 1
    reshard(model)
    return next(p.device_mesh.size() for p in model.parameters() if isinstance(p, DTensor))


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient; shares its memory, without autograd."""
    data = tensor.detach() if isinstance(tensor, DTensor) else tensor.data
    with torch.no_grad():
        return data.to_local() if isinstance(data, DTensor) else data


def inner(one: Tensor, other: Tensor) -> float:
    """Inner product of two tensors of the same placement, over all ranks that hold a part, in float64.

    Plain tensors are converted in parts: in float64 a vocabulary's matrix takes twice the memory.
    """
    one, other = one.detach(), other.detach()
    if isinstance(one, DTensor) or isinstance(other, DTensor):
        product = (one.double() * other.double()).sum()
        return float(product.full_tensor() if isinstance(product, DTensor) else product)
    return float(plain_inner(one, other))


def plain_inner(one: Tensor, other: Tensor) -> Tensor:
    """Inner product of two plain tensors, float64 [] on their device; does not wait for a GPU."""
    one, other = one.detach(), other.detach()
    parts = zip(one.reshape(-1).split(_PART), other.reshape(-1).split(_PART), strict=True)
    return sum((torch.dot(a.double(), b.double()) for a, b in parts), one.new_zeros((), dtype=torch.float64))


def largest(model: nn.Module, value: int) -> int:
    """The largest of the ranks' values; the value itself for a plain model."""
    return int(_reduced(model, [value], dist.ReduceOp.MAX)[0])


def total(model: nn.Module, values: list[float]) -> list[float]:
    """Sums over the ranks; the values themselves for a plain model."""
    return _reduced(model, values, dist.ReduceOp.SUM)


def own_share(model: nn.Module, items: Sequence[T]) -> list[T]:
    """This rank's items: every n-th for n ranks; all of them for a plain model."""
    return list(items[dist.get_rank() :: dist.get_world_size()] if is_sharded(model) else items)


def sum_over_ranks(model: nn.Module, tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks in place, the same on each; unchanged for a plain model."""
    if is_sharded(model):
        dist.all_reduce(tensor)
    return tensor


def summed_by_key(model: nn.Module, keys: Sequence[K], tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
    """Sums of tensors over the ranks, in the order of the keys. Ranks may lack keys; a key that all lack is omitted."""
    if not is_sharded(model):
        return dict(tensors)
    shapes: list[dict[K, torch.Size]] = [{}] * dist.get_world_size()
    dist.all_gather_object(shapes, {key: tensor.shape for key, tensor in tensors.items()})
    known = {key: shape for own in shapes for key, shape in own.items()}
    device = next(model.parameters()).device
    return {
        key: sum_over_ranks(model, tensors[key] if key in tensors else torch.zeros(known[key], device=device))
        for key in keys
        if key in known
    }


def divided(model: nn.Module, items: Sequence[T], make: Callable[[T], S]) -> list[S]:
    """Results of `make` for all items. One rank computes each and sends it to all (pickled), so all ranks agree."""
    own = [make(item) for item in own_share(model, items)]
    if not is_sharded(model):
        return own
    world, shares = dist.get_world_size(), of_all_ranks(model, own)
    return [shares[place % world][place // world] for place in range(len(items))]


def of_all_ranks(model: nn.Module, value: T) -> list[T]:
    """Every rank's value (pickled), in the order of the ranks, on each; the value alone for a plain model."""
    if not is_sharded(model):
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def leads(model: nn.Module) -> bool:
    """Whether this process is the one that writes: rank 0 of a sharded model; True for a plain model."""
    return not is_sharded(model) or dist.get_rank() == 0


def meet(model: nn.Module) -> None:
    """Wait until all ranks are here; no effect on a plain model."""
    if is_sharded(model):
        dist.barrier()


def _reduced(model: nn.Module, values: list, op: dist.ReduceOp.RedOpType) -> list:
    if not is_sharded(model):
        return values
    shared = torch.tensor(values, dtype=torch.float64, device=next(model.parameters()).device)
    dist.all_reduce(shared, op=op)
    return shared.tolist()
