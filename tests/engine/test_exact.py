"""Exact dots and gradients are those autograd gives for each problem alone."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from gradstore.engine import Sketcher, SketchSpec
from gradstore.engine.gradients.exact import LayerGradients, exact_against, exact_dots, layer_gradients
from gradstore.engine.gradients.full_gradients import blocks
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.layers import find_layers
from gradstore.engine.gradients.objectives import PRESETS, Objective
from gradstore.engine.rollouts import Group
from gradstore.errors import RequestError
from gradstore.state import State
from tests.engine.conftest import ON_POLICY, own_gradient

ARCHITECTURES = ["qwen2", "llama", "gpt2", "qwen2-lora"]


def slow_gradient(model: nn.Module, group: Group, settings: Objective) -> list[torch.Tensor]:
    """Weight gradients of the sketched layers [O, I] for one problem, one rollout at a time, by autograd alone."""
    names = [layer.name for layer in find_layers(model)]
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # untied: the output layer's own gradient
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    advantages = group.rewards - group.rewards.mean()
    if settings.advantage == "mean_std":
        advantages = advantages / (group.rewards.std(ddof=1) + 1e-6)
    total = torch.zeros(())
    for advantage, response in zip(advantages, group.responses, strict=True):
        ids = torch.tensor([*group.prompt_ids, *response])[None]
        log_TV = model(input_ids=ids).logits[0].log_softmax(-1)[len(group.prompt_ids) - 1 : -1]
        logprob = log_TV.gather(1, torch.tensor(response)[:, None]).sum()
        share = 1 / len(response) if settings.aggregation == "seq-mean-token-mean" else 1
        total = total + advantage * share * logprob / len(group.responses)
    total.backward()
    return [own_gradient(model, name) for name in names]


def random_target(model: nn.Module, seed: int) -> LayerGradients:
    layers = find_layers(model)
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(layer.n_outputs, layer.n_inputs, generator=generator) for layer in layers]
    return LayerGradients([layer.name for layer in layers], matrices)


@pytest.mark.parametrize("norms", [False, True], ids=["streamed", "formed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dots_are_those_of_autograds_gradients(make_model, make_groups, architecture: str, norms: bool) -> None:
    """Layer by layer, target by target; without it `exact` is only a name."""
    model, groups = make_model(architecture), make_groups(4)
    targets = [random_target(model, 1), random_target(model, 2)]
    batch = exact_dots(model, groups, targets, norms=norms)
    assert batch.layers == targets[0].names
    assert batch.states == [State.LIVE] * 4
    for row, group in enumerate(groups):
        gradient = slow_gradient(model, group, PRESETS["gradalign"])
        length = sum(float(matrix.square().sum()) for matrix in gradient) ** 0.5
        expected_KL = [
            [float((matrix * wanted).sum()) for matrix, wanted in zip(gradient, target.matrices, strict=True)]
            for target in targets
        ]
        scale = length * max(target.norm for target in targets)
        assert np.abs(batch.terms[row] - expected_KL).max() < 1e-6 * scale
        if norms:
            assert batch.norms[row] == pytest.approx(length, rel=1e-5)
            cosines = [sum(terms) / length / target.norm for terms, target in zip(expected_KL, targets, strict=True)]
            assert batch.cosines[row] == pytest.approx(cosines, abs=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_in_blocks_are_the_layers(make_model, make_groups, monkeypatch, architecture: str) -> None:
    """What is formed a block at a time is what is formed at once: dots, norms, targets, a mean; and no block is larger
    than what may be held, save where one layer is."""
    model, (flat, *groups) = make_model(architecture), make_groups(5)
    flat = Group("flat", flat.prompt_ids, flat.responses, np.zeros(4))
    targets = [random_target(model, 1), layer_gradients(model, groups[:2])]
    whole = exact_dots(model, [*groups, flat], targets, norms=True)
    mean = layer_gradients(model, [*groups, flat])
    against = exact_dots(model, groups, mean, norms=True)
    layers = find_layers(model)
    sizes = [4 * layer.n_outputs * layer.n_inputs for layer in layers]
    limit = 2 * min(sizes)
    monkeypatch.setattr("gradstore.engine.gradients.full_gradients.formed_bytes", lambda model: limit)
    cuts = blocks(GradientPass(model, SketchSpec()))
    assert len(cuts) > 2
    assert [layer.name for _, part in cuts for layer in part.layers] == [layer.name for layer in layers]
    assert all(sum(sizes[cut]) <= limit or cut.stop - cut.start == 1 for cut, _ in cuts)
    found = exact_dots(model, [*groups, flat], targets, norms=True)
    np.testing.assert_allclose(found.terms, whole.terms, rtol=1e-4, atol=1e-6 * np.abs(whole.terms).max())
    np.testing.assert_allclose(found.norms, whole.norms, rtol=1e-5)
    assert found.states == whole.states
    assert found.n_tokens == whole.n_tokens
    for one, other in zip(layer_gradients(model, [*groups, flat]).matrices, mean.matrices, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6 * mean.norm)
    found = exact_against(model, groups, [*groups, flat])
    assert found.layers == against.layers
    np.testing.assert_allclose(found.cosines, against.cosines, atol=1e-5)
    np.testing.assert_allclose(found.terms, against.terms, rtol=1e-4, atol=1e-6 * np.abs(against.terms).max())


def test_a_target_that_points_nowhere_is_refused(make_model, make_groups) -> None:
    model, groups = make_model("qwen2"), make_groups(2)
    flat = Group("flat", groups[0].prompt_ids, groups[0].responses, np.zeros(4))
    for others, match in (([flat], "of the 1 groups has length 0"), ([], "of no groups")):
        with pytest.raises(RequestError, match=match):
            exact_against(model, groups, others)


@pytest.mark.parametrize("preset", ON_POLICY)
def test_mean_gradient_is_autograds(make_model, make_groups, preset: str) -> None:
    """The exact target is the mean of the problems' own gradients, one without signal counting as zero."""
    model, groups = make_model("qwen2"), make_groups(3)
    flat = Group("flat", groups[0].prompt_ids, groups[0].responses, np.ones(len(groups[0].responses)))
    found = layer_gradients(model, [*groups, flat], SketchSpec(objective=PRESETS[preset], token_budget=30))
    slow = [slow_gradient(model, group, PRESETS[preset]) for group in groups]
    for layer, matrix in enumerate(found.matrices):
        expected = sum(gradient[layer] for gradient in slow) / 4
        assert (matrix - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("norms", [False, True], ids=["streamed", "formed"])
def test_batching_and_shared_prompts_do_not_matter(make_model, make_groups, norms: bool) -> None:
    """An exact score must not depend on how the tokens are packed."""
    model, groups = make_model("qwen2"), make_groups(5)
    target = layer_gradients(model, make_groups(3, seed=9))
    plain = exact_dots(model, groups, target, SketchSpec(share_prompts=False), norms=norms)
    for budget, shared in ((1, True), (40, True), (1000, True), (25, False)):
        other = exact_dots(model, groups, target, SketchSpec(token_budget=budget, share_prompts=shared), norms=norms)
        assert np.abs(other.dots - plain.dots).max() < 1e-5 * np.abs(plain.dots).max()


def test_a_kept_side_sketch_is_exact(make_model, make_groups) -> None:
    """Bases as wide as the layers keep everything: sketch and exact mode must then agree about every cosine."""
    model, groups = make_model("llama"), make_groups(4)
    spec = SketchSpec(rank=64)
    target = layer_gradients(model, groups[:1], spec)
    batch = Sketcher(model, spec).sketch(groups)
    units = batch.sketches / np.linalg.norm(batch.sketches, axis=1, keepdims=True)
    exact = exact_dots(model, groups, target, spec, norms=True)
    assert exact.norms == pytest.approx(np.linalg.norm(batch.sketches, axis=1), rel=1e-5)
    assert exact.cosines[:, 0] == pytest.approx(units @ units[0], abs=1e-5)


def test_problems_without_signal_and_failed_ones_are_told_apart(make_model, make_groups) -> None:
    """A zero is not a score, and one broken problem must not reach the others."""
    model, groups = make_model("llama"), make_groups(3)
    target = layer_gradients(model, groups)
    flat = Group("flat", groups[0].prompt_ids, groups[0].responses, np.ones(len(groups[0].responses)))
    token = int(groups[1].prompt_ids[0])
    clean = [g for g in groups if not any(token in ids for ids in (g.prompt_ids, *g.responses))]
    expected = exact_dots(model, clean, target).dots
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    for norms in (False, True):
        batch = exact_dots(model, [flat, groups[1], *clean], target, norms=norms)
        assert batch.states[:2] == [State.NO_SIGNAL, State.FAILED]
        assert batch.reasons[1] == "the gradient is not finite"
        assert not batch.terms[:2].any()
        assert batch.dots[2:] == pytest.approx(expected, rel=1e-4)
    assert np.isnan(batch.cosines[:2]).all()


def test_the_model_is_left_as_it_was_found(make_model, make_groups) -> None:
    """The policy of a live trainer is measured between two of its steps."""
    model = make_model("qwen2").train()
    before = copy.deepcopy(model.state_dict())
    exact_dots(model, make_groups(2), layer_gradients(model, make_groups(2)), norms=True)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_target_over_other_layers_is_refused(make_model, make_groups) -> None:
    """Dots over different layers would be silently smaller."""
    model, groups = make_model("qwen2"), make_groups(1)
    target = layer_gradients(model, groups, SketchSpec(modules=("q_proj",)))
    with pytest.raises(RequestError, match="the target is over 4 layers, the spec sketches 26"):
        exact_dots(model, groups, target)
    wrong = random_target(model, 0)
    wrong.matrices[0] = wrong.matrices[0][:-1]
    with pytest.raises(RequestError, match=r"q_proj has shape \(31, 32\), expected \(32, 32\)"):
        exact_dots(model, groups, wrong)
    with pytest.raises(RequestError, match="no groups"):
        layer_gradients(model, [])
    with pytest.raises(RequestError, match="norms=True"):
        _ = exact_dots(model, groups, random_target(model, 0)).cosines
