"""Which layers of a model are sketched, and what identifies the model in a store's fingerprint."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.pytorch_utils import Conv1D

from gradstore.engine.gradients.adapters import active_adapters, active_copy, is_idle, is_trained
from gradstore.engine.gradients.experts import PRODUCTS, is_dispatched
from gradstore.engine.gradients.vectors import Vector, vectors_of
from gradstore.errors import RequestError


@dataclass(frozen=True, slots=True)
class Slots:
    """Where a layer inside experts is observed: in a fused weight's products, one row per token and chosen expert.

    The layer is the fused weight itself, or one of the two LoRA matrices of all its experts (PEFT's `ParamWrapper`).
    """

    experts: nn.Module
    """The module that transformers' experts interface dispatches."""
    product: str
    """Name of the fused weight: gate_up_proj, up_proj or down_proj."""
    n_experts: int
    factor: Literal["A", "B"] | None = None
    """Which LoRA matrix the layer is; None: the fused weight."""
    other: nn.Module | None = None
    """The layer of the other LoRA matrix."""
    scaling: float = 1.0
    """Factor of the adapter's matrix product."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer computing x W^T: an nn.Linear (any subclass), GPT-2's Conv1D, a router or another module that uses its
    weight directly, or a fused weight of several experts. Some parameters are treated as such a layer: an embedding, a
    norm's weight (one output), a bias (one input)."""

    name: str
    module: nn.Module
    n_outputs: int
    n_inputs: int
    parameter: str = "weight"
    """Name of the weight in its module."""
    is_transposed: bool = False
    """Whether W is stored as [I, O]."""
    is_called: bool = True
    """Whether calling the module computes the product; False if the module's own forward uses the weight."""
    slots: Slots | None = None
    """Where the layer is observed, if not in a call of its module."""
    is_embedding: bool = False
    """Whether the layer is a lookup. It is treated as a fused weight with one expert per token id, and input 1."""
    vector: Vector | None = None
    """How a vector acts: a scale [W] has W inputs and one output, of gradient 1; a shift [W] has W outputs and one
    input, 1."""

    @property
    def weight(self) -> nn.Parameter:
        """The parameter whose gradient is observed, in its stored shape."""
        return cast(nn.Parameter, getattr(self.module, self.parameter))

    @property
    def n_experts(self) -> int | None:
        """Experts of a fused weight, or rows of an embedding; None for every other layer."""
        if self.is_embedding:
            return int(self.weight.shape[0])
        return self.slots.n_experts if self.slots and self.slots.factor is None else None

    @property
    def shape(self) -> tuple[str, int, int] | tuple[str, int, int, int]:
        """(name, O, I), or (name, O, I, E) with experts: determines a projection of the layer."""
        shape = self.name, self.n_outputs, self.n_inputs
        return shape if self.n_experts is None else (*shape, self.n_experts)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of the formed gradient: (O, I), or (E, O, I) for a fused weight of E experts."""
        return (*(() if self.n_experts is None else (self.n_experts,)), self.n_outputs, self.n_inputs)

    def oriented(self, stored: Tensor) -> Tensor:
        """A tensor in the weight's stored shape, rearranged to [O, I] or [E, O, I]."""
        if self.is_embedding:
            return stored[..., None]
        if self.vector is not None:
            return stored[..., None, :] if self.vector.acts == "scale" else stored[..., None]
        return stored.transpose(-2, -1) if self.is_transposed else stored


def find_layers(
    model: nn.Module, patterns: Sequence[str] | None = None, *, embeddings: bool = False, vectors: bool = True
) -> list[Layer]:
    """The layers to sketch, in the model's order.

    Without patterns, a model with adapters gives the trained layers of the active ones: LoRA matrices, and the layers
    in `modules_to_save`. Any other model gives every linear layer, including the output layer, routers and fused
    experts. With patterns: the layers whose name matches one of the regular expressions. embeddings: also the input
    embedding. vectors: also norm weights and biases. RequestError if no layer is left, for adapters of parameters that
    are not fused experts, and for an embedding that does more than look rows up.
    """
    embedding = input_embedding(model) if embeddings else None
    active, adapted = active_adapters(model), _adapted_experts(model)
    layers = [
        replace(layer, slots=adapted.get(id(layer.module), layer.slots))
        for name, module in model.named_modules()
        if not is_idle(name, active)
        for layer in (
            [_embedding(name, module)] if embedding is not None and module is embedding else _layers_of(name, module)
        )
        if vectors or layer.vector is None
    ]
    if patterns:
        layers = [layer for layer in layers if any(re.search(pattern, layer.name) for pattern in patterns)]
        if not layers:
            raise RequestError(f"no linear layer of the model matches {', '.join(patterns)}")
        return layers
    if all(layer.vector is not None for layer in layers):
        raise RequestError("the model has no nn.Linear or Conv1D layer to sketch")
    trained = [layer for layer in layers if is_trained(layer.name, active)]
    if not trained:
        _check_experts(model)
    return trained or layers


def input_embedding(model: nn.Module) -> nn.Module:
    """The input embedding module."""
    return active_copy(cast(Any, model).get_input_embeddings(), active_adapters(model))


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a model with PEFT adapters; any other model itself."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's text part, where it has other parts too."""
    config = cast(Any, getattr(model, "config", None))
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def output_layer(model: nn.Module) -> Layer:
    """The layer that computes the logits; RequestError if it is not a separate linear layer."""
    base = base_of(model)
    head = active_copy(cast(Any, base).get_output_embeddings(), active_adapters(model))
    for name, module in model.named_modules():
        if module is head and (layer := _as_layer(name, module)):
            return layer
    raise RequestError(f"the output layer of {type(base).__name__} is a {type(head).__name__}, not a linear layer")


def head_of(model: nn.Module) -> nn.Module | None:
    """The module that computes the logits; None if the model names none."""
    base = base_of(model)
    return cast(Any, base).get_output_embeddings() if hasattr(base, "get_output_embeddings") else None


def linear_outputs(module: nn.Module) -> int:
    """Outputs of a linear layer; 0 for any other module."""
    layer = _as_layer("", module)
    return layer.n_outputs if layer else 0


def model_identity(model: nn.Module) -> dict:
    """What training does not change: the architecture, and a hash of all parameter names and shapes."""
    base = base_of(model)
    shapes = ";".join(f"{name}:{tuple(parameter.shape)}" for name, parameter in model.named_parameters())
    return {
        "architecture": (type(base).__bases__[-1] if isinstance(base, FSDPModule) else type(base)).__name__,
        "parameters": hashlib.sha256(shapes.encode()).hexdigest()[:16],
    }


def _layers_of(name: str, module: nn.Module) -> list[Layer]:
    if is_dispatched(module):
        return [_fused(name, cast(Any, module), product) for product in PRODUCTS if hasattr(module, product)]
    layer, vectors = _as_layer(name, module), vectors_of(module)
    if layer is not None and layer.is_called and module._parameters.get("bias") is not None:
        vectors = {"bias": Vector("shift")}
    return ([layer] if layer else []) + [_vector(name, module, *pair) for pair in vectors.items()]


def _vector(name: str, module: nn.Module, parameter: str, vector: Vector) -> Layer:
    """The layer of a vector. A norm's weight has its module's name, as other layers do; a bias has its own name."""
    width = len(cast(nn.Parameter, module._parameters[parameter]))
    n_outputs, n_inputs = (1, width) if vector.acts == "scale" else (width, 1)
    full = name if parameter == "weight" else f"{name}.{parameter}"
    return Layer(full, module, n_outputs, n_inputs, parameter, vector=vector)


def _as_layer(name: str, module: nn.Module) -> Layer | None:
    if isinstance(module, Conv1D):
        n_inputs, n_outputs = module.weight.shape
        return Layer(name, module, n_outputs, n_inputs, is_transposed=True)
    if isinstance(module, nn.Linear):
        is_plain = type(module).forward is nn.Linear.forward  # a router may be a Linear that returns more than logits
        return Layer(name, module, module.out_features, module.in_features, is_called=is_plain)
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Layer(name, module, weight.shape[0], weight.shape[1], is_called=False)
    return None


def _embedding(name: str, module: nn.Module) -> Layer:
    if type(module).forward is not nn.Embedding.forward:
        raise RequestError(f"{name} ({type(module).__name__}) does more than look rows up: leave `embeddings` out")
    return Layer(name, module, cast(Any, module).embedding_dim, 1, is_embedding=True)


def _fused(name: str, experts: Any, product: str) -> Layer:
    """The layer of a fused weight, [E, O, I], or [E, I, O] if the module says so."""
    n_experts, n_outputs, n_inputs = getattr(experts, product).shape
    if experts.is_transposed:
        n_outputs, n_inputs = n_inputs, n_outputs
    slots = Slots(experts, product, n_experts)
    return Layer(f"{name}.{product}", experts, n_outputs, n_inputs, product, experts.is_transposed, slots=slots)


def _adapted_experts(model: nn.Module) -> dict[int, Slots]:
    """Where the LoRA matrices of fused experts are observed, by id of the layer that holds each.

    PEFT adapts a parameter by adding B A to it: the layers that hold A and B are never called.
    """
    found: dict[int, Slots] = {}
    for name, module in model.named_modules():
        if not (hasattr(module, "parameter_name") and hasattr(module, "lora_A")):
            continue
        wrapper = cast(Any, module)
        experts, product = wrapper.get_base_layer(), wrapper.parameter_name
        if not is_dispatched(experts) or product not in PRODUCTS or wrapper.num_experts == 1:
            raise RequestError(
                f"{name} adapts the parameter {product} of a {type(experts).__name__}, which is not a fused weight of "
                "experts that transformers' experts interface runs: its adapter cannot be sketched; adapt the layer by "
                "`target_modules`, or choose other layers with `modules`"
            )
        if not (experts.is_transposed or getattr(wrapper, "_did_swap_in_out_features", False)):
            raise RequestError(f"{name}: this version of peft puts lora_A on the outputs of experts; use a newer one")
        for adapter, a in wrapper.lora_A.items():
            b, scaling = wrapper.lora_B[adapter], wrapper.scaling[adapter]
            found[id(a)] = Slots(experts, product, wrapper.num_experts, "A", b, scaling)
            found[id(b)] = Slots(experts, product, wrapper.num_experts, "B", a, scaling)
    return found


def _check_experts(model: nn.Module) -> None:
    """Raise RequestError for experts whose products cannot be observed (Llama 4, Granite, JetMoE, DBRX)."""
    for name, module in model.named_modules():
        kind, fused = type(module).__name__, [p for p in module.parameters(recurse=False) if p.ndim > 1]
        if fused and "expert" in kind.lower() and not is_dispatched(module) and not isinstance(module, nn.Linear):
            raise RequestError(
                f"{name} ({kind}) holds weights of several experts and is not run by transformers' experts interface, "
                "so that their gradients cannot be seen; sketch the other layers alone with `modules` (--modules) '.'"
            )
