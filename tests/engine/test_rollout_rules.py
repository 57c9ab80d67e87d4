"""Rollout rules: their weights are those of an obvious loop over full gradients of single rollouts."""

import re
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradstore import RequestError
from gradstore.engine import Direction, Probe, Sketcher, SketchSpec, objective, validation_gradient
from gradstore.engine.gradients.microbatch import rollouts_of
from gradstore.engine.gradients.objectives import Objective, rollout_weights
from gradstore.engine.rollouts.group import Group
from gradstore.engine.selecting import registry
from gradstore.engine.selecting.registry import Registry
from gradstore.engine.selecting.rollout_rules import (
    ROLLOUT_RULES,
    RolloutRule,
    StepRollouts,
    share_dropped,
    weigh_rollouts,
)
from gradstore.engine.sketches.rollout_sketches import sketch_rollouts

WHOLE = SketchSpec(rank=64)
"""No side of the test's models is wider than the rank: sketches are the gradients, without the embedding's lookup."""


def _alone(model: nn.Module, group: Group, j: int, rule: Objective) -> np.ndarray:
    """Full gradient of one rollout's part, by a plain forward and backward, float64 [parameters]."""
    lengths_G = np.array([len(response) for response in group.responses])
    weight = float(rollout_weights(group.rewards, lengths_G, rule)[j])
    ids = torch.from_numpy(np.concatenate([group.prompt_ids, group.responses[j]]))
    logprobs_TV = model(ids[None], use_cache=False).logits[0].log_softmax(-1)[len(group.prompt_ids) - 1 : -1]
    model.zero_grad()
    (weight * logprobs_TV.gather(1, torch.from_numpy(group.responses[j])[:, None]).sum()).backward()
    flat = [w.grad.flatten() for name, w in model.named_parameters() if "embed" not in name and w.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(flat).double().numpy()


def _repeated(groups: list[Group]) -> list[Group]:
    """With an equal response of another reward in the first group, and one group without signal."""
    first, last = groups[0], groups[-1]
    twice = [*first.responses[:-1], first.responses[0]]
    rewards = first.rewards.copy()
    rewards[0], rewards[-1] = 1.0, 0.0
    return [replace(first, responses=twice, rewards=rewards), *groups[1:-1], replace(last, rewards=last.rewards * 0)]


@pytest.fixture
def step(make_groups: Callable[..., list[Group]]) -> list[Group]:
    return _repeated(make_groups(5, n_rollouts=6, seed=2))


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo"])
def test_weights_are_those_of_full_gradients(
    make_model: Callable[[str], nn.Module], make_groups: Callable[..., list[Group]], step: list[Group], preset: str
) -> None:
    """Leave-one-out too: there the loop adds up the step's gradient anew without the rollout."""
    model, rule, factors = make_model("llama"), objective(preset), [1.0, 0.5, 2.0, 1.0, 1.0]
    full = [[_alone(model, group, j, rule) for j in range(len(group.responses))] for group in step]
    target = sum(_alone(model, g, j, rule) for g in make_groups(3, seed=9) for j in range(len(g.responses)))
    mean = sum(f * sum(own) for f, own in zip(factors, full, strict=True)) / len(step)

    def without(i: int, j: int) -> np.ndarray:
        rest = [[g for m, g in enumerate(own) if (k, m) != (i, j)] for k, own in enumerate(full)]
        return sum(f * sum(own, np.zeros_like(mean)) for f, own in zip(factors, rest, strict=True)) / len(step)

    expected = {
        "oppose_target": [[float(g @ target >= 0) for g in own] for own in full],
        "dtv": [[float(g @ mean >= 0) for g in own] for own in full],
        "dtv_loo": [[float(g @ without(i, j) >= 0) for j, g in enumerate(own)] for i, own in enumerate(full)],
    }
    sketcher = Sketcher(model, WHOLE)
    found = sketch_rollouts(sketcher, step, rule)
    target_D = np.concatenate(sketch_rollouts(sketcher, make_groups(3, seed=9), rule).rows).sum(0)
    known = StepRollouts.of_sketches(step, found.rows, target_D, factors)
    for name, weights in expected.items():
        assert [own.tolist() for own in weigh_rollouts(name, known)] == weights
        assert 0 < share_dropped(step, [np.array(own) for own in weights]) < 1
    assert expected["dtv"] != expected["dtv_loo"]
    assert known.batch is not None
    assert known.own is not None
    for i, own in enumerate(full):
        np.testing.assert_allclose(known.batch[i], [g @ mean for g in own], rtol=1e-3, atol=1e-6 * (mean @ mean))
        np.testing.assert_allclose(known.own[i], [factors[i] * (g @ g) / len(step) for g in own], rtol=1e-3)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "qwen2-lora"])
def test_parts_of_a_group_add_up_to_its_sketch(
    make_model: Callable[[str], nn.Module], step: list[Group], name: str
) -> None:
    """Whatever shares prompts or repeats: a rollout's row is its part of the row that the store would keep."""
    sketcher = Sketcher(make_model(name), SketchSpec(basis="dense", rank=8, dim=96, token_budget=60))
    rows = sketch_rollouts(sketcher, step).rows
    whole = sketcher.sketch(step).sketches
    for own_GD, row_D in zip(rows, whole, strict=True):
        np.testing.assert_allclose(own_GD.sum(0), row_D, rtol=1e-3, atol=1e-5 * np.abs(whole).max())
    off_policy = replace(sketcher.spec.objective, importance=True, clip_low=0.2, kl_beta=0.1)
    for one, other in zip(rows, sketch_rollouts(sketcher, step, off_policy).rows, strict=True):
        np.testing.assert_array_equal(one, other)


def test_outputs_of_a_rollout_are_weighed_together(make_model: Callable[[str], nn.Module], step: list[Group]) -> None:
    """A rollout of two outputs has one row and one weight; tokens of tools are in neither."""
    random, group = np.random.default_rng(4), step[0]
    masks = [random.random(len(response)) < 0.7 for response in group.responses]
    prompts = [group.prompt_ids, *[random.integers(0, 61, 5) for _ in group.responses[1:]]]
    outputs = replace(
        group, masks=masks, prompts=prompts, rollout_of=np.array([0, 0, 1, 2, 2, 1]), rewards=np.array([1.0, 0.0, 0.5])
    )
    sketcher = Sketcher(make_model("qwen2"), SketchSpec(rank=8))
    found = sketch_rollouts(sketcher, [outputs]).rows[0]
    assert len(found) == 3
    np.testing.assert_allclose(found.sum(0), sketcher.sketch([outputs]).sketches[0], rtol=1e-3, atol=1e-6)
    kept = np.array([0.0, 0.5, 2.0])
    whole = {f"{r.index}": r.weight for r in rollouts_of([outputs], objective("grpo"))}
    for rollout in rollouts_of([outputs], objective("grpo"), None, [kept]):
        expected = whole[f"{rollout.index}"] * kept[outputs.rollouts[rollout.index]]
        assert rollout.weight == pytest.approx(expected)


def test_probed_derivatives_give_the_same_dots(
    make_model: Callable[[str], nn.Module], make_groups: Callable[..., list[Group]], step: list[Group]
) -> None:
    """A trainer that probes its rollouts anyway has the weights without a further pass."""
    model, rule = make_model("llama"), objective("grpo")
    whole = validation_gradient(model, make_groups(3, seed=9), rule)
    direction = Direction.of({name: tensor for name, tensor in whole.tensors.items() if "embed" not in name})
    derivatives = Probe(model, direction, rule).derivatives(step)
    sketcher = Sketcher(model, WHOLE)
    target_D = np.concatenate(sketch_rollouts(sketcher, make_groups(3, seed=9), rule).rows).sum(0) / 3
    sketched = StepRollouts.of_sketches(step, sketch_rollouts(sketcher, step, rule).rows, target_D)
    probed = StepRollouts.of_derivatives(step, rule, target=derivatives)
    assert sketched.target is not None
    assert probed.target is not None
    scale = max(np.abs(own).max() for own in sketched.target)
    for one, other in zip(probed.target, sketched.target, strict=True):
        np.testing.assert_allclose(one, other, rtol=0.02, atol=1e-3 * scale)


def _random_step(seed: int = 0) -> tuple[list[Group], list[np.ndarray], np.ndarray]:
    random = np.random.default_rng(seed)
    groups = [Group(f"p{i}", np.arange(2), [np.arange(3)] * n, np.arange(n) % 2.0) for i, n in enumerate((3, 5, 4))]
    rows = [random.normal(size=(len(g.rewards), 6)).astype(np.float32) for g in groups]
    return groups, rows, random.normal(size=6)


@pytest.mark.parametrize("rule", list(ROLLOUT_RULES))
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_neither_scale_nor_order_matters(rule: str, threshold: float) -> None:
    """Rewards in other units, or problems that arrive in another order, must not change what is dropped."""
    groups, rows, target_D = _random_step()
    weights = weigh_rollouts(rule, StepRollouts.of_sketches(groups, rows, target_D, threshold=threshold))
    assert any((own < 1).any() for own in weights)
    larger = [own * np.float32(2**20) for own in rows]
    scaled = StepRollouts.of_sketches(groups, larger, target_D * 2**-30, threshold=threshold)
    for one, other in zip(weights, weigh_rollouts(rule, scaled), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    order = [2, 0, 1]
    turned = StepRollouts.of_sketches(
        [replace(groups[i], rewards=groups[i].rewards[::-1].copy()) for i in order],
        [rows[i][::-1] for i in order],
        target_D,
        threshold=threshold,
    )
    for i, other in zip(order, weigh_rollouts(rule, turned), strict=True):
        np.testing.assert_allclose(weights[i], other[::-1], rtol=1e-12)


def test_a_threshold_drops_less() -> None:
    groups, rows, target_D = _random_step(3)
    steps = [StepRollouts.of_sketches(groups, rows, target_D, threshold=t) for t in (0.0, 0.5, 1e6)]
    shares = [share_dropped(groups, weigh_rollouts("oppose_target", step)) for step in steps]
    assert shares[0] > shares[1] > shares[2] == 0


def test_edges() -> None:
    """No target, no dots, no groups, a step of one rollout, and a group of which every rollout is dropped."""
    groups, rows, target_D = _random_step()
    aimless = StepRollouts.of_sketches(groups, rows)
    assert all((own == 1).all() for own in weigh_rollouts("oppose_target", aimless))
    nothing = StepRollouts.of_sketches(groups, [own * 0 for own in rows], target_D)
    for rule in ROLLOUT_RULES:
        assert all((own == 1).all() for own in weigh_rollouts(rule, nothing))
        assert weigh_rollouts(rule, StepRollouts.of_sketches([], [], target_D)) == []
    one = [np.zeros_like(own) for own in rows]
    one[0][1] = np.float32(0.1)
    alone = StepRollouts.of_sketches(groups, one)
    assert all((own == 1).all() for own in weigh_rollouts("dtv_loo", alone))
    against = StepRollouts.of_sketches(groups[:1], [np.ones((3, 6))], -np.ones(6))
    assert weigh_rollouts("oppose_target", against)[0].sum() == 0
    assert share_dropped(groups[:1], [np.zeros(3)]) == 1


def test_wrong_requests_are_refused() -> None:
    groups, rows, target_D = _random_step()
    step = StepRollouts.of_sketches(groups, rows, target_D)
    with pytest.raises(RequestError, match=r"rollout rule 'dvt' is not one of.*did you mean 'dtv'"):
        weigh_rollouts("dvt", step)
    with pytest.raises(RequestError, match="needs squares"):
        weigh_rollouts("dtv_loo", replace(step, own=None))
    with pytest.raises(RequestError, match="'p1': the dot of rollout 2 is not finite"):
        StepRollouts(groups, target=[np.zeros(3), np.array([0, 0, np.nan, 0, 0]), np.zeros(4)])
    with pytest.raises(RequestError, match="not one number for each rollout"):
        StepRollouts(groups, batch=[np.zeros(3)])
    with pytest.raises(RequestError, match="rollout_threshold"):
        replace(step, threshold=-1.0)
    for answer, message in (([np.ones(3)], "not one weight"), ([-np.ones(3), np.ones(5), np.ones(4)], "not negative")):
        with pytest.raises(RequestError, match=message):
            weigh_rollouts(RolloutRule("mine", lambda _, answer=answer: answer, "x"), step)


def test_rules_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point adds one; a built-in one cannot be replaced."""
    mine = RolloutRule("mine", lambda step: [np.zeros(len(g.rewards)) for g in step.groups], "0")

    class Entry(EntryPoint):
        def load(self) -> Any:
            return mine

    def registered(name: str) -> Registry[RolloutRule]:
        entry = Entry(name, "package:thing", "gradstore.rollout_rules")
        monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
        return Registry(RolloutRule, list(ROLLOUT_RULES.values()), kind="rollout rule", group="x", forbidden="+")

    assert registered("mine")["mine"] is mine
    with pytest.raises(RequestError, match=re.escape("'dtv' of package:thing is already registered")):
        dict(registered("dtv"))
