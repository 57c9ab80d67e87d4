"""The embedded trainer: its update is the engine's objective, its policy keeps the protocol, a killed run resumes."""

import copy
import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradstore
from gradstore import RequestError, State
from gradstore.engine import Reference, Sketcher, SketchSpec, objective, validation_gradient
from gradstore.engine.gradients.coverage import measure
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.objectives import Objective, rollout_weights
from gradstore.engine.probing.probe import Probe
from gradstore.engine.rollouts.group import Group, joined
from gradstore.errors import GradstoreError
from gradstore.trainer.local.checkpoint import load_checkpoint, save_checkpoint
from gradstore.trainer.local.grpo import Learner
from gradstore.trainer.local.policy import LocalPolicy
from gradstore.trainer.local.settings import Sampling, UpdateSettings
from gradstore.trainer.sampling.reward import Reward

VOWELS = Reward("vowels", lambda record, response, rollout_index: float(sum(c in "aeiou" for c in response) > 1))
PROBLEMS = [{"id": f"p{j}", "prompt": f"{j} plus {j + 1} =" * (1 + j % 2)} for j in range(6)]


@pytest.fixture
def model(tiny_model: Any) -> Any:
    return copy.deepcopy(tiny_model)


@pytest.fixture
def policy(model: Any, tiny_tokenizer: Any) -> LocalPolicy:
    return LocalPolicy(model, tiny_tokenizer, VOWELS, Sampling(max_new_tokens=24))


@pytest.fixture
def groups(policy: LocalPolicy) -> list[Group]:
    return policy.roll_out(PROBLEMS, 8, seed=3)


@pytest.fixture
def paid(groups: list[Group]) -> list[Group]:
    """With rewards that differ in every group."""
    random = np.random.default_rng(0)
    return [replace(group, rewards=random.random(len(group.responses))) for group in groups]


def _objective_of(model: Any, group: Group, settings: Any, factors: np.ndarray | None = None) -> torch.Tensor:
    """sum_j w_j sum_t log pi(y_jt), one plain forward a response; factors: of each rollout's weight."""
    lengths = np.array([len(response) for response in group.responses])
    total = torch.zeros(())
    weights = rollout_weights(group.rewards, lengths, settings) * (1.0 if factors is None else factors)
    for response, weight in zip(group.responses, weights, strict=True):
        ids = torch.from_numpy(np.concatenate([group.prompt_ids, response]))
        logprobs = model(ids[None], use_cache=False).logits[0].log_softmax(-1)[len(group.prompt_ids) - 1 : -1]
        total = total + weight * logprobs.gather(1, torch.from_numpy(response)[:, None]).sum()
    return total


def _flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@pytest.mark.parametrize("preset", ["grpo", "gradalign", "dr_grpo"])
def test_a_step_follows_the_mean_of_the_engines_gradients(model: Any, groups: list[Group], preset: str) -> None:
    """Alignment predicts what training does only if both see one gradient: SGD moves the weights along it exactly."""
    rule = objective(preset)
    expected = copy.deepcopy(model)
    objectives = [_objective_of(expected, group, rule) for group in groups]
    (torch.stack(objectives).mean()).backward()
    slow = {name: weight.grad for name, weight in expected.named_parameters() if weight.grad is not None}
    direction = validation_gradient(model, groups, rule)
    torch.testing.assert_close(_flat({n: direction.tensors[n] for n in slow}), _flat(slow), atol=1e-6, rtol=1e-3)

    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    learner = Learner(model, UpdateSettings(lr=0.5, objective=rule, clip_grad=None))
    learner.optimizer = torch.optim.SGD(learner.parameters.values(), lr=0.5)
    metrics = learner.step(groups)
    moved = {name: (weight.detach() - before[name]) / 0.5 for name, weight in model.named_parameters() if name in slow}
    torch.testing.assert_close(_flat(moved), _flat(slow), atol=1e-5, rtol=1e-3)
    assert metrics["grad_norm"] == pytest.approx(float(_flat(slow).norm()), rel=1e-3)


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo"])
def test_weights_multiply_each_problems_part(model: Any, paid: list[Group], preset: str) -> None:
    """A selection's weights, in whatever order the problems are dealt; weights of 1 leave not a bit different."""
    rule, weights = objective(preset), [2.0, 0.0, 0.5, 1.0, 1.0, 1.5]
    slow = copy.deepcopy(model)
    parts = [weight * _objective_of(slow, group, rule) for group, weight in zip(paid, weights, strict=True)]
    torch.stack(parts).mean().backward()
    expected = {name: weight.grad for name, weight in slow.named_parameters() if weight.grad is not None}

    def moved(given: list[float] | None) -> torch.Tensor:
        own = copy.deepcopy(model)
        learner = Learner(own, UpdateSettings(lr=0.5, objective=rule, clip_grad=None))
        learner.optimizer = torch.optim.SGD(learner.parameters.values(), lr=0.5)
        learner.step(paid, 5, given)
        before = dict(model.named_parameters())
        return _flat({n: (w.detach() - before[n].detach()) / 0.5 for n, w in own.named_parameters() if n in expected})

    torch.testing.assert_close(moved(weights), _flat(expected), atol=1e-5, rtol=1e-3)
    assert torch.equal(moved([1.0] * 6), moved(None))


def test_sketches_of_a_weighted_step_are_of_the_problems_themselves(model: Any, paid: list[Group]) -> None:
    """How much a problem counts in training is no property of its gradient; one that is left out has a row too."""
    sketcher = Sketcher(model, SketchSpec(rank=4))
    expected = sketcher.sketch(paid)
    learner = Learner(model, UpdateSettings(lr=1e-3, objective=objective("gradalign")))
    kept = [np.ones(len(group.rewards)) for group in paid]
    kept[3][::2] = 0.0
    _, found = learner.step_and_sketch(paid, sketcher, 3, [3.0, 0.0, 0.25, 1.0, 1.0, 0.5], kept)
    rows = dict(zip(found.ids, found.sketches, strict=True))
    assert expected.sketches.any(axis=1).all()
    for name, row in zip(expected.ids, expected.sketches, strict=True):
        np.testing.assert_allclose(rows[name], row, atol=1e-5 * np.abs(expected.sketches).max())


def _moved(model: Any, rule: Objective, groups: list[Group], **weights: Any) -> torch.Tensor:
    """What one step of plain gradient ascent with rate 1 does to the weights."""
    own = copy.deepcopy(model)
    learner = Learner(own, UpdateSettings(lr=1.0, objective=rule, clip_grad=None))
    learner.optimizer = torch.optim.SGD(learner.parameters.values(), lr=1.0)
    learner.step(groups, 5, **weights)
    before = dict(model.named_parameters())
    return _flat({name: weight.detach() - before[name].detach() for name, weight in own.named_parameters()})


def test_rollout_weights_multiply_each_rollouts_part(model: Any, paid: list[Group]) -> None:
    """A dropped rollout leaves the baseline of the others; weights of 1 leave not a bit different."""
    rule, random = objective("grpo"), np.random.default_rng(1)
    weights = [random.choice([0.0, 0.5, 1.0, 2.0], len(group.rewards)) for group in paid]
    slow = copy.deepcopy(model)
    parts = [_objective_of(slow, group, rule, own) for group, own in zip(paid, weights, strict=True)]
    torch.stack(parts).mean().backward()
    grads = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in slow.named_parameters()}
    moved = _moved(model, rule, paid, rollout_weights=weights)
    torch.testing.assert_close(moved, _flat(grads), atol=1e-5, rtol=1e-3)
    plain = _moved(model, rule, paid)
    assert torch.equal(_moved(model, rule, paid, rollout_weights=[np.ones(len(g.rewards)) for g in paid]), plain)
    nothing = [np.zeros(len(g.rewards)) for g in paid]
    assert not _moved(model, rule, paid, rollout_weights=nothing).any()
    for wrong in (weights[1:], [-own for own in weights], [own[1:] for own in weights]):
        with pytest.raises(RequestError, match="rollout weights"):
            Learner(model, UpdateSettings()).step(paid, 5, None, wrong)


def test_clipping_scales_the_gradient_and_keeps_its_direction(model: Any, groups: list[Group]) -> None:
    """Unclipped, one lucky batch can throw the policy away."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    learner = Learner(model, UpdateSettings(clip_grad=1e-3))
    learner.optimizer = torch.optim.SGD(learner.parameters.values(), lr=1e-6)  # the settings' own learning rate
    learner.step(groups)
    moved = _flat({name: weight.detach() - before[name] for name, weight in model.named_parameters()})
    assert float(moved.norm()) < 2e-9
    direction = validation_gradient(model, groups, objective("grpo"))
    assert direction.norm > 1e-3


def test_training_raises_the_reward(policy: LocalPolicy) -> None:
    """The sign: descent on the objective would also run without an error."""
    learner = Learner(policy.model, UpdateSettings(lr=3e-3))
    first = np.mean([g.rewards.mean() for g in policy.roll_out(PROBLEMS, 32, seed=99)])
    for step in range(12):
        learner.step(policy.roll_out(PROBLEMS, 16, seed=step))
    last = np.mean([g.rewards.mean() for g in policy.roll_out(PROBLEMS, 32, seed=99)])
    assert last > first + 0.2


def _ppo(now_N: torch.Tensor, then_N: torch.Tensor, weight: float) -> torch.Tensor:
    ratio_N = (now_N - then_N).exp()
    return torch.minimum(ratio_N * weight, ratio_N.clamp(1 - 0.01, 1 + 0.02) * weight)


def _cispo(now_N: torch.Tensor, then_N: torch.Tensor, weight: float) -> torch.Tensor:
    return (now_N - then_N).exp().clamp(max=1 + 0.02).detach() * weight * now_N


def _gspo(now_N: torch.Tensor, then_N: torch.Tensor, weight: float) -> torch.Tensor:
    ratio = (now_N - then_N).mean().exp()
    return torch.minimum(ratio * weight, ratio.clamp(1 - 3e-4, 1 + 4e-4) * weight).expand(len(now_N))


@pytest.mark.parametrize(
    ("surrogate", "settings"),
    [
        (_ppo, UpdateSettings(minibatches=2, clip_low=0.01, clip_high=0.02)),
        (_cispo, UpdateSettings(minibatches=2, objective=objective("cispo", clip_high=0.02))),
        (_gspo, UpdateSettings(minibatches=2, objective=objective("gspo"))),
    ],
)
def test_later_minibatches_follow_the_surrogate(
    model: Any, groups: list[Group], surrogate: Any, settings: UpdateSettings
) -> None:
    """They are off-policy: without ratio and bound they would push again what was pushed enough."""
    random, rate = np.random.default_rng(0), 0.5
    paid = [Group(g.problem_id, g.prompt_ids, g.responses, random.random(len(g.responses)), g.logprobs) for g in groups]
    slow, n_bounded = copy.deepcopy(model), 0
    for part in np.array_split(np.random.default_rng(7).permutation(len(paid)), 2):
        slow.zero_grad()
        for group in (paid[i] for i in part):
            lengths = np.array([len(response) for response in group.responses])
            weights = rollout_weights(group.rewards, lengths, settings.objective)
            assert group.logprobs is not None
            for response, weight, old in zip(group.responses, weights, group.logprobs, strict=True):
                ids = torch.from_numpy(np.concatenate([group.prompt_ids, response]))
                logprobs = slow(ids[None], use_cache=False).logits[0].log_softmax(-1)[len(group.prompt_ids) - 1 : -1]
                now_N, then_N = logprobs.gather(1, torch.from_numpy(response)[:, None])[:, 0], torch.from_numpy(old)
                terms_N = surrogate(now_N, then_N, weight)
                n_bounded += int((terms_N.detach() != ((now_N - then_N).exp() * weight).detach()).sum())
                (-terms_N.sum() / len(part)).backward()
        with torch.no_grad():
            for weight in slow.parameters():
                weight -= rate * weight.grad
    learner = Learner(model, replace(settings, lr=rate, clip_grad=None))
    learner.optimizer = torch.optim.SGD(learner.parameters.values(), lr=rate)
    learner.step(paid, seed=7)
    assert learner.updates == 2
    assert n_bounded > 100
    torch.testing.assert_close(
        _flat(dict(model.named_parameters())), _flat(dict(slow.named_parameters())), atol=2e-5, rtol=1e-3
    )
    bare = [Group(g.problem_id, g.prompt_ids, g.responses, g.rewards) for g in paid]
    with pytest.raises(RequestError, match="log-probabilities"):
        learner.step(bare)


def test_an_update_has_one_pair_of_bounds() -> None:
    """Bounds of the update beside an objective that has its own would be read as the ones that hold."""
    assert UpdateSettings(objective=objective("gspo")).rule == objective("gspo")
    assert UpdateSettings().rule == objective("grpo")
    with pytest.raises(RequestError, match=r"give objective\.clip_low"):
        UpdateSettings(minibatches=2, objective=objective("dapo"), clip_high=0.3)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_step_gives_the_sketches_of_its_rollouts(policy: LocalPolicy, groups: list[Group], minibatches: int) -> None:
    """They are of the policy before the update, and having them must not change where the update goes."""
    twice = [*groups, replace(groups[0], rewards=groups[0].rewards[::-1].copy())]  # one problem twice in the step
    policy.fit(SketchSpec(basis="fitted", rank=4, dim=64), groups)
    expected = policy.sketch([joined([twice[0], twice[-1]]), *groups[1:]])
    settings, other = UpdateSettings(lr=1e-2, minibatches=minibatches), copy.deepcopy(policy.model)
    metrics, found = Learner(policy.model, settings).step_and_sketch(twice, policy.sketcher, seed=5)
    assert metrics == Learner(other, settings).step(twice, seed=5)
    for weight, plain in zip(policy.model.parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, plain)
    place = [found.ids.index(name) for name in expected.ids]
    scale = np.abs(expected.sketches).max()
    np.testing.assert_allclose(found.sketches[place], expected.sketches, rtol=1e-4, atol=1e-5 * scale)
    assert found.norms is not None
    assert expected.norms is not None
    np.testing.assert_allclose(found.norms[place], expected.norms, rtol=1e-5)
    assert [found.states[i] for i in place] == expected.states
    assert found.n_rollouts[place].tolist() == expected.n_rollouts.tolist()


def test_probes_do_not_depend_on_what_was_probed_before(policy: LocalPolicy, groups: list[Group]) -> None:
    """A resumed round probes only what is missing: a step calibrated on that would give other numbers."""
    policy.fit(SketchSpec(rank=4), groups)
    with pytest.raises(RequestError, match="call `aim` first"):
        policy.probe(groups[3:])
    batch = policy.aim(groups[:3])
    np.testing.assert_allclose(batch.sketches, policy.sketch(groups[:3]).sketches, rtol=1e-4, atol=1e-7)
    policy.probe(groups[3:4])
    after = policy.probe(groups[4:])
    policy.aim(groups[:3])
    alone = policy.probe(groups[4:])
    for one, other in zip(after.derivatives, alone.derivatives, strict=True):
        np.testing.assert_array_equal(one, other)
    policy.aim(groups[:3])
    assert alone.calibration is not None
    carried = policy.probe(groups[4:], alone.calibration)
    np.testing.assert_allclose(carried.dots, alone.dots, rtol=1e-2, atol=1e-3 * np.abs(alone.dots).max())
    policy.step += 1
    with pytest.raises(RequestError, match="at step 1"):
        policy.probe(groups[4:])


def test_a_calibration_that_fails_leaves_the_direction(policy: LocalPolicy, groups: list[Group], monkeypatch) -> None:
    """The direction is made from the sum of gradients once: a second division would shorten it, and every dot."""
    policy.fit(SketchSpec(rank=4), groups)
    policy.aim(groups[:3])
    expected = policy.probe(groups[3:]).dots
    policy.aim(groups[:3])

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Probe, "calibrate", fail)
        with pytest.raises(MemoryError):
            policy.probe(groups[3:])
    np.testing.assert_array_equal(policy.probe(groups[3:]).dots, expected)


def test_rollouts_know_the_reference(model: Any, tiny_tokenizer: Any) -> None:
    """A KL term in updates and sketches is to the model that training began from: rows that dropped it, or had it to
    the policy itself, would still rank."""
    first = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    policy = LocalPolicy(model, tiny_tokenizer, VOWELS, Sampling(max_new_tokens=24), reference=Reference(first))
    groups = policy.roll_out(PROBLEMS, 8, seed=3)
    assert [g.reference_logprobs is not None for g in groups] == [group.has_signal for group in groups]
    rule = objective("grpo", kl_beta=0.5, reference=Reference(first).digest)
    policy.fit(SketchSpec(rank=4, objective=rule), groups)
    bare = [replace(group, reference_logprobs=None) for group in groups]
    expected = Sketcher(model, SketchSpec(rank=4, objective=rule)).sketch([Reference(first)(group) for group in bare])
    settings = UpdateSettings(lr=1e-2, objective=rule)
    learner, plain = Learner(copy.deepcopy(model), settings), Learner(copy.deepcopy(model), settings)
    plain.step(groups)
    policy.model, sketcher = learner.model, Sketcher(learner.model, SketchSpec(rank=4, objective=rule))
    _, found = learner.step_and_sketch(groups, sketcher)
    place = [found.ids.index(name) for name in expected.ids]
    np.testing.assert_allclose(found.sketches[place], expected.sketches, rtol=1e-3, atol=1e-5)
    for weight, other in zip(learner.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(weight, other)
    without = Sketcher(model, SketchSpec(rank=4, objective=objective("grpo"))).sketch(bare)
    assert np.abs(without.sketches - expected.sketches).max() > 1e-2 * np.abs(expected.sketches).max()
    for reference in (None, Reference(model)):
        other_policy = LocalPolicy(model, tiny_tokenizer, VOWELS, Sampling(), reference=reference)
        with pytest.raises(RequestError, match="KL term to the reference"):
            other_policy.fit(SketchSpec(rank=4, objective=rule), groups)


def test_only_adapters_train_with_lora(tiny_model: Any, groups: list[Group]) -> None:
    """A base that moved under its adapter would be lost when the adapter alone is saved."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        copy.deepcopy(tiny_model), peft.LoraConfig(r=4, target_modules="all-linear", lora_alpha=8)
    )
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    learner = Learner(model, UpdateSettings(lr=1e-2))
    learner.step(groups)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_no_signal_moves_nothing(model: Any, groups: list[Group]) -> None:
    """Adam's momentum would go on by itself; equal rewards say nothing."""
    flat = [Group(g.problem_id, g.prompt_ids, g.responses, np.ones(len(g.responses)), g.logprobs) for g in groups]
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    assert Learner(model, UpdateSettings(lr=1.0)).step(flat)["grad_norm"] == 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_the_policy_keeps_the_protocol(policy: LocalPolicy) -> None:
    """What rounds rely on: order, ids, the same answer again, sketches of a store's basis, probes along a target."""
    groups = policy.roll_out(PROBLEMS, 8, seed=3)
    again = policy.roll_out(PROBLEMS, 8, seed=3)
    assert [group.problem_id for group in groups] == [problem["id"] for problem in PROBLEMS]
    for one, other in zip(groups, again, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one.responses, other.responses, strict=True))
        assert np.array_equal(one.rewards, other.rewards)
    with pytest.raises(RequestError, match="no sketcher yet"):
        policy.sketch(groups)
    files = policy.fit(SketchSpec(basis="fitted", rank=4, dim=64), groups)
    sketches = policy.sketch(groups)
    assert sketches.sketches.shape == (len(PROBLEMS), files.dim)
    policy.use(files.fingerprint, files.attachments)
    np.testing.assert_allclose(policy.sketch(groups).sketches, sketches.sketches, rtol=1e-4, atol=1e-7)
    policy.aim(groups)
    probes = policy.probe(groups)
    assert sketches.states == probes.states
    live = [i for i, state in enumerate(probes.states) if state is State.LIVE]
    exact = validation_gradient(policy.model, groups, policy.objective)
    for i in live:
        own = validation_gradient(policy.model, [groups[i]], policy.objective)
        assert probes.dots[i] == pytest.approx(exact.dot(own.tensors), rel=0.02, abs=1e-4 * exact.norm * own.norm)


@pytest.mark.parametrize("basis", ["fitted", "random"])
def test_a_fit_says_what_the_sketches_see(policy: LocalPolicy, paid: list[Group], basis: str) -> None:
    """Measured on the weights and rollouts at hand; without rollouts, of the parameters alone."""
    spec = SketchSpec(basis=basis, rank=4, dim=64, modules=("mlp",))  # type: ignore[arg-type]
    found = policy.fit(spec, paid).coverage
    assert found == measure(GradientPass(policy.model, spec), paid)
    assert found is not None
    assert found.gradient is not None
    assert 0 < found.gradient < 0.9
    if basis == "random":
        bare = policy.fit(spec, []).coverage
        assert bare is not None
        assert (bare.gradient, bare.parameters) == (None, found.parameters)


def test_the_direction_is_freed_when_training_begins(policy: LocalPolicy) -> None:
    """It is as large as the weights, and Adam's moments come beside it."""
    groups = policy.roll_out(PROBLEMS, 8, seed=3)
    policy.fit(SketchSpec(basis="fitted", rank=4, dim=64), groups)
    policy.aim(groups)
    policy.probe(groups)
    direction = weakref.ref(next(iter(policy._aimed[1].probe.direction.tensors.values())))  # type: ignore[index]
    assert direction() is not None
    policy.forget_direction()
    gc.collect()
    assert direction() is None
    with pytest.raises(RequestError, match="call `aim` first"):
        policy.probe(groups)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, model: Any) -> None:
    """Copied in part, it would train a mixture."""
    learner = Learner(model, UpdateSettings())
    save_checkpoint(tmp_path / "c.pt", learner, {"step": 1})
    assert load_checkpoint(tmp_path / "c.pt", learner) == {"step": 1}
    model.model.layers[0].requires_grad_(False)
    with pytest.raises(RequestError, match="other parameters than this run"):
        load_checkpoint(tmp_path / "c.pt", Learner(model, UpdateSettings()))
    (tmp_path / "c.pt").write_bytes(b"not one")
    with pytest.raises(RequestError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "c.pt", learner)


def test_a_checkpoint_on_a_full_disk_is_one_line(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reports the disk as an error of its own archive; the checkpoint before stays."""
    learner = Learner(model, UpdateSettings())
    save_checkpoint(tmp_path / "c.pt", learner, {"step": 1})
    monkeypatch.setattr("gradstore.durable.open", lambda *_, **__: open("/dev/full", "wb"), raising=False)  # noqa: SIM115
    with pytest.raises(GradstoreError, match="the disk is full"):
        save_checkpoint(tmp_path / "c.pt", learner, {"step": 2})
    assert load_checkpoint(tmp_path / "c.pt", learner) == {"step": 1}


RUN = """
import sys
from pathlib import Path
from gradstore.engine.gradients.models import load_model, load_tokenizer
from gradstore.engine.sketches.spec import SketchSpec
from gradstore.demo import tasks
from gradstore.demo.run import MODEL
from gradstore.trainer.local.grpo import Learner
from gradstore.trainer.local.policy import LocalPolicy
from gradstore.trainer.local.settings import Sampling, UpdateSettings
from gradstore.trainer.local.training import Training
from gradstore.trainer.sampling.reward import Reward
from gradstore.trainer.round.driver import Rounds
from gradstore.trainer.round.settings import RoundSettings

folder = Path(sys.argv[1])
pool = tasks.pool(0, 60)
settings = RoundSettings(
    candidates=40, selected=8, train_batch=8, steps=2, rounds=3, rollouts=8, target_rollouts=8, selector="lcb",
    refresh=12, spec=SketchSpec(basis="fitted", rank=4, dim=64), fit_problems=20, window=20,
    rollout_rule="oppose_target",
    accept_coverage=0.8,  # a vocabulary this small leaves much to the embedding's lookup
)
model = load_model(MODEL, device="cpu")
policy = LocalPolicy(model, load_tokenizer(MODEL), Reward("demo", tasks.reward), Sampling(max_new_tokens=8))
rounds = Rounds(folder / "store", pool, {"benchmark": tasks.benchmark(0, 12)}, settings)
training = Training(
    policy, Learner(model, UpdateSettings(lr=1e-3)), rounds, pool, settings, folder / "run", rollouts=8, save_every=1,
    resume=True,
)
training.run(lambda step: print(step, flush=True))
print("done", flush=True)
"""


def _start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Killed with SIGKILL at several moments, a run ends with the weights and the picks of an undisturbed one."""
    whole = _start(tmp_path / "whole")
    output, _ = whole.communicate(timeout=200)
    assert whole.returncode == 0
    assert output.split() == ["1", "2", "3", "4", "5", "6", "done"]
    for step, delay in ((1, 0.0), (4, 0.15), (5, 0.05)):
        process = _start(tmp_path / "killed")
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == str(step):
                time.sleep(delay)
                break
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    last = _start(tmp_path / "killed")
    last.communicate(timeout=200)
    assert last.returncode == 0

    one, other = (
        torch.load(tmp_path / name / "run" / "checkpoint.pt", weights_only=True) for name in ("whole", "killed")
    )
    assert one["progress"] == other["progress"]
    assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])
    moments = one["learner"]["optimizer"]["state"], other["learner"]["optimizer"]["state"]
    assert all(torch.equal(moments[0][k]["exp_avg_sq"], moments[1][k]["exp_avg_sq"]) for k in moments[0])
    rows = [
        [json.loads(line) for line in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    plain = [[{k: v for k, v in row.items() if "seconds" not in k} for row in own] for own in rows]
    assert [row for row in plain[0] if row["kind"] == "step"] == [row for row in plain[1] if row["kind"] == "step"]
    for name in ("whole", "killed"):
        store = gradstore.open(tmp_path / name / "store")
        history = store.history("pool")
        steps, ids = history["step"].to_numpy(), np.array(history["id"].to_pylist())
        for number in range(3):
            seen = ids[steps == 2 * number + 1].tolist()
            assert sorted(seen) == sorted(store.rounds("pool")[number].picks), "the last pass over the picks is kept"
