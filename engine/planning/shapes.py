"""A model's shape from its configuration, without its weights. All costs are computed from it.

The model is built on the `meta` device, where a parameter has a shape but no memory. The counted layers are those that
`find_layers` selects for a sketch. A configuration is a folder, a config.json, or one of the names below, with values
from the published config.json files.

Dimension letters: O and I a layer's outputs and inputs.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gradstore.engine.gradients.budget import activation_bytes, key_value_bytes
from gradstore.engine.gradients.layers import find_layers, head_of, linear_outputs, text_config
from gradstore.errors import RequestError, first_line
from gradstore.reading.files import read_object


def _qwen(kind: str, layers: int, hidden: int, between: int, heads: int, groups: int, tied: bool, **more: Any) -> dict:
    """A configuration of Qwen2, Qwen3 or Llama, which use the same field names."""
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": between,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "tie_word_embeddings": tied,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        **more,
    }


_QWEN3 = {"head_dim": 128, "max_position_embeddings": 40_960}
_SMOL = {"vocab_size": 49_152, "max_position_embeddings": 8192}
_LLAMA3 = {"vocab_size": 128_256, "max_position_embeddings": 131_072}
_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}

KNOWN: dict[str, dict] = {
    "Qwen2.5-0.5B": _qwen("qwen2", 24, 896, 4864, 14, 2, True),
    "Qwen2.5-1.5B": _qwen("qwen2", 28, 1536, 8960, 12, 2, True),
    "Qwen2.5-3B": _qwen("qwen2", 36, 2048, 11_008, 16, 2, True),
    "Qwen2.5-7B": _qwen("qwen2", 28, 3584, 18_944, 28, 4, False, vocab_size=152_064),
    "Qwen2.5-14B": _qwen("qwen2", 48, 5120, 13_824, 40, 8, False, vocab_size=152_064),
    "Qwen2.5-32B": _qwen("qwen2", 64, 5120, 27_648, 40, 8, False, vocab_size=152_064),
    "Qwen3-0.6B": _qwen("qwen3", 28, 1024, 3072, 16, 8, True, **_QWEN3),
    "Qwen3-1.7B": _qwen("qwen3", 28, 2048, 6144, 16, 8, True, **_QWEN3),
    "Qwen3-4B": _qwen("qwen3", 36, 2560, 9728, 32, 8, True, **_QWEN3),
    "Qwen3-8B": _qwen("qwen3", 36, 4096, 12_288, 32, 8, False, **_QWEN3),
    "Qwen3-14B": _qwen("qwen3", 40, 5120, 17_408, 40, 8, False, **_QWEN3),
    "Qwen3-32B": _qwen("qwen3", 64, 5120, 25_600, 64, 8, False, **_QWEN3),
    "Qwen3-30B-A3B": _qwen("qwen3_moe", 48, 2048, 6144, 32, 4, False, **_QWEN3, **_EXPERTS),
    "Llama-3.2-1B": _qwen("llama", 16, 2048, 8192, 32, 8, True, head_dim=64, **_LLAMA3),
    "Llama-3.2-3B": _qwen("llama", 28, 3072, 8192, 24, 8, True, head_dim=128, **_LLAMA3),
    "Llama-3.1-8B": _qwen("llama", 32, 4096, 14_336, 32, 8, False, **_LLAMA3),
    "SmolLM2-135M": _qwen("llama", 30, 576, 1536, 9, 3, True, **_SMOL),
    "SmolLM2-360M": _qwen("llama", 32, 960, 2560, 15, 5, True, **_SMOL),
    "SmolLM2-1.7B": _qwen("llama", 24, 2048, 8192, 32, 32, True, **_SMOL),
}
"""Configurations by the last part of the hub name; variants such as `-Base` and `-Instruct` have the same shape."""

_VARIANTS = ("-Instruct", "-Base", "-Math", "-Coder", "-it")


@dataclass(frozen=True, slots=True)
class SketchedLayer:
    """One layer that a sketch sees."""

    n_outputs: int
    n_inputs: int
    uses: float = 1.0
    """Matrices of the layer that a token goes through: 1, or the number of experts chosen per token."""
    n_matrices: int = 1
    """1, or the number of experts of a fused weight."""

    @property
    def n_weights(self) -> int:
        """Entries of the weight."""
        return self.n_matrices * self.n_outputs * self.n_inputs


@dataclass(frozen=True, slots=True)
class ModelShape:
    """All properties of a model that costs depend on."""

    name: str
    n_parameters: int
    body_weights: int
    """Entries of the linear layers that a token is multiplied with, without the output layer."""
    head_weights: int
    """Entries of the output layer."""
    layers: tuple[SketchedLayer, ...]
    """The sketched layers; they include the output layer if it is sketched."""
    n_blocks: int
    """Transformer blocks."""
    attention_width: int
    """Number of heads times their width, in one block."""
    vocabulary: int
    hidden: int
    itemsize: int
    """Bytes of a weight."""
    kept_bytes: int
    """Bytes that autograd keeps per token if weights are frozen."""
    kept_bytes_with_inputs: int
    """The same if the layers' inputs are kept too, as weight gradients need."""
    key_value_bytes: int
    """Bytes of a token's keys and values in all blocks."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return self.n_parameters * self.itemsize


def shape_of(name: str, *, dtype: torch.dtype = torch.bfloat16) -> ModelShape:
    """The shape of a model, given as a folder, a config.json or a known name; no weight is read.

    RequestError for any other name, and for a configuration that is not of a causal language model.
    """
    return measured_shape(_on_meta(name, dtype), name)


def measured_shape(model: nn.Module, name: str) -> ModelShape:
    """The shape of a loaded model, on any device."""
    text = text_config(model)
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    head = head_of(model)
    head_weights = 0 if head is None else cast(nn.Parameter, head.weight).numel()
    body = sum(
        cast(nn.Parameter, module.weight).numel()
        for module in model.modules()
        if module is not head and linear_outputs(module)
    )
    body += chosen * sum(prod(parameter.shape[1:]) for parameter in model.parameters() if parameter.ndim == 3)
    layers = tuple(
        SketchedLayer(layer.n_outputs, layer.n_inputs, float(chosen if layer.n_experts else 1), layer.n_experts or 1)
        for layer in find_layers(model)
    )
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(
        name,
        sum(parameter.numel() for parameter in model.parameters()),
        body,
        head_weights,
        layers,
        text.num_hidden_layers,
        heads * width,
        text.vocab_size,
        text.hidden_size,
        next(model.parameters()).itemsize,
        activation_bytes(model),
        activation_bytes(model, inputs_kept=True),
        key_value_bytes(model),
    )


def _on_meta(name: str, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = _settings(name)
    try:
        config = AutoConfig.for_model(**settings)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise RequestError(f"{name}: not the configuration of a causal language model: {first_line(error)}") from None
    return model.eval()


def _settings(name: str) -> dict:
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        found = read_object(file)
        if "model_type" not in found:
            raise RequestError(f"{file}: expected a model's configuration with its `model_type`")
        return found
    last = name.rsplit("/", 1)[-1]
    for variant in _VARIANTS:
        last = last.replace(variant, "")
    if last not in KNOWN:
        raise RequestError(
            f"{name}: neither a model's folder, nor a config.json, nor a known shape: give one of the first two, or "
            f"one of {', '.join(KNOWN)}"
        )
    return dict(KNOWN[last])
