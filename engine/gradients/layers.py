"""Which layers of a model are sketched, and what identifies the model in a store's fingerprint."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.pytorch_utils import Conv1D

from gradstore.errors import RequestError

_LORA = re.compile(r"\.lora_[AB]\.")


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer computing x W^T: an nn.Linear (any subclass) or GPT-2's Conv1D, which stores W transposed."""

    name: str
    module: nn.Module
    n_outputs: int
    n_inputs: int

    @property
    def weight(self) -> nn.Parameter:
        """The parameter whose gradient is seen, as it is stored."""
        return cast(nn.Parameter, self.module.weight)


def find_layers(model: nn.Module, patterns: Sequence[str] | None = None) -> list[Layer]:
    """The linear layers to sketch, in the model's order.

    Without patterns: the LoRA matrices of the active adapters where the model has any, else every linear layer
    including the output layer. With patterns: the linear layers whose name one of the regular expressions finds.
    RequestError when nothing is left.
    """
    layers = [layer for name, module in model.named_modules() if (layer := _as_layer(name, module))]
    if patterns:
        layers = [layer for layer in layers if any(re.search(pattern, layer.name) for pattern in patterns)]
        if not layers:
            raise RequestError(f"no linear layer of the model matches {', '.join(patterns)}")
        return layers
    active = _active_adapters(model)
    adapters = [layer for layer in layers if _LORA.search(layer.name) and layer.name.rsplit(".", 1)[-1] in active]
    if not layers:
        raise RequestError("the model has no nn.Linear or Conv1D layer to sketch")
    return adapters or layers


def output_layer(model: nn.Module) -> Layer:
    """The layer that gives the logits; RequestError when it is not a linear layer of its own."""
    base = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    head = cast(Any, base).get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and (layer := _as_layer(name, module)):
            return layer
    raise RequestError(f"the output layer of {type(base).__name__} is a {type(head).__name__}, not a linear layer")


def head_of(model: nn.Module) -> nn.Module | None:
    """The module that gives the logits; None where the model names none."""
    base = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    return cast(Any, base).get_output_embeddings() if hasattr(base, "get_output_embeddings") else None


def linear_outputs(module: nn.Module) -> int:
    """Outputs of a linear layer; 0 for any other module."""
    layer = _as_layer("", module)
    return layer.n_outputs if layer else 0


def model_identity(model: nn.Module) -> dict:
    """What stays the same over training: architecture, and names and shapes of every parameter (hashed)."""
    base = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    shapes = ";".join(f"{name}:{tuple(parameter.shape)}" for name, parameter in model.named_parameters())
    return {
        "architecture": (type(base).__bases__[-1] if isinstance(base, FSDPModule) else type(base)).__name__,
        "parameters": hashlib.sha256(shapes.encode()).hexdigest()[:16],
    }


def adapter_identity(model: nn.Module) -> dict | None:
    """Kind, rank and scaling of each active PEFT adapter; None without adapters."""
    configs = cast(Any, model).peft_config if _active_adapters(model) else {}
    active = {
        name: {"kind": str(configs[name].peft_type.value), "rank": configs[name].r, "alpha": configs[name].lora_alpha}
        for name in _active_adapters(model)
    }
    return active or None


def _active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters in use: a property of PEFT's models, a method of transformers' own."""
    if not getattr(model, "peft_config", None):
        return []
    active = cast(Any, model).active_adapters
    return list(active() if callable(active) else active)


def _as_layer(name: str, module: nn.Module) -> Layer | None:
    if isinstance(module, Conv1D):
        n_inputs, n_outputs = module.weight.shape
        return Layer(name, module, n_outputs, n_inputs)
    if isinstance(module, nn.Linear):
        return Layer(name, module, module.out_features, module.in_features)
    return None
