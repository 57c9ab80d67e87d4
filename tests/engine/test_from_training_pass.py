"""Sketches from the pass that trains: the rows of a pass of their own, whatever that pass trains with."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gradstore.engine.gradients.directions import summed_gradient
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.layers import find_layers
from gradstore.engine.gradients.objectives import Objective, objective, rollout_weights
from gradstore.engine.rollouts.group import Group, joined
from gradstore.engine.sketches.fitting import fit_projection
from gradstore.engine.sketches.from_training_pass import SketchesFromTrainingPass, factor, sketched_and_summed
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchSpec
from gradstore.state import State
from tests.engine.conftest import own_gradient


def _groups(seed: int, lengths: tuple[int, ...] = (5, 3, 7, 4), prompt: int = 6) -> list[Group]:
    """Six groups: four live, one of them with a response sampled twice, one without signal, one of another size."""
    random = np.random.default_rng(seed)
    groups = []
    for number in range(6):
        count = len(lengths) - (number == 3)
        responses = [random.integers(1, 60, length) for length in lengths[:count]]
        rewards = random.permutation(np.arange(count) % 2 + random.random(count)) if number != 4 else np.ones(count)
        if number == 2:
            responses[1] = responses[0]
        logprobs = [np.full(len(response), -3.0, np.float32) for response in responses]
        groups.append(Group(f"p{number}", random.integers(1, 60, prompt + number), responses, rewards, logprobs))
    return groups


def _slow(model: Any, group: Group, rule: Objective, sketcher: Sketcher) -> np.ndarray:
    """The projected gradient of the problem's own objective, by autograd with weight gradients."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # untied: the output layer's own gradient
    lengths = np.array([len(response) for response in group.responses])
    total = torch.zeros(())
    for response, weight in zip(group.responses, rollout_weights(group.rewards, lengths, rule), strict=True):
        ids = torch.from_numpy(np.concatenate([group.prompt_ids, response]))
        logprobs = model(ids[None], use_cache=False).logits[0].log_softmax(-1)[len(group.prompt_ids) - 1 : -1]
        total = total + weight * logprobs.gather(1, torch.from_numpy(response)[:, None]).sum()
    total.backward()
    core = []
    for layer, basis in zip(find_layers(model), sketcher.projection.layers, strict=True):
        gradient = own_gradient(model, layer.name)
        left = torch.eye(len(gradient)) if basis.left_OR is None else torch.from_numpy(basis.left_OR)
        right = torch.eye(gradient.shape[1]) if basis.right_IR is None else torch.from_numpy(basis.right_IR)
        core.append((left.T @ gradient @ right).flatten().numpy())
    return np.concatenate(core)


def _seen(model: Any, sketcher: Sketcher, groups: list[Group], trained: Objective) -> tuple[Any, int, dict]:
    along = SketchesFromTrainingPass(sketcher, groups, trained)
    sums = summed_gradient(GradientPass(model, SketchSpec(objective=trained, token_budget=60)), groups, along.watch)
    return along.batch(), along.n_separate, sums


def _close(rows: np.ndarray, expected: np.ndarray) -> None:
    error = np.linalg.norm(rows - expected, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1e-12)
    assert error.max() < 1e-5


@pytest.mark.parametrize("prompt", [2, 40])
@pytest.mark.parametrize(
    ("trained", "wanted"), [("grpo", "gradalign"), ("gradalign", "gradalign"), ("gradalign", "grpo")]
)
def test_rows_are_those_of_autograd_for_each_problem(tiny_model: Any, prompt: int, trained: str, wanted: str) -> None:
    """A row that was wrong by its group's deviation would rank: cosines hide it, dots and norms do not."""
    model, groups = tiny_model, _groups(3, prompt=prompt)
    sketcher = Sketcher(model, SketchSpec(rank=4, objective=objective(wanted)))
    batch, n_separate, _ = _seen(model, sketcher, groups, objective(trained))
    assert n_separate == 0
    assert batch.ids == [group.problem_id for group in groups]
    _close(batch.sketches, np.stack([_slow(model, group, objective(wanted), sketcher) for group in groups]))
    expected = sketcher.sketch(groups)
    assert batch.states == expected.states
    assert batch.states[4] is State.NO_SIGNAL
    np.testing.assert_array_equal(batch.pass_rates, expected.pass_rates)
    np.testing.assert_array_equal(batch.n_rollouts, expected.n_rollouts)


def test_whole_norms_are_kept(tiny_model: Any) -> None:
    """A fitted row's cosine is over the gradient's whole length, which the factor must reach too."""
    groups = _groups(5)
    spec = SketchSpec(rank=4, basis="fitted", dim=24)
    sketcher = Sketcher(tiny_model, spec, fit_projection(tiny_model, groups, spec))
    batch, _, _ = _seen(tiny_model, sketcher, groups, objective("grpo"))
    expected = sketcher.sketch(groups)
    assert batch.norms is not None
    assert expected.norms is not None
    _close(batch.sketches, expected.sketches)
    np.testing.assert_allclose(batch.norms, expected.norms, rtol=1e-5)


def test_watching_changes_no_bit_of_the_update(tiny_model: Any) -> None:
    """A run that keeps sketches trains as one that does not."""
    groups = _groups(7)
    plain = summed_gradient(GradientPass(tiny_model, SketchSpec(objective=objective("grpo"), token_budget=60)), groups)
    _, _, sums = _seen(tiny_model, Sketcher(tiny_model, SketchSpec(rank=4)), groups, objective("grpo"))
    assert plain.keys() == sums.keys()
    assert all(torch.equal(plain[name], sums[name]) for name in plain)


@pytest.mark.parametrize(
    ("trained", "wanted", "n_separate"),
    [
        (objective("dr_grpo"), objective("gradalign"), 6 - 1),  # the one without signal is known to be zero
        (objective("grpo", importance=True), objective("gradalign"), 6),
        (objective("grpo"), objective("gradalign", importance=True), 6),
        (objective("grpo"), objective("gradalign", temperature=0.7), 6),
    ],
)
def test_other_objectives_take_a_pass_of_their_own(
    tiny_model: Any, trained: Objective, wanted: Objective, n_separate: int
) -> None:
    """Rescaled all the same, responses would count by their length or not at all."""
    groups = _groups(11)
    sketcher = Sketcher(tiny_model, SketchSpec(rank=4, objective=wanted))
    batch, separate, _ = _seen(tiny_model, sketcher, groups, trained)
    assert separate == n_separate
    expected = sketcher.sketch(groups)
    place = {name: row for row, name in enumerate(batch.ids)}
    _close(batch.sketches[[place[name] for name in expected.ids]], expected.sketches)
    assert (batch.ess is None) == (expected.ess is None)


def test_several_groups_of_a_problem_are_one_row(tiny_model: Any) -> None:
    """Their common baseline is another than each one's own: a sum of rescaled rows is another gradient."""
    groups = _groups(13)
    groups[5] = replace(groups[5], problem_id="p0", prompt_ids=groups[0].prompt_ids)
    sketcher = Sketcher(tiny_model, SketchSpec(rank=4))
    batch, n_separate, _ = _seen(tiny_model, sketcher, groups, objective("grpo"))
    assert n_separate == 1
    expected = sketcher.sketch([*groups[1:5], joined([groups[0], groups[5]])])
    assert batch.ids == expected.ids
    _close(batch.sketches, expected.sketches)
    assert batch.n_rollouts.tolist() == [4, 4, 3, 4, 8]


def test_equal_lengths_make_aggregations_proportional() -> None:
    """dr_grpo sums tokens where gradalign averages them: the same up to the common length."""
    group = _groups(17, lengths=(5, 5, 5))[0]
    assert factor(group, objective("dr_grpo"), objective("gradalign")) == pytest.approx(1 / 5)
    assert factor(_groups(17)[0], objective("dr_grpo"), objective("gradalign")) is None
    assert factor(_groups(17)[4], objective("dr_grpo"), objective("gradalign")) == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2-lora"])
def test_other_models(make_model, make_groups, architecture: str) -> None:
    """Layers of other kinds, frozen ones between trained ones: what the hooks see must be the same."""
    model, groups = make_model(architecture), make_groups(5)
    sketcher = Sketcher(model, SketchSpec(rank=4))
    batch, n_separate, _ = _seen(model, sketcher, groups, objective("grpo"))
    assert n_separate == 0
    _close(batch.sketches, sketcher.sketch(groups).sketches)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_only": True},
        {"modules": ("down_proj",)},
        {"objective": objective("gradalign", importance=True)},
        {"objective": replace(objective("gradalign"), temperature=0.7)},
    ],
    ids=["all", "head", "some", "ratios", "temperature"],
)
@pytest.mark.parametrize("prompt", [2, 40])
def test_one_pass_gives_sketches_and_their_sum(tiny_model: Any, prompt: int, changes: dict[str, Any]) -> None:
    """A benchmark's rows are what candidates are compared with in the store, its gradient what probes go along: both
    as from passes of their own, whichever the objective allows."""
    groups = _groups(11, prompt=prompt)
    spec = SketchSpec(rank=4, token_budget=60, **changes)
    sketcher = Sketcher(tiny_model, spec)
    batch, sums = sketched_and_summed(sketcher, groups)
    expected = sketcher.sketch(groups)
    _close(batch.sketches, expected.sketches)
    assert (batch.ids, batch.states, batch.n_tokens) == (expected.ids, expected.states, expected.n_tokens)
    assert (batch.ess is None) == (expected.ess is None)
    plain = summed_gradient(GradientPass(tiny_model, spec), groups)
    assert plain.keys() == sums.keys()
    assert all(torch.equal(plain[name], sums[name]) for name in plain)
