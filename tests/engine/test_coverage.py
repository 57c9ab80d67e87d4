"""Coverage: what of the trained gradient a sketch sees, against autograd over every parameter."""

from dataclasses import replace

import peft
import pytest
import torch
from torch import nn

from gradstore.engine import SketchSpec
from gradstore.engine.gradients.coverage import Coverage, LeftOut, measure, seeing_enough
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.errors import RequestError
from tests.engine.test_sketcher import slow_objective


def _measured(model: nn.Module, groups, **spec) -> Coverage:
    return measure(GradientPass(model, SketchSpec(rank=4, token_budget=512, **spec)), groups)


def _slow_shares(model: nn.Module, groups) -> dict[str, float]:
    """Mean share of each parameter in the squared gradient, one autograd call for each group."""
    named = [(name, p.requires_grad_(True)) for name, p in model.named_parameters()]
    totals = dict.fromkeys((name for name, _ in named), 0.0)
    for group in groups:
        value = slow_objective(model, group, SketchSpec().objective)
        squares = [float(g.square().sum()) for g in torch.autograd.grad(value, [p for _, p in named])]
        for (name, _), square in zip(named, squares, strict=True):
            totals[name] += square / sum(squares) / len(groups)
    return totals


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_shares_are_those_of_autograd(make_model, make_groups, architecture: str) -> None:
    groups = make_groups(4)
    model = make_model(architecture)
    if architecture == "gpt2":  # untied: autograd gives each use of a weight its own gradient
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    found, slow = _measured(model, groups), _slow_shares(model, groups)
    seen = GradientPass(model, SketchSpec()).layers
    layers = {f"{layer.name.removesuffix('.bias')}.{layer.parameter}" for layer in seen}
    assert found.n_groups == 4
    assert found.gradient == pytest.approx(sum(slow[name] for name in layers), rel=1e-4)
    n = {name: p.numel() for name, p in model.named_parameters()}
    assert found.parameters == pytest.approx(sum(n[name] for name in layers) / sum(n.values()))
    assert found.gradient + sum(part.gradient for part in found.left_out) == pytest.approx(1)


def test_a_tied_weight_counts_as_two(make_model, make_groups) -> None:
    """The sketch sees the output layer's gradient of it, and not the lookup's."""
    tied, untied = make_model("qwen2"), make_model("qwen2")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    one, other = _measured(tied, make_groups(3)), _measured(untied, make_groups(3))
    assert one.gradient == pytest.approx(other.gradient, rel=1e-5)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_the_model_is_left_as_it_was(make_model, make_groups) -> None:
    model = make_model("qwen2")
    model.model.norm.weight.requires_grad_(False)
    model.train()
    kept = model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    _measured(model, make_groups(2))
    assert model.training
    assert model.lm_head.weight.grad is kept
    for name, p in model.named_parameters():
        assert p.requires_grad == before[name][0]
        assert torch.equal(p, before[name][1])


@pytest.mark.parametrize(
    ("options", "whole"),
    [({}, True), ({"modules_to_save": ["lm_head"]}, True), ({"modules_to_save": ["embed_tokens"]}, False)],
)
def test_of_adapters_everything_that_trains_counts(make_model, make_groups, options: dict, whole: bool) -> None:
    model = make_model("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], **options))
    for frozen_to_load in (False, True):
        if frozen_to_load:
            model.requires_grad_(False)
        found = _measured(model, make_groups(2))
        assert (found.share == pytest.approx(1)) == whole
        if not whole:
            with pytest.raises(RequestError, match=r"embed_tokens.*accept_coverage=0"):
                found.require(0.95)
            found.require(0.0)


def test_a_lookup_of_a_whole_model_is_no_exception(make_model, make_groups) -> None:
    """A small model's embedding holds much of its gradient: refused, by name; with it everything is seen."""
    found = _measured(make_model("llama"), make_groups(2))
    assert [part.name for part in found.left_out] == ["model.embed_tokens.weight"]
    with pytest.raises(RequestError, match=r"left out: model\.embed_tokens\.weight .*--embeddings"):
        found.require(0.95)
    whole = _measured(make_model("llama"), make_groups(2), embeddings=True)
    assert (whole.share, whole.parameters, whole.left_out) == (pytest.approx(1), 1.0, ())


def test_layers_that_are_not_seen_are_named(make_model, make_groups) -> None:
    found = _measured(make_model("llama"), make_groups(2), modules=("q_proj",))
    assert found.share < 0.5
    with pytest.raises(RequestError, match=r"model\.layers\.\*\.self_attn\.o_proj\.weight"):
        found.require(0.95)


def test_without_a_gradient_parameters_count(make_model) -> None:
    found = _measured(make_model("llama"), [], modules=("q_proj",))
    assert found.gradient is None
    assert found.share < 0.2


class _Packed(nn.Module):
    """Weights as quantisers keep them: integers that a hook on linear layers never meets."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scales", scale.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales)


@pytest.mark.parametrize("which", ["down_proj", "proj"])
def test_packed_weights_are_refused_by_name(make_model, make_groups, which: str) -> None:
    """What is left of a quantised model, its head, is no policy gradient; chosen layers are."""
    model = make_model("llama")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name.endswith(which):
                setattr(module, name, _Packed(child))
    with pytest.raises(RequestError, match=r"packed integers.*down_proj\.qweight"):
        GradientPass(model, SketchSpec())
    found = _measured(model, make_groups(2), modules=("lm_head",))
    assert found.parameters < 0.5


def test_a_share_is_floored_in_what_it_asks_for() -> None:
    coverage = Coverage(0.5, 0.8196, 1, (LeftOut("x", 0.5, 0.1804),))
    with pytest.raises(RequestError, match=r"--accept-coverage 0\.81$"):
        coverage.require(0.95, "--accept-coverage ")


def test_an_embedding_is_sketched_where_too_little_is_seen_without_it(make_model, make_groups) -> None:
    model, groups, spec = make_model("llama"), make_groups(2), SketchSpec(rank=4)
    chosen, coverage = seeing_enough(model, spec, groups, 0.95)
    assert chosen == replace(spec, embeddings=True)
    assert coverage.share == pytest.approx(1)
    chosen, coverage = seeing_enough(model, spec, groups, 0.5)
    assert chosen == spec
    assert 0.5 < coverage.share < 0.95


def test_where_no_gradient_was_measured_a_lookups_size_says_nothing(make_model) -> None:
    """An eighth of an 8B model's parameters are rows of tokens that a batch does not have."""
    found = _measured(make_model("llama"), [])
    assert found.gradient is None
    assert found.parameters == pytest.approx(1 - found.lookups)
    assert found.parameters < 0.95
    assert found.share == pytest.approx(1)
    assert Coverage.of(found.describe()) == found
