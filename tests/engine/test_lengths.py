"""Sketches at lengths where windows, rope scaling and padding show equal a plain loop over unpadded sequences."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from gradstore.engine.rollouts import Group
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchSpec
from tests.engine.test_mixtures import _plain, _projected

_SHARED: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SHARED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_SHARED, sliding_window=16)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_SHARED, head_dim=8, sliding_window=16)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**_SHARED, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    ),
    "phi3-longrope": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(**_SHARED, rope_scaling=_LONGROPE, original_max_position_embeddings=32)
    ),
    "llama-yarn": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SHARED, rope_scaling=_YARN)),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4, tie_word_embeddings=False)
    ),
    "gpt-oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**_SHARED, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=16)
    ),
}


def _groups(n: int = 4) -> list[Group]:
    random = np.random.default_rng(0)
    groups = []
    for i in range(n):
        responses = [random.integers(1, 61, random.integers(5, 41)) for _ in range(4)]
        prompt = random.integers(1, 61, (14, 24, 40, 60)[i % 4])
        groups.append(Group(f"p{i}", prompt, responses, np.array([1.0, 0.0, 0.0, 1.0])))
    return groups


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("growth", [1.0, 3.0])
def test_sketches_at_real_lengths_are_those_of_sequences_alone(name: str, growth: float, caplog) -> None:
    """A shortcut that is exact on a few tokens only must not be taken, and giving it up is said once."""
    torch.manual_seed(3)
    model = MODELS[name]().float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(growth) if parameter.ndim >= 2 else None
    sketcher = Sketcher(model, SketchSpec(rank=4, token_budget=512, share_prompts=True))
    groups = _groups()
    found = sketcher.sketch(groups).sketches
    layers = sketcher.gradients.layers
    for row, group in zip(found, groups, strict=True):
        plain = _projected(sketcher.projection, layers, _plain(model, group, [layer.weight for layer in layers]))
        assert np.linalg.norm(row - plain) <= 1e-4 * np.linalg.norm(plain)
    sketcher.sketch(groups)
    said = [record.message for record in caplog.records if "not exact" in record.message]
    assert len(said) == len(set(said)) == len(sketcher.policy.fallbacks)
    assert sketcher.policy.shares_prompts or said
    if name in ("llama", "llama-yarn"):
        assert sketcher.policy.shares_prompts
