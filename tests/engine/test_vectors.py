"""Norm weights and biases in the sketch, against autograd over the model's own parameters."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, OlmoeConfig, Qwen3Config, Qwen3NextConfig

from gradstore.engine import Sketcher, SketchSpec, layer_gradients
from gradstore.engine.gradients.layers import find_layers
from gradstore.engine.gradients.vectors import Vector, vectors_of
from gradstore.errors import RequestError
from tests.engine.conftest import own_gradient, random_groups, random_model
from tests.engine.test_sketcher import slow_objective

SIZE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CONFIGS = {
    "gemma2": Gemma2Config(**SIZE, query_pre_attn_scalar=8),  # norms of (1 + w)
    "qwen3": Qwen3Config(**SIZE),  # norms of each head
    "llama-biased": LlamaConfig(**SIZE, attention_bias=True, mlp_bias=True),
    "olmoe": OlmoeConfig(**SIZE, num_experts=4, num_experts_per_tok=2),
    "qwen3-next": Qwen3NextConfig(
        **SIZE,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),  # a norm with a gate
}


def made(name: str) -> nn.Module:
    """A random model whose vectors are not their initial ones and zeros."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).float().eval() if name in CONFIGS else random_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def vectors(model: nn.Module) -> list:
    return [layer for layer in find_layers(model) if layer.vector is not None]


@pytest.mark.parametrize("shares", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", *CONFIGS])
def test_a_vectors_gradient_is_autograds(name: str, shares: bool) -> None:
    """Each problem's own, whatever the micro-batch and its padding."""
    model, groups = made(name), random_groups(3)
    spec = SketchSpec(rank=128, token_budget=70, share_prompts=shares)
    sketcher = Sketcher(model, spec)
    found = sketcher.sketch(groups).sketches
    for row, group in zip(found, groups, strict=True):
        slow = copy.deepcopy(model).requires_grad_(True)
        slow_objective(slow, group, spec.objective).backward()
        for layer, basis in zip(sketcher.gradients.layers, sketcher.projection.layers, strict=True):
            if layer.vector is not None:
                gradient_W = own_gradient(slow, layer.name).flatten().numpy()
                error = np.linalg.norm(row[basis.start : basis.stop] - gradient_W)
                assert error < 1e-4 * np.linalg.norm(gradient_W) + 1e-7, layer.name


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma2", "qwen3", "llama-biased", "olmoe"])
def test_every_norm_and_bias_is_seen(name: str) -> None:
    model = made(name)
    seen = {id(layer.weight) for layer in vectors(model)}
    assert seen == {id(parameter) for parameter in model.parameters() if parameter.ndim == 1}


def test_exact_gradients_have_them_too() -> None:
    """A target without them would ask another question than the rows answer."""
    model, groups = made("qwen3"), random_groups(2)
    found = layer_gradients(model, groups)
    assert found.names == [layer.name for layer in find_layers(model)]
    slow = copy.deepcopy(model).requires_grad_(True)
    (sum(slow_objective(slow, group, SketchSpec().objective) for group in groups) / 2).backward()
    for name, matrix in zip(found.names, found.matrices, strict=True):
        if name != "lm_head":  # tied or not, the lookup's gradient is no part of it
            torch.testing.assert_close(matrix, own_gradient(slow, name), rtol=1e-3, atol=1e-6)


def test_the_model_keeps_its_vectors() -> None:
    model = made("gemma2")
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    Sketcher(model, SketchSpec(rank=4)).sketch(random_groups(2))
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_a_store_made_without_them_keeps_being_so() -> None:
    """The fingerprint of stores made before says nothing of vectors."""
    model = made("llama")
    before = Sketcher(model, SketchSpec(rank=4, vectors=False))
    assert "vectors" not in before.fingerprint
    assert not SketchSpec.of(before.fingerprint).vectors
    now = Sketcher(model, SketchSpec(rank=4))
    assert now.fingerprint["vectors"] is True
    assert SketchSpec.of(now.fingerprint).vectors
    assert len(now.gradients.layers) == len(before.gradients.layers) + len(vectors(model))


def test_adapters_have_none_of_the_model_below() -> None:
    model = random_model("qwen2-lora")
    assert not vectors(model)
    assert "vectors" not in Sketcher(model, SketchSpec(rank=4)).fingerprint


class _Powers(nn.Module):
    """Not linear in its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs() ** self.weight


def test_what_is_not_elementwise_is_left_out() -> None:
    """The coverage names it then; a wrong gradient would be worse."""
    assert vectors_of(_Powers()) == {}
    assert vectors_of(nn.Conv1d(8, 8, 3)) == {}
    assert vectors_of(nn.BatchNorm1d(8)) == {}
    assert vectors_of(nn.LayerNorm(8)) == {"weight": Vector("scale"), "bias": Vector("shift")}
    assert vectors_of(nn.RMSNorm(8)) == {"weight": Vector("scale")}


def test_a_model_of_vectors_alone_is_refused() -> None:
    model = made("llama")
    with pytest.raises(RequestError, match="no linear layer"):
        Sketcher(model, SketchSpec(modules=("norm",), vectors=False))
    only = Sketcher(model, SketchSpec(rank=4, modules=("norm",)))
    assert len(only.gradients.layers) == 5
    assert np.linalg.norm(only.sketch(random_groups(1)).sketches) > 0
