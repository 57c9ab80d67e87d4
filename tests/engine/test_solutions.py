"""Gradients of reference solutions: against autograd, kept apart from rollouts, and used as targets."""

import numpy as np
import pytest
import torch

import gradstore
from gradstore import State
from gradstore.engine import Sketcher, SketchSpec, collect, objective, search, select, target
from gradstore.engine.gradients.directions import validation_gradient
from gradstore.engine.rollouts import Group, solution_groups, solutions_of
from gradstore.engine.sketches.bases import create_store
from gradstore.errors import RequestError

N = 61


def solution(name: str, seed: int, n: int) -> Group:
    random = np.random.default_rng(seed)
    return Group(name, random.integers(0, N, 5), [random.integers(0, N, n)], np.ones(1), solution=True)


def likelihood_gradient(model, group: Group) -> dict[str, torch.Tensor]:
    """Gradient of the mean token log-likelihood of the response, by autograd."""
    ids = torch.tensor(np.concatenate([group.prompt_ids, group.responses[0]]))[None]
    logits = model(ids).logits[0, len(group.prompt_ids) - 1 : -1].float()
    logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(group.responses[0])[:, None])
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(logprobs.mean(), list(parameters.values()), allow_unused=True)
    return {name: own for name, own in zip(parameters, found, strict=True) if own is not None}


RULES = {
    "gradalign": {},
    "grpo": {},
    "dr_grpo": {},
    "importance": {"importance": True},
    "kl": {"kl_beta": 0.04},
}


@pytest.mark.parametrize("rule", RULES)
def test_it_is_autograds_gradient_of_the_mean_log_likelihood(make_model, rule: str) -> None:
    """Whatever the store's objective for rollouts is: advantages, ratios and the KL term have no part in it."""
    model = make_model("qwen2")
    groups = [solution("a", 0, 3), solution("b", 1, 11)]
    settings = objective(rule if rule in ("gradalign", "grpo", "dr_grpo") else "gradalign", **RULES[rule])
    own = validation_gradient(model, groups, settings)
    wanted = [likelihood_gradient(model, group) for group in groups]
    assert own.tensors.keys() == wanted[0].keys()
    for name, values in own.tensors.items():
        torch.testing.assert_close(values, (wanted[0][name] + wanted[1][name]) / 2, atol=1e-6, rtol=1e-4)


def test_sketches_of_solutions_are_of_the_same_space(make_model) -> None:
    """A solution and an empty response, rewarded 1 and 0, have a quarter of its gradient under GradAlign's objective:
    so all that sketches do to rollouts, they do to solutions."""
    model, groups = make_model("qwen2"), [solution("a", 0, 3), solution("b", 1, 11)]
    contrasts = [
        Group(own.problem_id, own.prompt_ids, [own.responses[0], own.responses[0][:0]], np.array([1.0, 0.0]))
        for own in groups
    ]
    sketcher = Sketcher(model, SketchSpec(basis="random", rank=8))
    own, others = sketcher.sketch(groups), sketcher.sketch(contrasts)
    np.testing.assert_allclose(own.sketches, 4 * others.sketches, rtol=1e-4, atol=1e-6)
    assert own.states == [State.LIVE] * 2
    assert np.isnan(own.pass_rates).all()
    assert sketcher.sketch([groups[0], contrasts[1]]).sketches[0] == pytest.approx(own.sketches[0], rel=1e-4, abs=1e-6)


@pytest.fixture
def store(make_model, make_groups, tmp_path):
    """Rollouts of a pool and a benchmark, and solutions of the benchmark's problems, in one space."""
    model = make_model("qwen2")
    sketcher = Sketcher(model, SketchSpec(basis="random", rank=8))
    store = create_store(tmp_path / "store", sketcher, dtype="fp32")
    made = {"pool": make_groups(6), "bench": make_groups(3, seed=9)}
    made[solutions_of("bench")] = [solution(group.problem_id, n, 7) for n, group in enumerate(made["bench"])]
    for name, groups in made.items():
        store.add_problems(name, [{"id": group.problem_id, "prompt": "x"} for group in groups])
        collect(store, name, groups, sketcher=sketcher, step=0, accept_coverage=0)
    return store, sketcher, made


def test_targets_of_solutions_are_of_their_own_kind(store) -> None:
    """The name of the target says what it is; it ranks like any other, alone or fused with the rollouts' target."""
    store, sketcher, made = store
    own = target(store, "bench.solutions")
    policy = target(store, "bench")
    assert (own.kind, policy.kind) == ("solutions", "rollouts")
    assert own.describe()["kind"] == "solutions"
    assert "kind" not in policy.describe()
    expected = sketcher.sketch(made["bench.solutions"]).sketches.mean(0)
    np.testing.assert_allclose(own.vector, expected, rtol=1e-3, atol=1e-5)
    hits = search(store.view("pool"), own, 6)
    scores = dict(zip(hits.ids, hits.scores, strict=True))
    pool = sketcher.sketch(made["pool"])
    for name, sketch_D in zip(pool.ids, pool.sketches, strict=True):
        cosine = sketch_D @ expected / np.linalg.norm(sketch_D) / np.linalg.norm(expected)
        assert scores[name] == pytest.approx(cosine, abs=1e-3)
    assert len(select(store, "pool", [policy, own], 2)) == 2


def test_the_kinds_are_never_mixed(store) -> None:
    """A mean over rows of both would be a target of neither, without a word."""
    store, sketcher, made = store
    before = {name: store.commit(name) for name in store.collections}
    with pytest.raises(RequestError, match=r"has a solution, but the collection is for rollouts"):
        collect(store, "bench", made["bench.solutions"], sketcher=sketcher, step=1)
    with pytest.raises(RequestError, match=r"has rollouts, but the collection is for solutions"):
        collect(store, "bench.solutions", made["bench"], sketcher=sketcher, step=1)
    assert {name: store.commit(name) for name in store.collections} == before
    assert gradstore.open(store.path).verify().ok


def test_groups_of_solutions(tiny_tokenizer) -> None:
    """Prompt as for sampling; the solution ends as a response ends; a problem without one is named."""
    records = [
        {"id": "a", "prompt": "1+1=", "extra": {"solution": " 2 "}},
        {"id": "b", "prompt": "2+2=", "extra": {"verl": {"extra_info": {"solution": "4"}}}},
    ]
    groups = solution_groups(records, tiny_tokenizer)
    for group, prompt, text in zip(groups, ("1+1=", "2+2="), ("2", "4"), strict=True):
        assert group.solution
        assert group.has_signal
        assert group.prompt_ids.tolist() == tiny_tokenizer(prompt)["input_ids"]
        assert group.responses[0].tolist() == [*tiny_tokenizer(text)["input_ids"], tiny_tokenizer.eos_token_id]
    for extra, word in (({}, "missing"), ({"solution": " "}, "empty"), ({"solution": 4}, "no text")):
        with pytest.raises(RequestError, match=rf"problem 'c': field 'extra.solution' is {word}"):
            solution_groups([*records, {"id": "c", "prompt": "x", "extra": extra}], tiny_tokenizer)
    with pytest.raises(RequestError, match="one response, which has tokens"):
        Group("a", np.ones(1, int), [np.ones(1, int)] * 2, np.ones(2), solution=True)
