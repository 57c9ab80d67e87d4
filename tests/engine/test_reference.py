"""The KL term to a reference policy, as GRPO has it and LearnAlign's gradients do."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from gradstore import State
from gradstore.engine import (
    Objective,
    Probe,
    Reference,
    Sketcher,
    SketchSpec,
    exact_dots,
    layer_gradients,
    objective,
    validation_gradient,
)
from gradstore.engine.rollouts import Group
from gradstore.errors import RequestError
from tests.engine.conftest import own_gradient
from tests.engine.test_sketcher import relative_error, slow_advantages, slow_sketch

BETA = 0.7
SETTINGS = {
    "grpo": objective("grpo", kl_beta=BETA),
    "dr_grpo": objective("dr_grpo", kl_beta=BETA),
    "token-mean": Objective("rloo", "token-mean", temperature=0.7, kl_beta=BETA),
    "clipped": Objective("mean_std", "seq-mean-token-mean", importance=True, clip_low=0.2, clip_high=0.3, kl_beta=BETA),
}


def with_references(groups: list[Group], seed: int = 5) -> list[Group]:
    """The groups with random log-probabilities under a reference, and rewards of which one may equal the mean."""
    random = np.random.default_rng(seed)
    return [
        replace(
            group,
            rewards=np.array([0.0, 0.5, 1.0, 0.5])[: len(group.rewards)],
            reference_logprobs=[-random.exponential(3.0, len(r)).astype(np.float32) for r in group.responses],
        )
        for group in groups
    ]


def slow_kl(model: nn.Module, group: Group, settings: Objective) -> torch.Tensor:
    """beta times GRPO's estimate of the KL, one rollout at a time, one token at a time."""
    n_tokens = sum(len(response) for response in group.responses)
    total = torch.zeros(())
    for j, response in enumerate(group.responses):
        ids = torch.tensor([*group.prompt_ids, *response])[None]
        logprobs = (model(input_ids=ids).logits[0] / settings.temperature).log_softmax(-1)
        for t, token in enumerate(response):
            behind = float(group.reference_logprobs[j][t]) - logprobs[len(group.prompt_ids) + t - 1, token]
            share = {
                "seq-mean-token-sum": 1 / len(group.responses),
                "seq-mean-token-mean": 1 / len(group.responses) / len(response),
                "token-mean": 1 / n_tokens,
            }[settings.aggregation]
            total = total + settings.kl_beta * share * (behind.exp() - behind - 1)
    return total


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_sketch_is_the_projected_gradient_with_its_kl_term(make_model, make_groups, architecture, name) -> None:
    """Also of rollouts whose advantage is zero, and not multiplied by importance ratios."""
    model, groups, settings = make_model(architecture), with_references(make_groups(4, logprobs=True)), SETTINGS[name]
    assert 0.0 in np.round(slow_advantages(groups[0].rewards, settings.advantage), 9)
    sketcher = Sketcher(model, SketchSpec(rank=6, objective=settings))
    for group, found in zip(groups, sketcher.sketch(groups).sketches, strict=True):
        expected = slow_sketch(model, sketcher, group, settings, penalty=slow_kl)
        assert relative_error(found, expected) < 1e-5
        assert relative_error(found, slow_sketch(model, sketcher, group, settings)) > 1e-3


def test_exact_gradients_have_it_too(make_model, make_groups) -> None:
    """A target measured without the term would ask another question than the rows answer."""
    model, groups = make_model("llama"), with_references(make_groups(3))
    settings = SETTINGS["grpo"]
    spec = SketchSpec(rank=6, objective=settings)
    target = layer_gradients(model, groups[:1], spec)
    slow = copy.deepcopy(model)
    for parameter in slow.parameters():
        parameter.requires_grad_(True)
    from tests.engine.test_sketcher import slow_objective

    (slow_objective(slow, groups[0], settings) - slow_kl(slow, groups[0], settings)).backward()
    squares = sum(float(own_gradient(slow, name).double().square().sum()) for name in target.names)
    assert exact_dots(model, groups[:1], target, spec).dots[0, 0] == pytest.approx(squares, rel=1e-4)
    found = validation_gradient(model, groups[:1], settings)
    for name, parameter in slow.named_parameters():
        np.testing.assert_allclose(found.tensors[name].numpy(), parameter.grad.numpy(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo"])
def test_at_the_reference_itself_nothing_is_added(make_model, make_groups, preset) -> None:
    """The penalty is least there; whatever it added would be an error of sign or of tokens."""
    model, groups = make_model("qwen2"), make_groups(5)
    reference = Reference(copy.deepcopy(model))
    plain = Sketcher(model, SketchSpec(rank=6, objective=objective(preset))).sketch(groups).sketches
    settings = objective(preset, kl_beta=3.0, reference=reference.digest)
    found = Sketcher(model, SketchSpec(rank=6, objective=settings)).sketch([reference(group) for group in groups])
    assert relative_error(found.sketches, plain) < 1e-5


def test_a_reference_gives_its_logprobs(make_model, make_groups) -> None:
    """Of each response token, at the objective's temperature; repeated and empty responses included."""
    model = make_model("llama")
    (group,) = make_groups(1)
    responses = [group.responses[0], group.responses[1], group.responses[0], np.zeros(0, np.int64)]
    group = replace(group, responses=responses, rewards=np.array([0.0, 1.0, 0.0, 1.0]))
    filled = Reference(model, temperature=0.7)(group)
    for response, found in zip(responses, filled.reference_logprobs, strict=True):
        ids = torch.tensor([*group.prompt_ids, *response])[None]
        with torch.no_grad():
            log_TV = (model(input_ids=ids).logits[0] / 0.7).log_softmax(-1)
        slow = [float(log_TV[len(group.prompt_ids) + t - 1, token]) for t, token in enumerate(response)]
        np.testing.assert_allclose(found, slow, atol=1e-5)
    assert filled.responses is group.responses
    equal = replace(group, rewards=np.ones(4))
    assert Reference(model)(equal) is equal, "nothing is computed for a problem without signal"
    together = Reference(model, temperature=0.7, token_budget=40).of([equal, group, *make_groups(2, seed=9)])
    assert together[0] is equal
    for one, other in zip(together[1].reference_logprobs, filled.reference_logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert all(len(own.reference_logprobs) == len(own.responses) for own in together[2:])


def test_batching_and_shared_prompts_do_not_matter(make_model, make_groups) -> None:
    """Neither what shares a micro-batch nor whether a prompt is run once is part of an objective."""
    model, groups = make_model("qwen2"), with_references(make_groups(6, logprobs=True))
    settings = SETTINGS["clipped"]
    whole = Sketcher(model, SketchSpec(rank=6, objective=settings)).sketch(groups)
    for token_budget in (1, 40, 1000):
        for share in (True, False):
            spec = SketchSpec(rank=6, objective=settings, token_budget=token_budget, share_prompts=share)
            found = Sketcher(model, spec).sketch(groups)
            assert relative_error(found.sketches, whole.sketches) < 1e-5
            np.testing.assert_allclose(found.ess, whole.ess, rtol=1e-5)
    rewards_only = Sketcher(model, SketchSpec(rank=6, objective=replace(settings, kl_beta=0.0))).sketch(groups)
    np.testing.assert_allclose(whole.ess, rewards_only.ess, rtol=1e-5, err_msg="the term is no importance weight")


def test_equal_rewards_stay_without_signal(make_model, make_groups) -> None:
    """Their penalty has a gradient, but LearnAlign weighs them by p (1 - p) = 0: they need no reference either."""
    model, (group, other) = make_model("qwen2"), make_groups(2)
    equal = replace(group, rewards=np.ones(4))
    spec = SketchSpec(rank=6, objective=SETTINGS["grpo"])
    batch = Sketcher(model, spec).sketch([equal, *with_references([other])])
    assert batch.states == [State.NO_SIGNAL, State.LIVE]
    assert not batch.sketches[0].any()
    batch = Sketcher(model, spec).sketch([replace(with_references([group])[0], rewards=np.zeros(4))])
    assert batch.states == [State.NO_SIGNAL]


def test_without_a_reference_it_is_refused(make_model, make_groups) -> None:
    """Leaving the term out silently would mix two objectives in a store."""
    model, groups = make_model("qwen2"), make_groups(1)
    spec = SketchSpec(rank=6, objective=SETTINGS["grpo"])
    with pytest.raises(RequestError, match="'problem-0': has no reference log-probabilities, which kl_beta"):
        Sketcher(model, spec).sketch(groups)
    with pytest.raises(RequestError, match="kl_beta is -1"):
        objective("grpo", kl_beta=-1)
    with pytest.raises(RequestError, match="needs kl_beta above 0"):
        objective("grpo", reference="abc")
    with pytest.raises(RequestError, match="kl_beta = 0"):
        Probe(model, validation_gradient(model, groups), SETTINGS["grpo"])
    with pytest.raises(RequestError, match="3 tokens but 2 reference log-probabilities"):
        Group("p", np.array([1]), [np.array([1, 2, 3])], np.zeros(1), None, [np.zeros(2, np.float32)])


def test_the_fingerprint_says_which_reference(make_model) -> None:
    """Rows with another penalty, or of another reference, are other rows; stores without one read as they did."""
    model = make_model("qwen2")
    plain = Sketcher(model, SketchSpec(rank=6)).fingerprint["objective"]
    assert not {"kl_beta", "reference"} & plain.keys()
    digest = Reference(model).digest
    settings = objective("grpo", kl_beta=0.04, reference=digest)
    fingerprint = Sketcher(model, SketchSpec(rank=6, objective=settings)).fingerprint
    assert fingerprint["objective"]["kl_beta"] == 0.04
    assert fingerprint["objective"]["reference"] == digest
    assert SketchSpec.of(fingerprint).objective == settings
    assert Reference(make_model("llama")).digest != digest
