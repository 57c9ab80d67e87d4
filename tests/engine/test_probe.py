"""Probes are exact dots with a direction, from forward passes alone, and know how sure they are."""

import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from engine import PRESETS, Direction, Objective, Probe, ProbeBatch, objective, validation_gradient
from engine.probing.statistics import (
    correlation,
    dot_and_error,
    false_discovery_cut,
    lower_bound,
    shrunk,
    signal_to_noise,
    t_test,
)
from engine.rollouts import Group
from gradstore.errors import RequestError
from gradstore.state import State

ARCHITECTURES = ["qwen2", "llama", "gpt2", "qwen2-lora"]
SETTINGS = {
    **PRESETS,
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


def weights_of(model: nn.Module) -> dict[str, bytes]:
    return {name: parameter.detach().numpy().tobytes() for name, parameter in model.state_dict().items()}


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


@pytest.mark.parametrize("architecture", ["qwen2", "qwen2-lora"])
def test_every_byte_and_flag_is_restored(make_model, make_groups, architecture: str) -> None:
    """A live trainer's policy must go on as if nothing had happened: weights to the bit, flags, mode, gradients."""
    model = make_model(architecture).train()
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 0.5) if parameter.requires_grad else None
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    versions = {name: parameter._version for name, parameter in parameters.items()}
    before = weights_of(model)
    probe = Probe(model, validation_gradient(model, make_groups(3)))
    probe.probe(make_groups(3, seed=1))
    assert weights_of(model) == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: p._version for name, p in model.named_parameters()} == versions
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert all(g is None or bool((g == 0.5).all()) for g in gradients.values())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("rank", [None, 4])
def test_restored_after_an_error(make_model, make_groups, rank: int | None) -> None:
    """An error while the weights are displaced must not leave them so."""
    model = make_model("qwen2").train()
    probe = Probe(model, validation_gradient(model, make_groups(3)), eps=1e-2, rank=rank)
    probe.calibrate(make_groups(3))
    before, calls = weights_of(model), []

    def fail(*_: object) -> None:
        calls.append(weights_of(model) != before)
        raise KeyError("boom")

    handle = model.get_output_embeddings().register_forward_hook(fail)
    with pytest.raises(KeyError):
        probe.probe(make_groups(3))
    handle.remove()
    assert calls == [rank is None]
    assert weights_of(model) == before
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_calibration_expects_what_it_gets(make_model, make_groups) -> None:
    """The step's error is predicted from measured truncation and rounding; a wrong prediction hides bad scores."""
    model, groups = make_model("qwen2"), make_groups(8)
    direction = validation_gradient(model, make_groups(4, seed=5))
    calibration = Probe(model, direction).calibrate(groups)
    assert 1e-4 < calibration.nats_central < 0.1
    assert calibration.nats_one_sided < calibration.nats_central
    assert calibration.error_central < 1e-3
    assert calibration.relative_error < 10 * calibration.error_central
    assert json.loads(json.dumps(calibration.describe()))["relative_error"] == calibration.relative_error
    # A direction a thousand times longer is walked in steps a thousand times shorter.
    longer = Direction.of({name: 1000 * tensor for name, tensor in direction.tensors.items()})
    again = Probe(model, longer).calibrate(groups)
    assert again.central == pytest.approx(calibration.central / 1000, rel=0.7)
    assert again.relative_error < 2e-3


def test_a_step_that_is_too_long_is_reported(make_model, make_groups, caplog) -> None:
    """A step of the user's own that gives wrong scores must not pass in silence."""
    model = make_model("qwen2")
    direction = validation_gradient(model, make_groups(4, seed=5))
    with caplog.at_level(logging.WARNING):
        Probe(model, direction, eps=20 / direction.norm).probe(make_groups(4))
    assert "off their exact values" in caplog.text


def test_low_rank_branch(make_model, make_groups) -> None:
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
    here = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parent.parent)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(here / "probe_ranks.py"), str(rank), "2", str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
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


def test_states(make_model, make_groups) -> None:
    """Problems without signal are not run, broken ones fail alone, and neither is ranked."""
    model, groups = make_model("llama"), make_groups(3)
    token = int(groups[1].prompt_ids[0])
    keep = [g for g in groups if g is groups[1] or not any(token in ids for ids in (g.prompt_ids, *g.responses))]
    direction = validation_gradient(model, keep)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    flat = Group("flat", keep[0].prompt_ids, keep[0].responses, np.ones(len(keep[0].responses)))
    batch = Probe(model, direction).probe([*keep, flat])
    for group, state, reason in zip(keep, batch.states, batch.reasons, strict=False):
        assert state is (State.FAILED if group is groups[1] else State.LIVE)
        assert bool(reason) == (group is groups[1])
    assert batch.states[-1] is State.NO_SIGNAL
    assert np.isnan(batch.derivatives[-1]).all()
    for kind in ("dot", "corr", "snr", "lcb", "shrunk", "fdr"):
        scores = batch.scores(kind)
        assert not np.isnan(scores).any()
        assert (scores[~batch.live] == -np.inf).all()


def test_rescoring_with_corrected_rewards(make_model, make_groups) -> None:
    """A mended verifier changes rewards, not derivatives: no pass over the model is needed."""
    model, groups = make_model("qwen2"), make_groups(4)
    flat = Group("flat", groups[0].prompt_ids, groups[0].responses, np.zeros(4))
    direction = validation_gradient(model, groups)
    batch = Probe(model, direction).probe([*groups, flat], run_all=True)
    assert batch.states[-1] is State.NO_SIGNAL
    mended = [1 - group.rewards for group in groups] + [groups[0].rewards]
    again = batch.rescored(mended)
    np.testing.assert_allclose(again.dots[:-1], -batch.dots[:-1])
    assert again.dots[-1] == pytest.approx(batch.dots[0])
    skipped = Probe(model, direction).probe([*groups, flat]).rescored(mended)
    assert skipped.states[-1] is State.FAILED
    with pytest.raises(RequestError, match="problem 'problem-0': expected 4 finite rewards"):
        batch.rescored([np.zeros(2), *mended[1:]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 0.0}, "eps is 0.0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"rank": 0}, "rank is 0"),
        ({"n_check": 0}, "n_check is 0"),
        ({"token_budget": 0}, "token budget is 0"),
    ],
)
def test_bad_settings(make_model, make_groups, change: dict, message: str) -> None:
    """Each names the setting and what was expected."""
    model = make_model("qwen2")
    with pytest.raises(RequestError, match=message):
        Probe(model, validation_gradient(model, make_groups(2)), **change)


def test_bad_input(make_model, make_groups) -> None:
    """A direction of another model, log-probabilities of another policy, a benchmark without signal: all refused."""
    model, groups = make_model("qwen2"), make_groups(3)
    direction = validation_gradient(model, groups)
    probe = Probe(model, direction)
    before = weights_of(model)
    with pytest.raises(RequestError, match="of another policy, temperature or precision"):
        probe.probe(groups, [[tokens - 1 for tokens in own] for own in probe.logprobs(groups)])
    with pytest.raises(RequestError, match="problem 'problem-0': base log-probabilities of"):
        probe.probe(groups, [[tokens[:0] for tokens in own] for own in probe.logprobs(groups)])
    with pytest.raises(RequestError, match="of 1 groups for 3"):
        probe.probe(groups, probe.logprobs(groups[:1]))
    with pytest.raises(RequestError, match="the model no such parameter"):
        Probe(model, Direction.of({"nothing": torch.ones(3)})).probe(groups)
    with pytest.raises(RequestError, match="the direction is zero"):
        validation_gradient(model, [Group("flat", groups[0].prompt_ids, groups[0].responses, np.ones(4))])
    with pytest.raises(RequestError, match="not finite: a"):
        Direction.of({"a": torch.tensor([float("nan")])})
    with pytest.raises(RequestError, match="token id 61 is outside"):
        probe.probe([Group("p", np.array([61]), groups[0].responses, groups[0].rewards)])
    with pytest.raises(RequestError, match="probe score 'best'"):
        probe.probe(groups).scores("best")
    assert weights_of(model) == before
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(RequestError, match="no parameter of the model trains"):
        validation_gradient(model, groups)


def test_no_groups(make_model, make_groups) -> None:
    """An empty round is no error."""
    model = make_model("qwen2")
    batch = Probe(model, validation_gradient(model, make_groups(2))).probe([])
    assert batch.ids == []
    assert batch.scores("shrunk").shape == (0,)


# Statistics, against direct formulas and simulation.


def draws(n: int, size: int, seed: int, slope: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards (coin flips), derivatives that rise with the reward by `slope`, and lengths; [n, size] each."""
    random = np.random.default_rng(seed)
    rewards = random.integers(0, 2, (n, size)).astype(float)
    lengths = random.integers(5, 60, (n, size))
    return rewards, slope * rewards + random.normal(size=(n, size)) * (1 + rewards), lengths


@pytest.mark.parametrize(
    "settings",
    [
        Objective("mean", "seq-mean-token-mean"),
        Objective("mean_std", "seq-mean-token-mean"),
        Objective("rloo", "seq-mean-token-sum"),
        Objective("mean_std", "token-mean"),
    ],
    ids=lambda s: f"{s.advantage}-{s.aggregation}",
)
def test_standard_error_is_that_of_repeated_draws(settings: Objective) -> None:
    """A standard error that ignores the advantage's own normalisation is off by a factor where signal is strong."""
    rewards, values, lengths = draws(4000, 64, 0, slope=3.0)
    if settings.aggregation == "token-mean":  # sums that grow with the length, over the group's mean length
        values = values * lengths / lengths.mean(1, keepdims=True)
    found = [dot_and_error(r, d, t, settings) for r, d, t in zip(rewards, values, lengths, strict=True)]
    dots, errors = np.array(found).T
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(dots.std(), rel=0.08)


def test_standard_error_of_the_plain_advantage_is_the_simple_formula() -> None:
    """std_j(A_j (d_j - mean d)) / sqrt(G), as published beside the method."""
    rewards, values, lengths = (x[0] for x in draws(1, 16, 3, slope=1.0))
    dot, error = dot_and_error(rewards, values, lengths, objective("gradalign"))
    centred = rewards - rewards.mean()
    assert dot == pytest.approx(np.cov(rewards, values, ddof=0)[0, 1])
    assert error == pytest.approx(np.std(centred * (values - values.mean()), ddof=1) / 4)


def test_p_values_are_those_of_a_correlation_test() -> None:
    """Against scipy's own test, one-sided."""
    rewards, values, _ = draws(20, 12, 1, slope=0.7)
    for r_G, d_G in zip(rewards, values, strict=True):
        expected = stats.pearsonr(r_G, d_G, alternative="greater")
        t, p = t_test(r_G, d_G)
        assert p == pytest.approx(expected.pvalue, rel=1e-6)
        assert t == pytest.approx(expected.statistic * np.sqrt(10 / (1 - expected.statistic**2)))


@pytest.mark.parametrize("size", [8, 16, 64])
def test_type_one_error_under_coin_flips(size: int) -> None:
    """Under rewards that look at nothing, p < 0.05 must occur in one problem of twenty, or no cut holds its rate."""
    random = np.random.default_rng(size)
    p_values = []
    while len(p_values) < 8000:
        r_G = random.integers(0, 2, size).astype(float)
        if r_G.max() > r_G.min():
            p_values.append(t_test(r_G, random.normal(size=size))[1])
    for level in (0.01, 0.05, 0.2):
        share = np.mean(np.array(p_values) < level)
        assert share == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 8000))


def test_degenerate_statistics() -> None:
    """Two rollouts, equal derivatives, a perfect split: numbers, not nan."""
    assert t_test(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == (0.0, 1.0)
    assert t_test(np.array([0.0, 1.0, 1.0]), np.ones(3)) == (0.0, 1.0)
    t, p = t_test(np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert np.isfinite(t)
    assert p == pytest.approx(1 / 6)
    assert correlation(np.zeros(4), np.arange(4.0)) == 0.0
    assert np.isfinite(signal_to_noise(np.array([1.0, 2.0]), np.zeros(2))).all()
    assert np.isfinite(shrunk(np.array([1.0, 2.0]), np.zeros(2))).all()
    assert np.isnan(dot_and_error(np.ones(1), np.ones(1), np.ones(1), objective("gradalign"))[1])


def test_shrinkage_comes_closer_to_the_truth() -> None:
    """Empirical Bayes must beat the raw dots in squared error, and leave certain ones alone."""
    random = np.random.default_rng(0)
    true_P, errors_P = random.normal(0.3, 1.0, 3000), random.uniform(0.1, 2.0, 3000)
    dots_P = true_P + errors_P * random.normal(size=3000)
    found_P = shrunk(dots_P, errors_P)
    best_P = 0.3 + (dots_P - 0.3) / (1 + errors_P**2)  # the posterior mean under the prior the draws came from
    assert np.mean((found_P - true_P) ** 2) < 0.6 * np.mean((dots_P - true_P) ** 2)
    assert np.mean((found_P - true_P) ** 2) < 1.02 * np.mean((best_P - true_P) ** 2)
    assert np.abs(found_P - dots_P)[errors_P < 0.15].max() < 0.15
    np.testing.assert_allclose(lower_bound(dots_P, errors_P), dots_P - errors_P)


def test_false_discovery_cut_holds_its_rate() -> None:
    """Of the problems that pass at level 0.1 about a tenth or fewer may be noise; the step-up rule of the paper."""
    random = np.random.default_rng(1)
    shares = []
    for _ in range(200):
        z_P = random.normal(size=400)
        z_P[:80] += 3.5
        p_P = stats.norm.sf(z_P)
        passed = false_discovery_cut(p_P, 0.1)
        order = np.sort(p_P)
        below = np.flatnonzero(order <= 0.1 * np.arange(1, 401) / 400)
        assert passed.sum() == (below[-1] + 1 if len(below) else 0)
        shares.append(passed[80:].sum() / max(passed.sum(), 1))
    assert np.mean(shares) < 0.1


def test_a_batch_can_be_made_from_derivatives_alone(make_groups) -> None:
    """Derivatives that were stored give the same statistics again."""
    groups = make_groups(5, n_rollouts=6)
    random = np.random.default_rng(0)
    derivatives = [random.normal(size=6) for _ in groups]
    batch = ProbeBatch.of(groups, derivatives, objective("grpo"))
    for i, (group, d_G) in enumerate(zip(groups, derivatives, strict=True)):
        assert batch.dots[i] == pytest.approx(np.mean(slow_advantages(group.rewards, "mean_std") * d_G))
        assert batch.scores("corr")[i] == pytest.approx(correlation(group.rewards, d_G))


def test_a_batch_is_kept_beside_the_rows(make_store, make_groups) -> None:
    """Rescoring months later needs what was measured, not what was made of it."""
    store, groups = make_store(), make_groups(3, n_rollouts=6)
    groups = [Group(f"p{i:03d}", g.prompt_ids, g.responses, g.rewards) for i, g in enumerate(groups)]
    random = np.random.default_rng(0)
    settings = Objective("mean_std", "token-mean")
    batch = ProbeBatch.of(groups, [random.normal(size=6).astype(np.float32) for _ in groups], settings)
    batch.save(store, "pool", step=3, target="bench", target_commit=store.commit("bench"))
    again = ProbeBatch.load(store, "pool", step=3, target="bench")
    assert again.ids == batch.ids
    assert again.settings == settings
    np.testing.assert_allclose(again.dots, batch.dots)
    np.testing.assert_allclose(again.standard_errors, batch.standard_errors)
    with pytest.raises(RequestError, match="no probes at step 4"):
        ProbeBatch.load(store, "pool", step=4, target="bench")
