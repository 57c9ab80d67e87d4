"""Probes are exact dots with a direction, from forward passes alone."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gradstore.engine import Direction, Objective, Probe, objective, validation_gradient
from gradstore.engine.rollouts import Group
from gradstore.errors import RequestError
from tests.engine.conftest import ON_POLICY
from tests.engine.ranks import run_ranks

ARCHITECTURES = ["qwen2", "llama", "gpt2", "qwen2-lora"]
SETTINGS = {
    **ON_POLICY,
    "rloo-token-mean": Objective("rloo", "token-mean"),
    "temperature": Objective("mean_std", "token-mean", temperature=0.7),
    "importance": Objective("mean", "seq-mean-token-sum", importance=True),
    "clipped": Objective("mean_std", "seq-mean-token-mean", importance=True, clip_low=0.2, clip_high=0.3),
}


def slow_advantages(rewards: np.ndarray, kind: str) -> np.ndarray:
    n = len(rewards)
    if kind == "rloo":
        return np.array([rewards[j] - np.delete(rewards, j).mean() for j in range(n)])
    scale = np.std(rewards, ddof=1) + 1e-6 if kind == "mean_std" else 1.0
    return (rewards - rewards.mean()) / scale


def slow_objective(model: nn.Module, group: Group, settings: Objective) -> torch.Tensor:
    """One rollout at a time, straight from the definitions."""
    total, n = torch.zeros(()), len(group.responses)
    for j, (response, A) in enumerate(
        zip(group.responses, slow_advantages(group.rewards, settings.advantage), strict=True)
    ):
        ids = torch.tensor([*group.prompt_ids, *response])[None]
        logits_TV = model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1] / settings.temperature
        logprobs_N = logits_TV.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        weights_N = torch.ones(len(response))
        if settings.importance:
            weights_N = (logprobs_N.detach() - torch.from_numpy(group.logprobs[j])).exp()
            low, high = settings.clip_low, settings.clip_high
            if high is not None and A > 0:
                weights_N[weights_N > 1 + high] = 0
            if low is not None and A < 0:
                weights_N[weights_N < 1 - low] = 0
        share = {
            "seq-mean-token-sum": 1 / n,
            "seq-mean-token-mean": 1 / n / len(response),
            "token-mean": 1 / sum(map(len, group.responses)),
        }[settings.aggregation]
        total = total + A * share * (weights_N * logprobs_N).sum()
    return total


def slow_gradient(model: nn.Module, group: Group, settings: Objective) -> dict[str, torch.Tensor]:
    """The problem's own gradient over every parameter that trains."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(slow_objective(model, group, settings), list(trained.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained.items(), gradients, strict=True)}


def slow_dots(model: nn.Module, groups: list[Group], direction: Direction, settings: Objective) -> np.ndarray:
    found = []
    for group in groups:
        gradient = slow_gradient(model, group, settings)
        found.append(sum(float((gradient[n].double() * v.double()).sum()) for n, v in direction.tensors.items()))
    return np.array(found)


def stale(model: nn.Module, groups: list[Group]) -> list[Group]:
    """The groups with log-probabilities of a behaviour policy near the model."""
    random = np.random.default_rng(0)
    direction = Direction.of({name: torch.ones_like(p) for name, p in model.named_parameters()})
    return [
        Group(
            group.problem_id,
            group.prompt_ids,
            group.responses,
            group.rewards,
            [(tokens + 0.3 * random.normal(size=len(tokens))).astype(np.float32) for tokens in own],
        )
        for group, own in zip(groups, Probe(model, direction).logprobs(groups), strict=True)
    ]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_validation_gradient_is_the_mean_gradient(make_model, make_groups, architecture: str) -> None:
    """A wrong direction would make every probe an exact answer to another question."""
    model, groups = make_model(architecture), make_groups(4)
    flat = Group("flat", groups[0].prompt_ids, groups[0].responses, np.ones(4))
    direction = validation_gradient(model, [*groups, flat], token_budget=40)
    expected = [slow_gradient(model, group, objective("gradalign")) for group in groups]
    for name, tensor in direction.tensors.items():
        mean = sum(gradient[name] for gradient in expected) / 5
        torch.testing.assert_close(tensor, mean, rtol=1e-4, atol=1e-6)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(direction.tensors) <= trained
    assert direction.norm == pytest.approx(sum(float((t**2).sum()) for t in direction.tensors.values()) ** 0.5)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_probe_dots_are_exact(make_model, make_groups, architecture: str, name: str) -> None:
    """A probe claims <g_i, V> over every parameter, for every objective; ranks by anything else would be wrong."""
    settings = SETTINGS[name]
    model = make_model(architecture)
    groups, bench = stale(model, make_groups(6)), stale(model, make_groups(4, seed=5))
    direction = validation_gradient(model, bench, settings)
    probe = Probe(model, direction, settings)
    expected = slow_dots(model, groups, direction, settings)
    batch = probe.probe(groups)
    assert relative_error(batch.dots, expected) < 2e-3
    assert np.corrcoef(batch.dots, expected)[0, 1] > 0.9999
    one_sided = probe.probe(groups, probe.logprobs(groups))
    assert relative_error(one_sided.dots, expected) < 2e-2
    assert probe.calibration is not None
    assert probe.calibration.relative_error < 2e-3
    for group, d_G, dot in zip(groups, batch.derivatives, batch.dots, strict=True):
        assert dot == pytest.approx(np.mean(slow_advantages(group.rewards, settings.advantage) * d_G), rel=1e-9)


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "seq-mean-token-sum", "token-mean"])
def test_each_rollouts_derivative(make_model, make_groups, aggregation: str) -> None:
    """Errors that cancel in the dot would still spoil its standard error."""
    model, (group,) = make_model("llama"), make_groups(1, n_rollouts=5)
    settings = Objective("mean", aggregation)
    direction = validation_gradient(model, make_groups(3, seed=4))
    (found,) = Probe(model, direction, settings).derivatives([group])
    lengths = np.array([len(response) for response in group.responses])
    for j, response in enumerate(group.responses):
        ids = torch.tensor([*group.prompt_ids, *response])[None]
        logprobs_TV = model(input_ids=ids).logits[0].log_softmax(-1)[len(group.prompt_ids) - 1 : -1]
        total = logprobs_TV.gather(1, torch.tensor(response)[:, None]).sum()
        gradients = torch.autograd.grad(total, list(model.parameters()))
        along = sum(
            float((g * direction.tensors[n]).sum())
            for (n, _), g in zip(model.named_parameters(), gradients, strict=True)
        )
        weight = {"seq-mean-token-mean": 1 / lengths[j], "seq-mean-token-sum": 1.0}.get(aggregation, 1 / lengths.mean())
        assert found[j] == pytest.approx(weight * along, rel=5e-3, abs=5e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batching_and_shared_prompts_change_nothing(make_model, make_groups, architecture: str) -> None:
    """A score that depends on the micro-batch ranks problems by their neighbours."""
    model, groups = make_model(architecture), make_groups(6)
    direction = validation_gradient(model, make_groups(4, seed=5))
    eps = 5 * Probe(model, direction).calibrate(groups).central  # above the rounding, which batching does change
    whole = Probe(model, direction, eps=eps).probe(groups)
    for changes in ({"token_budget": 1}, {"token_budget": 60}, {"share_prompts": False}):
        found = Probe(model, direction, eps=eps, **changes).probe(groups)
        for one, other in zip(found.derivatives, whole.derivatives, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-3 * np.abs(other).max())


def test_duplicates_are_run_once_and_keep_their_own_derivative(make_model, make_groups, monkeypatch) -> None:
    """Short answers repeat; the statistics need one derivative for each rollout, the model one run for all."""
    model, (group,) = make_model("qwen2"), make_groups(1, n_rollouts=3)
    repeated = [0, 1, 0, 2, 1, 1]
    again = Group("x", group.prompt_ids, [group.responses[j] for j in repeated], np.array([1.0, 0, 0, 1, 1, 0]))
    direction = validation_gradient(model, make_groups(3, seed=4))
    probe, rows = Probe(model, direction, eps=5e-3), []
    run = probe._pass.policy.logprobs
    monkeypatch.setattr(
        probe._pass.policy, "logprobs", lambda batch, *more: rows.append(len(batch.weights_BN)) or run(batch, *more)
    )
    (found,) = probe.derivatives([again])
    assert max(rows) == 3
    (single,) = Probe(model, direction, eps=5e-3).derivatives([group])
    np.testing.assert_allclose(found, single[repeated], rtol=1e-3, atol=1e-5)


def test_low_rank_branch(make_model, make_groups, weights_of) -> None:
    """At full rank the branch is the direction but for the norms; the share it leaves out is what it says."""
    model, groups = make_model("llama"), make_groups(6)
    direction = validation_gradient(model, make_groups(4, seed=5))
    cut = {name: v if "norm" not in name else torch.zeros_like(v) for name, v in direction.tensors.items()}
    expected = slow_dots(model, groups, Direction.of(cut), objective("gradalign"))
    before = weights_of(model)
    full = Probe(model, direction, rank=64)
    assert relative_error(full.probe(groups).dots, expected) < 2e-3
    assert weights_of(model) == before
    left = sum(float((v**2).sum()) for name, v in direction.tensors.items() if "norm" in name) ** 0.5
    assert full.calibration is not None
    assert full.calibration.truncation == pytest.approx(left / direction.norm, rel=1e-3)
    shares = [Probe(model, direction, rank=rank).calibrate(groups).truncation for rank in (1, 4, 16)]
    assert shares == sorted(shares, reverse=True)


def test_low_rank_branch_of_adapters_is_exact(make_model, make_groups) -> None:
    """A LoRA matrix's gradient has no more rank than the adapter: nothing is cut."""
    model, groups = make_model("qwen2-lora"), make_groups(6)
    direction = validation_gradient(model, make_groups(4, seed=5))
    probe = Probe(model, direction, rank=4)
    assert relative_error(probe.probe(groups).dots, slow_dots(model, groups, direction, objective("gradalign"))) < 2e-3
    assert probe.calibration is not None
    assert probe.calibration.truncation < 1e-3


def test_bf16_weights_are_refused_or_served_by_a_branch(make_model, make_groups) -> None:
    """A step below the weights' resolution would give scores made of rounding."""
    model, groups = make_model("llama"), make_groups(8, n_rollouts=8)
    direction = validation_gradient(model, make_groups(6, seed=5))
    expected = Probe(model, direction).probe(groups).dots
    coarse = copy.deepcopy(model).bfloat16()
    with pytest.raises(RequestError, match="bfloat16, too coarse"):
        Probe(coarse, direction).probe(groups)
    found = Probe(coarse, direction, rank=64).probe(groups).dots
    assert np.corrcoef(found, expected)[0, 1] > 0.9


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over files")
def test_fsdp2_on_two_ranks(make_model, make_groups, tmp_path: Path) -> None:
    """Each rank moves its own shard; what comes out must be what one process gets from the whole model."""
    run_ranks("probe_ranks.py", 2, tmp_path)
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    model, bench, pool = make_model("qwen2"), make_groups(5, seed=7), make_groups(7, seed=8)
    direction = validation_gradient(model, bench)
    expected = Probe(model, direction, eps=5e-3).probe(pool)
    for rank, result in enumerate(found):
        assert result["norm"] == pytest.approx(direction.norm, rel=1e-4)
        assert result["n_problems"] == 5
        assert result["restored"]
        assert result["without_gradients"]
        assert result["eps"] == found[0]["eps"]
        assert result["n_checked"] == 4
        assert result["relative_error"] < 2e-3
        own = slice(rank, None, 2)
        for one, other in zip(result["derivatives"], expected.derivatives[own], strict=True):
            np.testing.assert_allclose(one, other, atol=2e-3 * np.abs(np.concatenate(expected.derivatives)).max())
        assert relative_error(np.array(result["dots"]), expected.dots[own]) < 2e-3
        assert relative_error(np.array(result["one_sided"]), expected.dots[own]) < 2e-2
        assert relative_error(np.array(result["branch"]), expected.dots[own]) < 5e-2
