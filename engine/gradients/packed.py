"""Weights packed as integers by quantisers other than bitsandbytes: hooks see no layer that holds them."""

import re
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from gradstore.engine.gradients.adapters import active_adapters
from gradstore.engine.gradients.layers import Layer
from gradstore.errors import RequestError

_PACKED = (torch.int8, torch.uint8, torch.int16, torch.int32)


def check_packed(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Raise RequestError if a model without adapters has packed integer weights outside the sketched layers. Such
    weights do not train, and the gradient of the rest is not the policy gradient."""
    packed = {name for name, _ in packed_weights(model, {id(layer.module) for layer in layers})}
    if packed and not active_adapters(model):
        names = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in packed})
        raise RequestError(
            f"{len(packed)} weights are packed integers, which neither train nor are sketched: {', '.join(names[:6])}; "
            "load the model unquantised, give the adapter that trains on it, or choose layers with `modules`"
        )


def packed_weights(model: nn.Module, besides: set[int]) -> Iterator[tuple[str, int]]:
    """Name and number of elements of each packed weight: an integer matrix in a module outside `besides`."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    stated = config.get("bits") if isinstance(config, dict) else getattr(config, "bits", None)
    for path, module in model.named_modules():
        if id(module) in besides or isinstance(module, nn.Embedding):
            continue
        for name, held in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if held.dtype in _PACKED and held.ndim >= 2 and min(held.shape) > 1:
                # An int32 holds 32 / bits weights; a narrower type holds one, or two if 4 bits are stated.
                bits = getattr(module, "bits", None) or stated or (4 if held.dtype == torch.int32 else 8)
                yield f"{path}.{name}", held.numel() * max(1, held.element_size() * 8 // int(bits))
