"""Every sketch is the projection of the gradient autograd gives for that problem alone."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from gradstore.engine import Objective, Sketcher, SketchSpec, fit_projection, objective
from gradstore.engine.rollouts import Group
from gradstore.errors import RequestError
from gradstore.state import State
from tests.engine.conftest import ON_POLICY, own_gradient

ARCHITECTURES = ["qwen2", "llama", "gpt2", "qwen2-lora"]


def slow_advantages(rewards: np.ndarray, kind: str) -> list[float]:
    advantages = []
    for j, reward in enumerate(rewards):
        others = [r for i, r in enumerate(rewards) if i != j]
        if kind == "rloo":
            advantages.append(reward - sum(others) / len(others))
        elif kind == "mean":
            advantages.append(reward - sum(rewards) / len(rewards))
        else:
            mean = sum(rewards) / len(rewards)
            deviation = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
            advantages.append((reward - mean) / (deviation + 1e-6))
    return advantages


def slow_objective(model: nn.Module, group: Group, settings: Objective) -> torch.Tensor:
    """One rollout at a time, one token at a time, straight from the definitions."""
    advantages = slow_advantages(group.rewards, settings.advantage)
    n_tokens = sum(len(response) for response in group.responses)
    total = torch.zeros(())
    for j, response in enumerate(group.responses):
        ids = torch.tensor([*group.prompt_ids, *response])[None]
        logprobs = (model(input_ids=ids).logits[0] / settings.temperature).log_softmax(-1)
        for t, token in enumerate(response):
            logprob = logprobs[len(group.prompt_ids) + t - 1, token]
            share = {
                "seq-mean-token-sum": 1 / len(group.responses),
                "seq-mean-token-mean": 1 / len(group.responses) / len(response),
                "token-mean": 1 / n_tokens,
            }[settings.aggregation]
            term = advantages[j] * logprob
            if settings.importance:
                ratio = (logprob - float(group.logprobs[j][t])).exp()
                low = 0 if settings.clip_low is None else 1 - settings.clip_low
                high = float("inf") if settings.clip_high is None else 1 + settings.clip_high
                term = torch.minimum(ratio * advantages[j], ratio.clamp(low, high) * advantages[j])
            total = total + share * term
    return total


def slow_sketch(
    model: nn.Module, sketcher: Sketcher, group: Group, settings: Objective, penalty: Callable | None = None
) -> np.ndarray:
    """Full weight gradients of the problem alone, less a penalty's, then the projection."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # untied: the output layer's own gradient
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    value = slow_objective(model, group, settings)
    (value if penalty is None else value - penalty(model, group, settings)).backward()
    parts = []
    for basis in sketcher.projection.layers:
        gradient_OI = own_gradient(model, basis.name).numpy()
        left = np.eye(len(gradient_OI)) if basis.left_OR is None else basis.left_OR
        right = np.eye(gradient_OI.shape[1]) if basis.right_IR is None else basis.right_IR
        parts.append((left.T @ gradient_OI @ right).ravel())
    core, fold = np.concatenate(parts), sketcher.projection.fold
    if fold is None:
        return core
    folded = np.zeros(sketcher.dim)
    for of, to, sign in zip(fold.of_M, fold.to_M, fold.sign_M, strict=True):
        folded[to] += sign * core[of]
    return folded


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("preset", ON_POLICY)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sketch_is_the_projected_gradient(make_model, make_groups, architecture: str, preset: str) -> None:
    """Without it nothing that is ranked later means anything."""
    model, groups = make_model(architecture), make_groups(5)
    sketcher = Sketcher(model, SketchSpec(rank=6, objective=objective(preset)))
    batch = sketcher.sketch(groups)
    assert batch.sketches.shape == (5, sketcher.dim)
    assert batch.states == [State.LIVE] * 5
    for group, found in zip(groups, batch.sketches, strict=True):
        assert relative_error(found, slow_sketch(model, sketcher, group, objective(preset))) < 1e-5


@pytest.mark.parametrize("basis", ["dense", "fitted"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_bases(make_model, make_groups, architecture: str, basis: str) -> None:
    """A folded sketch is the fold of the projected gradient."""
    model, groups = make_model(architecture), make_groups(5)
    spec = SketchSpec(rank=6, basis=basis, dim=100)
    projection = fit_projection(model, make_groups(12, seed=1), spec) if basis == "fitted" else None
    sketcher = Sketcher(model, spec, projection)
    batch = sketcher.sketch(groups)
    assert batch.sketches.shape == (5, 100)
    for group, found in zip(groups, batch.sketches, strict=True):
        assert relative_error(found, slow_sketch(model, sketcher, group, objective("gradalign"))) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        Objective("rloo", "token-mean"),
        Objective("mean_std", "token-mean", temperature=0.7),
        Objective("mean", "seq-mean-token-sum", importance=True),
        Objective("mean_std", "seq-mean-token-mean", importance=True, clip_low=0.2, clip_high=0.3),
    ],
    ids=["rloo-token-mean", "temperature", "importance", "clipped"],
)
def test_other_objectives(make_model, make_groups, settings: Objective) -> None:
    """Each combination of advantage, aggregation, temperature and clipping is the one its name says."""
    model, groups = make_model("qwen2"), make_groups(4, logprobs=True)
    sketcher = Sketcher(model, SketchSpec(rank=6, objective=settings))
    for group, found in zip(groups, sketcher.sketch(groups).sketches, strict=True):
        assert relative_error(found, slow_sketch(model, sketcher, group, settings)) < 1e-5


def test_importance_with_current_logprobs_is_on_policy(make_model, make_groups) -> None:
    """With the behaviour policy equal to the current one, every ratio is 1 and nothing changes."""
    model, groups = make_model("llama"), make_groups(3)
    with torch.no_grad():
        current = []
        for group in groups:
            logprobs = []
            for response in group.responses:
                ids = torch.tensor([*group.prompt_ids, *response])[None]
                log_TV = model(input_ids=ids).logits[0].log_softmax(-1)[len(group.prompt_ids) - 1 : -1]
                logprobs.append(log_TV.gather(1, torch.tensor(response)[:, None])[:, 0].numpy())
            current.append(Group(group.problem_id, group.prompt_ids, group.responses, group.rewards, logprobs))
    on = Sketcher(model, SketchSpec(rank=6)).sketch(groups).sketches
    off_spec = SketchSpec(rank=6, objective=objective("gradalign", importance=True, clip_low=0.2, clip_high=0.2))
    assert relative_error(Sketcher(model, off_spec).sketch(current).sketches, on) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batching_order_and_padding_do_not_matter(make_model, make_groups, architecture: str) -> None:
    """A score that depends on the micro-batch ranks problems by their neighbours."""
    model, groups = make_model(architecture), make_groups(6)
    whole = Sketcher(model, SketchSpec(rank=6)).sketch(groups)
    order = np.random.default_rng(1).permutation(len(groups))
    for token_budget in (1, 20, 75, 1000):
        batch = Sketcher(model, SketchSpec(rank=6, token_budget=token_budget)).sketch([groups[i] for i in order])
        assert batch.ids == [groups[i].problem_id for i in order]
        assert relative_error(batch.sketches, whole.sketches[order]) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_prompts_change_nothing(make_model, make_groups, architecture: str) -> None:
    """A prompt computed once for its rollouts must give the gradient of computing it for each."""
    model, groups = make_model(architecture), make_groups(6)
    plain = Sketcher(model, SketchSpec(rank=6, share_prompts=False)).sketch(groups)
    for token_budget in (1, 40, 1000):
        sketcher = Sketcher(model, SketchSpec(rank=6, token_budget=token_budget))
        assert sketcher.policy.shares_prompts
        assert not sketcher.policy.fallbacks
        assert relative_error(sketcher.sketch(groups).sketches, plain.sketches) < 1e-5


def test_logits_a_chunk_at_a_time(make_model, make_groups, monkeypatch) -> None:
    """With 150,000 tokens in the vocabulary the logits of a whole micro-batch do not fit in memory."""
    model, groups = make_model("llama"), make_groups(6)
    whole = Sketcher(model, SketchSpec(rank=6)).sketch(groups)
    widest = []
    head = model.get_output_embeddings()
    monkeypatch.setattr("gradstore.engine.gradients.passes.LOGIT_BYTES_ON_CPU", 4 * 61 * 40)
    sketcher = Sketcher(model, SketchSpec(rank=6))
    handle = head.register_forward_hook(
        lambda _module, _inputs, output: widest.append(output.shape[0] * output.shape[1])
    )
    chunked = sketcher.sketch(groups)
    handle.remove()
    assert max(widest) <= 40
    assert relative_error(chunked.sketches, whole.sketches) < 1e-5


def test_a_model_that_caps_its_logits_falls_back_aloud(make_model, make_groups, caplog) -> None:
    """Where a shortcut is not exact the plain forward must serve, and say so."""
    model, groups = make_model("qwen2"), make_groups(3)

    class Capped(type(model)):
        def forward(self, *arguments, **named):
            output = super().forward(*arguments, **named)
            output.logits = 5 * torch.tanh(output.logits / 5)
            return output

    model.__class__ = Capped
    sketcher = Sketcher(model, SketchSpec(rank=6))
    assert not sketcher.policy.shares_prompts
    assert "not exact" in caplog.text
    for group, found in zip(groups, sketcher.sketch(groups).sketches, strict=True):
        assert relative_error(found, slow_sketch(model, sketcher, group, objective("gradalign"))) < 1e-5


def test_rollouts_in_any_order(make_model, make_groups) -> None:
    """The order of a problem's rollouts carries no meaning."""
    model, (group,) = make_model("qwen2"), make_groups(1, n_rollouts=6)
    order = [3, 5, 0, 1, 4, 2]
    shuffled = Group("x", group.prompt_ids, [group.responses[j] for j in order], group.rewards[order])
    sketches = Sketcher(model, SketchSpec(rank=6)).sketch([group, shuffled]).sketches
    assert relative_error(sketches[1], sketches[0]) < 1e-5


def test_responses_sampled_more_than_once_are_run_once(make_model, make_groups) -> None:
    """Short answers repeat; running each again would cost as much as the first and must not change the sketch."""
    model, (group,) = make_model("qwen2"), make_groups(1, n_rollouts=3)
    repeated = [group.responses[j] for j in (0, 1, 0, 2, 1, 1)]
    again = Group("x", group.prompt_ids, repeated, np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]))
    sketcher = Sketcher(model, SketchSpec(rank=6))
    batch = sketcher.sketch([again])
    assert relative_error(batch.sketches[0], slow_sketch(model, sketcher, again, objective("gradalign"))) < 1e-5
    assert batch.n_tokens <= sum(len(group.prompt_ids) + len(response) for response in group.responses)


def test_scaling_rewards_scales_the_gradient(make_model, make_groups) -> None:
    """The mean advantage is linear in the rewards; GRPO's does not change with their scale."""
    model, (group,) = make_model("qwen2"), make_groups(1)
    tripled = Group("x", group.prompt_ids, group.responses, 3 * group.rewards + 1)
    plain, scaled = Sketcher(model, SketchSpec(rank=6)).sketch([group, tripled]).sketches
    assert relative_error(scaled, 3 * plain) < 1e-5
    grpo = Sketcher(model, SketchSpec(rank=6, objective=objective("grpo"))).sketch([group, tripled]).sketches
    assert relative_error(grpo[1], grpo[0]) < 1e-4


def test_equal_rewards_are_no_signal_and_not_run(make_model, make_groups) -> None:
    """A zero gradient must not outrank a negative score, nor cost a pass."""
    model, (group, *_) = make_model("qwen2"), make_groups(2)
    flat = Group("flat", group.prompt_ids, group.responses, np.ones(len(group.responses)))
    batch = Sketcher(model, SketchSpec(rank=6)).sketch([flat])
    assert batch.states == [State.NO_SIGNAL]
    assert not batch.sketches.any()
    assert batch.n_tokens == 0
    assert batch.pass_rates.tolist() == [1.0]


def test_empty_response_counts_in_the_baseline_only(make_model, make_groups) -> None:
    """An empty answer has no token to push, but its reward moves the mean."""
    model, (group,) = make_model("qwen2"), make_groups(1, n_rollouts=3)
    with_empty = Group("x", group.prompt_ids, [*group.responses, np.empty(0, np.int64)], np.append(group.rewards, 0.0))
    sketcher = Sketcher(model, SketchSpec(rank=6))
    found = sketcher.sketch([with_empty]).sketches[0]
    expected = np.zeros(sketcher.dim)
    for j, response in enumerate(group.responses):
        pair = Group("y", group.prompt_ids, [response, np.empty(0, np.int64)], np.array([1.0, 0.0]))
        gradient_of_mean_logprob = 4 * sketcher.sketch([pair]).sketches[0]
        expected += (with_empty.rewards[j] - with_empty.rewards.mean()) / 4 * gradient_of_mean_logprob
    assert relative_error(found, expected) < 1e-5


def test_a_problem_with_a_broken_gradient_fails_alone(make_model, make_groups) -> None:
    """One non-finite problem must not reach its neighbours in the micro-batch."""
    model, groups = make_model("llama"), make_groups(3)
    token = int(groups[1].prompt_ids[0])
    keep = [g for g in groups if g is groups[1] or not any(token in ids for ids in (g.prompt_ids, *g.responses))]
    clean = Sketcher(model, SketchSpec(rank=6)).sketch(keep)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    batch = Sketcher(model, SketchSpec(rank=6)).sketch(keep)
    for row, group in enumerate(keep):
        if group is groups[1]:
            assert batch.states[row] is State.FAILED
            assert batch.reasons[row] == "the gradient is not finite"
            assert not batch.sketches[row].any()
        else:
            assert batch.states[row] is State.LIVE
            assert relative_error(batch.sketches[row], clean.sketches[row]) < 1e-5


def test_the_model_is_left_as_it_was_found(make_model, make_groups) -> None:
    """A live trainer's policy must go on training as before: same flags, same mode, no gradients, no hooks."""
    model = make_model("qwen2-lora").train()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    ids = torch.arange(8)[None]
    model.eval()
    before = model(input_ids=ids).logits
    model.train()
    Sketcher(model, SketchSpec(rank=6)).sketch(make_groups(2))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, before)


def test_the_model_is_restored_after_an_error(make_model, make_groups) -> None:
    """An error in the middle must not leave frozen weights behind."""
    model = make_model("qwen2").train()
    sketcher = Sketcher(model, SketchSpec(rank=6))
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("boom")))
    with pytest.raises(KeyError):
        sketcher.sketch(make_groups(1))
    handle.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_lora_sketches_the_adapters_only(make_model) -> None:
    """Base weights do not train, so their gradients do not belong in the sketch; the rank axis is kept whole."""
    sketcher = Sketcher(make_model("qwen2-lora"), SketchSpec(rank=6))
    assert all(".lora_" in name for name, _, _ in sketcher.fingerprint["layout"])
    widths = {name: stop - start for name, start, stop in sketcher.fingerprint["layout"]}
    assert set(widths.values()) == {4 * 6}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: Group("p", g.prompt_ids, [np.ones(63, np.int64), g.responses[0]], np.array([0.0, 1.0])), "context"),
        (lambda g: Group("p", np.array([61]), g.responses, g.rewards), "token id 61 is outside"),
    ],
    ids=["too long", "outside the vocabulary"],
)
def test_bad_groups_are_refused(make_model, make_groups, change, message: str) -> None:
    """Each names the problem and what was expected."""
    (group,) = make_groups(1)
    with pytest.raises(RequestError, match=message) as error:
        Sketcher(make_model("qwen2"), SketchSpec(rank=6)).sketch([change(group)])
    assert "problem 'p'" in str(error.value)


def test_importance_needs_logprobs(make_model, make_groups) -> None:
    """Falling back to on-policy silently would score stale rollouts as fresh ones."""
    spec = SketchSpec(rank=6, objective=objective("grpo", importance=True))
    with pytest.raises(RequestError, match="'problem-0': has no log-probabilities"):
        Sketcher(make_model("qwen2"), spec).sketch(make_groups(1))


def test_fingerprint_tells_settings_apart(make_model) -> None:
    """Rows of two seeds, ranks, objectives or models must never meet in one store."""
    model = make_model("qwen2")
    base = Sketcher(model, SketchSpec(rank=6)).fingerprint
    assert Sketcher(make_model("qwen2"), SketchSpec(rank=6, token_budget=7)).fingerprint == base
    others = [
        Sketcher(model, SketchSpec(rank=6, seed=1)),
        Sketcher(model, SketchSpec(rank=5)),
        Sketcher(model, SketchSpec(rank=6, objective=objective("grpo"))),
        Sketcher(model, SketchSpec(rank=6, modules=("q_proj",))),
        Sketcher(make_model("llama"), SketchSpec(rank=6)),
        Sketcher(make_model("qwen2-lora"), SketchSpec(rank=6)),
    ]
    assert all(other.fingerprint != base for other in others)
