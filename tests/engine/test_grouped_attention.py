"""Heads that share keys and values, folded into one, against keys and values repeated for each head."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gradstore.engine.gradients import grouped_attention
from gradstore.engine.gradients.grouped_attention import NAME


@pytest.mark.parametrize("n_shared", [1, 2, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_the_same_attention_and_gradients(n_shared: int, masked: bool) -> None:
    """A head's queries in another's place, or a mask row out of step, would show in every output."""
    torch.manual_seed(0)
    module = SimpleNamespace(num_key_value_groups=4 // n_shared, is_causal=True)
    shapes = (3, 4, 5, 8), (3, n_shared, 9 if masked else 5, 8), (3, n_shared, 9 if masked else 5, 8)
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    mask = torch.rand(3, 1, 5, 9) < 0.7 if masked else None
    if mask is not None:
        mask[..., 0] = True
    weights = torch.randn(3, 5, 4, 8)
    outcomes = []
    for attend in (grouped_attention._attend, sdpa_attention_forward):
        found, _ = attend(module, *given, mask, scaling=0.3)
        outcomes.append([found, *torch.autograd.grad((found * weights).sum(), given)])
    for own, wanted in zip(*outcomes, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_a_model_attends_as_before_afterwards(kind: str) -> None:
    """The model may be a trainer's, which goes on with it; one that attends in another way keeps to that."""
    config = Qwen2Config(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, attn_implementation=kind,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with pytest.raises(KeyError), grouped_attention.grouped_attention(model.config):
        assert model.config._attn_implementation == (NAME if kind == "sdpa" else kind)
        raise KeyError
    assert model.config._attn_implementation == kind
