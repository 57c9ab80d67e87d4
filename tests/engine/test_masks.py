"""Tokens that the policy did not write (tools, users) are read by it and have no gradient of their own."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from gradstore.engine import (
    Objective,
    Probe,
    ProbeBatch,
    Sketcher,
    SketchSpec,
    exact_dots,
    fit_projection,
    layer_gradients,
    objective,
    validation_gradient,
)
from gradstore.engine.assessing.split_half import split
from gradstore.engine.gradients.directions import summed_gradient
from gradstore.engine.gradients.objectives import Aggregation
from gradstore.engine.probing import statistics
from gradstore.engine.rollouts import Group
from gradstore.engine.rollouts.group import joined
from gradstore.engine.sketches.from_training_pass import SketchesFromTrainingPass
from gradstore.errors import RequestError
from tests.engine.conftest import own_gradient
from tests.engine.test_sketcher import relative_error, slow_advantages

AGGREGATIONS: list[Aggregation] = ["seq-mean-token-mean", "seq-mean-token-sum", "token-mean"]
KINDS: dict[str, dict] = {
    "plain": {},
    "importance": {"importance": True},
    "clipped": {"importance": True, "clip_low": 0.2, "clip_high": 0.3},
    "kl": {"kl_beta": 0.1},
    "clipped-kl": {"importance": True, "clip_low": 0.2, "clip_high": 0.3, "kl_beta": 0.1, "advantage": "mean_std"},
}


def multi_turn(groups: list[Group], seed: int = 0, *, spoiled: bool = True) -> list[Group]:
    """The groups with random masks (the first response of each has no token of the policy), behaviour and reference
    log-probabilities; where the policy did not write, those are nan if `spoiled`."""
    random = np.random.default_rng(seed)
    found = []
    for group in groups:
        masks = [random.random(len(response)) < 0.6 for response in group.responses]
        masks[0][:] = False

        def recorded(masks: list[np.ndarray] = masks) -> list[np.ndarray]:
            values = [-random.exponential(3.0, len(mask)).astype(np.float32) for mask in masks]
            return [
                np.where(mask, v, np.float32("nan")) if spoiled else v for mask, v in zip(masks, values, strict=True)
            ]

        found.append(replace(group, logprobs=recorded(), reference_logprobs=recorded(), masks=masks))
    return found


def slow_objective(model: nn.Module, group: Group, settings: Objective) -> torch.Tensor:
    """One token at a time, straight from the definitions, over the tokens that the policy wrote."""
    advantages = slow_advantages(group.rewards, settings.advantage)
    masks = group.masks or [np.ones(len(response), bool) for response in group.responses]
    prompts = group.prompts or [group.prompt_ids] * len(group.responses)
    rollout_of = range(len(group.responses)) if group.rollout_of is None else group.rollout_of
    n, total = len(group.responses), torch.zeros(())
    for j, (prompt, response, mask) in enumerate(zip(prompts, group.responses, masks, strict=True)):
        logits = model(input_ids=torch.tensor([*prompt, *response])[None]).logits[0]
        logprobs = (logits / settings.temperature).log_softmax(-1)
        advantage = advantages[rollout_of[j]]
        for t in np.flatnonzero(mask):
            logprob = logprobs[len(prompt) + t - 1, response[t]]
            share = {
                "seq-mean-token-sum": 1 / n,
                "seq-mean-token-mean": 1 / n / int(mask.sum()),
                "token-mean": 1 / sum(int(m.sum()) for m in masks),
            }[settings.aggregation]
            term = advantage * logprob
            if settings.importance:
                ratio = (logprob - float(group.logprobs[j][t])).exp()
                low = 0 if settings.clip_low is None else 1 - settings.clip_low
                high = float("inf") if settings.clip_high is None else 1 + settings.clip_high
                term = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
            if settings.kl_beta:
                difference = float(group.reference_logprobs[j][t]) - logprob
                term = term - settings.kl_beta * (difference.exp() - difference - 1)
            total = total + share * term
    return total


def slow_gradients(model: nn.Module, group: Group, settings: Objective, names: list[str]) -> list[np.ndarray]:
    """Gradients of the layers of these names, [O, I] each, by autograd on the problem alone."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # untied: the output layer's own gradient
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    slow_objective(model, group, settings).backward()
    return [own_gradient(model, name).numpy() for name in names]


def slow_sketch(model: nn.Module, sketcher: Sketcher, group: Group, settings: Objective) -> np.ndarray:
    layers, fold = sketcher.projection.layers, sketcher.projection.fold
    parts = []
    for basis, gradient_OI in zip(
        layers, slow_gradients(model, group, settings, [basis.name for basis in layers]), strict=True
    ):
        left = np.eye(len(gradient_OI)) if basis.left_OR is None else basis.left_OR
        right = np.eye(gradient_OI.shape[1]) if basis.right_IR is None else basis.right_IR
        parts.append((left.T @ gradient_OI @ right).ravel())
    core = np.concatenate(parts)
    if fold is None:
        return core
    folded = np.zeros(sketcher.dim)
    np.add.at(folded, fold.to_M, fold.sign_M * core[fold.of_M])
    return folded


def check(model: nn.Module, groups: list[Group], settings: Objective, **spec: object) -> None:
    sketcher = Sketcher(model, SketchSpec(rank=6, objective=settings, **spec))
    batch = sketcher.sketch(groups)
    for group, found in zip(groups, batch.sketches, strict=True):
        assert relative_error(found, slow_sketch(model, sketcher, group, settings)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_sketches_of_masked_responses(make_model, make_groups, aggregation: Aggregation, kind: str) -> None:
    """Without it tokens that a tool wrote are trained on, or lengths are divided by that the policy did not choose."""
    settings = Objective(aggregation=aggregation, **KINDS[kind])
    check(make_model("qwen2"), multi_turn(make_groups(4)), settings)


@pytest.mark.parametrize("spec", [{"share_prompts": False}, {"token_budget": 24}, {"token_budget": 90}], ids=str)
def test_batches_do_not_matter(make_model, make_groups, spec: dict) -> None:
    """Masks follow their responses into any micro-batch, with and without shared prompts."""
    settings = Objective("mean_std", "token-mean", **KINDS["clipped"], kl_beta=0.1)
    check(make_model("llama"), multi_turn(make_groups(5)), settings, **spec)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2-lora"])
def test_other_models(make_model, make_groups, architecture: str) -> None:
    check(make_model(architecture), multi_turn(make_groups(3)), Objective("rloo", **KINDS["importance"]))


@pytest.mark.parametrize("basis", ["dense", "fitted"])
def test_other_bases(make_model, make_groups, basis: str) -> None:
    model, groups, settings = make_model("qwen2-lora"), multi_turn(make_groups(4)), objective("gradalign")
    spec = SketchSpec(rank=4, basis=basis, dim=100, objective=settings)
    projection = fit_projection(model, multi_turn(make_groups(8, seed=1)), spec) if basis == "fitted" else None
    sketcher = Sketcher(model, spec, projection)
    for group, found in zip(groups, sketcher.sketch(groups).sketches, strict=True):
        assert relative_error(found, slow_sketch(model, sketcher, group, settings)) < 1e-5


def test_sequences_run_one_by_one(make_model, make_groups) -> None:
    """Where padding is not exact, each sequence runs alone, cut behind the policy's last token."""
    model, settings = make_model("qwen2"), Objective(aggregation="token-mean", **KINDS["clipped-kl"])
    groups = multi_turn(make_groups(3))
    sketcher = Sketcher(model, SketchSpec(rank=6, objective=settings, share_prompts=False))
    sketcher.policy._checked.pads = False
    for group, found in zip(groups, sketcher.sketch(groups).sketches, strict=True):
        assert relative_error(found, slow_sketch(model, sketcher, group, settings)) < 1e-5


@pytest.mark.parametrize("norms", [False, True])
def test_exact_dots(make_model, make_groups, norms: bool) -> None:
    model, settings = make_model("qwen2"), Objective("mean_std", "token-mean", **KINDS["clipped"], kl_beta=0.1)
    groups, bench = multi_turn(make_groups(3)), multi_turn(make_groups(2, seed=5))
    spec = SketchSpec(objective=settings)
    target = layer_gradients(model, bench, spec)
    slow = [slow_gradients(model, group, settings, target.names) for group in [*groups, *bench]]
    for found, *own in zip(target.matrices, *slow[3:], strict=True):
        assert relative_error(found.numpy(), sum(own) / 2) < 1e-5
    batch = exact_dots(model, groups, target, spec, norms=norms)
    expected = [
        sum(float((one * v.numpy()).sum(dtype=np.float64)) for one, v in zip(own, target.matrices, strict=True))
        for own in slow[:3]
    ]
    lengths = [np.sqrt(sum(float((one**2).sum(dtype=np.float64)) for one in own)) for own in slow[:3]]
    assert np.abs(batch.dots[:, 0] - expected).max() < 1e-5 * target.norm * max(lengths)
    if norms:
        assert batch.norms == pytest.approx(lengths, rel=1e-5)


@pytest.mark.parametrize("kind", ["plain", "importance", "clipped"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_probes(make_model, make_groups, aggregation: Aggregation, kind: str) -> None:
    """Each rollout's derivative is that of the policy's own tokens, from both kinds of differences; log-probabilities
    given for other tokens are not looked at. In float32 rounding leaves about a thousandth."""
    settings = Objective(aggregation=aggregation, **KINDS[kind])
    groups, bench = multi_turn(make_groups(4)), multi_turn(make_groups(3, seed=5))
    check_probes(make_model("gpt2").double(), groups, bench, settings, within=1e-5, one_sided_within=1e-5)
    batch = check_probes(make_model("qwen2"), groups, bench, settings)
    for group, lengths, derivatives in zip(multi_turn(make_groups(4)), batch.lengths, batch.derivatives, strict=True):
        assert lengths.tolist() == [int(mask.sum()) for mask in group.masks or ()]
        assert derivatives[0] == 0


def check_probes(
    model: nn.Module,
    groups: list[Group],
    bench: list[Group],
    settings: Objective,
    within: float = 2e-3,
    one_sided_within: float = 2e-2,
) -> ProbeBatch:
    groups, bench = near(model, groups), near(model, bench)
    direction = validation_gradient(model, bench, settings)
    probe = Probe(model, direction, settings)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = []
    for group in groups:
        slow = torch.autograd.grad(slow_objective(model, group, settings), list(trained.values()), allow_unused=True)
        expected.append(
            sum(
                float((g.double() * direction.tensors[n].double()).sum())
                for n, g in zip(trained, slow, strict=True)
                if g is not None
            )
        )
    central = probe.probe(groups)
    known = [
        [np.where(mask, tokens, np.float32("nan")) for mask, tokens in zip(group.masks or (), own, strict=True)]
        for group, own in zip(groups, probe.logprobs(groups), strict=True)
    ]
    one_sided = probe.probe(groups, known)
    assert relative_error(central.dots, np.array(expected)) < within
    assert relative_error(one_sided.dots, np.array(expected)) < one_sided_within
    assert central.calibration is not None
    assert central.calibration.relative_error < within
    for i, group in enumerate(groups):
        dot, error = statistics.dot_and_error(group.rewards, central.derivatives[i], central.lengths[i], settings)
        advantages = slow_advantages(group.rewards, settings.advantage)
        assert dot == pytest.approx(float(np.mean(advantages * central.derivatives[i])), rel=1e-9)
        assert central.standard_errors[i] == error
    return central


def near(model: nn.Module, groups: list[Group]) -> list[Group]:
    """The groups with behaviour log-probabilities near the model's; still nan where the policy did not write."""
    random, found = np.random.default_rng(0), []
    for group in groups:
        logprobs = []
        for j, (response, mask) in enumerate(zip(group.responses, group.masks or (), strict=True)):
            prompt = group.prompt_of(j)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([*prompt, *response])[None]).logits[0]
            own = logits.log_softmax(-1)[len(prompt) - 1 : -1][np.arange(len(response)), response].numpy()
            noisy = own + 0.3 * random.normal(size=len(own))
            logprobs.append(np.where(mask, noisy, np.nan).astype(np.float32))
        found.append(replace(group, logprobs=logprobs))
    return found


def test_effective_sample_size(make_model, make_groups) -> None:
    """Only the policy's tokens count: ratios of a tool's tokens would make every rollout look stale."""
    model, groups = make_model("qwen2"), multi_turn(make_groups(4))
    groups = near(model, groups)
    batch = Sketcher(model, SketchSpec(rank=4, objective=Objective(importance=True))).sketch(groups)
    for group, found in zip(groups, batch.ess, strict=True):
        advantages, ratios = slow_advantages(group.rewards, "mean"), []
        for j, (response, mask) in enumerate(zip(group.responses, group.masks, strict=True)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([*group.prompt_ids, *response])[None]).logits[0].log_softmax(-1)
            for t in np.flatnonzero(mask) if advantages[j] else ():
                logprob = float(logits[len(group.prompt_ids) + t - 1, response[t]])
                ratios.append(np.exp(logprob - group.logprobs[j][t]))
        rho = np.array(ratios)
        assert found == pytest.approx(4 * rho.sum() ** 2 / (len(rho) * (rho**2).sum()), rel=1e-4)


def all_written(groups: list[Group]) -> list[Group]:
    return [replace(group, masks=[np.ones(len(response), bool) for response in group.responses]) for group in groups]


@pytest.mark.parametrize("kind", KINDS)
def test_full_masks_change_no_bit(make_model, make_groups, kind: str) -> None:
    model = make_model("qwen2")
    groups = [replace(group, masks=None) for group in multi_turn(make_groups(4), spoiled=False)]
    sketcher = Sketcher(model, SketchSpec(rank=6, objective=Objective(**KINDS[kind])))
    plain, masked = sketcher.sketch(groups), sketcher.sketch(all_written(groups))
    assert np.array_equal(plain.sketches, masked.sketches)
    assert plain.n_tokens == masked.n_tokens


def test_what_was_recorded_at_other_tokens_changes_no_bit(make_model, make_groups) -> None:
    model, settings = make_model("qwen2"), Objective(**KINDS["clipped-kl"])
    sketcher = Sketcher(model, SketchSpec(rank=6, objective=settings))
    nan = multi_turn(make_groups(4))

    def with_value(value: float) -> list[Group]:
        fill = [np.float32(value)]
        return [
            replace(
                group,
                logprobs=[np.where(np.isnan(tokens), *fill, tokens) for tokens in group.logprobs or ()],
                reference_logprobs=[
                    np.where(np.isnan(tokens), *fill, tokens) for tokens in group.reference_logprobs or ()
                ],
            )
            for group in nan
        ]

    expected = sketcher.sketch(nan)
    assert np.isfinite(expected.sketches).all()
    for value in (0.0, -80.0, 80.0, float("-inf"), float("inf")):
        found = sketcher.sketch(with_value(value))
        assert np.array_equal(found.sketches, expected.sketches)
        assert np.array_equal(found.ess, expected.ess)


def test_content_matters_only_where_the_policy_reads_it(make_model, make_groups) -> None:
    """What stands behind the policy's last token changes nothing; what stands before it changes what the policy saw."""
    model = make_model("llama")
    (group,) = make_groups(1)
    responses = [np.concatenate([response, response[::-1], response]) for response in group.responses]
    masks = [np.arange(len(response)) % 4 == 1 for response in responses]
    ends = [int(np.flatnonzero(mask)[-1]) if mask.any() else -1 for mask in masks]
    behind = [
        np.where(np.arange(len(response)) > end, (response + 1) % 61, response)
        for response, end in zip(responses, ends, strict=True)
    ]
    between = [np.where(mask, response, (response + 1) % 61) for mask, response in zip(masks, responses, strict=True)]
    sketcher = Sketcher(model, SketchSpec(rank=6))
    base, same, other = sketcher.sketch(
        [replace(group, responses=kind, masks=masks) for kind in (responses, behind, between)]
    ).sketches
    assert relative_error(same, base) < 1e-6
    assert relative_error(other, base) > 1e-2
    seen = replace(group, responses=between, masks=masks)
    assert relative_error(other, slow_sketch(model, sketcher, seen, objective("gradalign"))) < 1e-5


def test_repeated_responses_merge_only_with_equal_masks(make_model, make_groups) -> None:
    """Merged wrongly, one rollout's mask would serve for both."""
    model, (group,) = make_model("qwen2"), make_groups(1, n_rollouts=3)
    response = np.arange(8)
    some, other = np.arange(8) < 5, np.arange(8) > 2
    three = replace(group, responses=[response] * 3, rewards=np.array([1.0, 0.25, 0.0]))
    check(model, [replace(three, masks=[some, other, some])], objective("gradalign"))
    sketcher = Sketcher(model, SketchSpec(rank=4))
    n = len(group.prompt_ids) + 8
    tokens = [sketcher.sketch([replace(three, masks=masks)]).n_tokens for masks in ([some, other, some], [some] * 3)]
    assert tokens == [2 * n, 0]  # weights of three equal rollouts cancel
    recorded = [np.where(some, np.float32(-2), np.float32(value)) for value in (0, np.nan, -7)]
    ratios = Sketcher(model, SketchSpec(rank=4, objective=Objective(importance=True)))
    assert ratios.sketch([replace(three, masks=[some] * 3, logprobs=recorded)]).n_tokens == 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_sketches_from_the_training_pass(make_model, make_groups, aggregation: Aggregation) -> None:
    """The factor between two objectives comes from the policy's tokens, not from the lengths of the responses."""
    model, groups = make_model("qwen2"), multi_turn(make_groups(4))
    for i, group in enumerate(groups[:2]):  # two tokens of the policy in each response: one factor for any aggregation
        responses = [np.append(response, [3, 5, 7]) for response in group.responses]
        masks = [np.isin(np.arange(len(response)), [0, 2]) for response in responses]
        groups[i] = Group(group.problem_id, group.prompt_ids, responses, group.rewards, masks=masks)
    rule, trained = Objective("mean", "seq-mean-token-mean"), Objective("mean_std", aggregation)
    sketcher = Sketcher(model, SketchSpec(rank=6, objective=rule))
    runner = Sketcher(model, SketchSpec(rank=6, objective=trained)).gradients
    along = SketchesFromTrainingPass(sketcher, groups, trained)
    summed_gradient(runner, groups, along.watch)
    batch = along.batch()
    for name, found in zip(batch.ids, batch.sketches, strict=True):
        (group,) = (group for group in groups if group.problem_id == name)
        assert relative_error(found, slow_sketch(model, sketcher, group, rule)) < 1e-5
    assert along.n_separate == (0 if aggregation == "seq-mean-token-mean" else 2)


def test_halves_and_joined_groups_keep_their_masks(make_model, make_groups) -> None:
    model, groups = make_model("qwen2"), multi_turn(make_groups(3))
    for half in split(groups):
        live = [group for group in half if group.has_signal and group.n_written.any()]
        check(model, live, objective("gradalign"))
    (other,) = multi_turn(make_groups(1, seed=9), seed=9)
    both = joined([groups[0], replace(other, problem_id=groups[0].problem_id, prompt_ids=groups[0].prompt_ids)])
    check(model, [both], objective("grpo"))


def test_a_mask_that_is_not_of_booleans_is_refused(make_groups) -> None:
    """Numbers would be taken for positions."""
    (group,) = make_groups(1)
    with pytest.raises(
        RequestError, match=r"problem 'problem-0': the mask of response 0 has dtype int64, expected bool"
    ):
        replace(group, masks=[np.ones(len(response), np.int64) for response in group.responses])
    with pytest.raises(RequestError, match="mask values"):
        replace(group, masks=[np.ones(40, bool)] * 4)


def test_a_group_in_which_the_policy_wrote_nothing(make_model, make_groups) -> None:
    (group,) = multi_turn(make_groups(1))
    silent = replace(group, masks=[np.zeros(len(response), bool) for response in group.responses])
    model = make_model("qwen2")
    assert [state.name for state in Sketcher(model, SketchSpec(rank=4)).sketch([silent]).states] == ["NO_SIGNAL"]


def several_outputs(groups: list[Group], seed: int = 0) -> list[Group]:
    """Masked groups whose rollouts have one to three outputs each, some after a prompt of their own."""
    random, found = np.random.default_rng(seed), []
    for group in groups:
        counts = random.integers(1, 4, group.n_rollouts)
        rollout_of = np.repeat(np.arange(group.n_rollouts), counts)
        responses = [random.integers(0, 61, random.integers(2, 9)) for _ in rollout_of]
        own = [random.integers(0, 61, random.integers(2, 12)) for _ in range(2)]
        prompts = [[group.prompt_ids, *own][random.integers(3)] for _ in rollout_of]
        whole = Group(
            group.problem_id, group.prompt_ids, responses, group.rewards, prompts=prompts, rollout_of=rollout_of
        )
        found += multi_turn([whole], seed)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_sketches_of_several_outputs(make_model, make_groups, aggregation: Aggregation, kind: str) -> None:
    """Each output is a sequence with its rollout's advantage; the baseline counts each rollout once."""
    settings = Objective(aggregation=aggregation, **KINDS[kind])
    groups = several_outputs(make_groups(3))
    check(make_model("qwen2"), groups, settings)
    check(make_model("qwen2"), groups, settings, token_budget=60)


def test_prompts_are_shared_by_problem_and_prompt(make_model, make_groups) -> None:
    """Continuations must follow their own prompt's cache, not that of the problem's first output."""
    model, groups = make_model("llama"), several_outputs(make_groups(3, n_rollouts=8))
    settings = objective("gradalign")
    alone = Sketcher(model, SketchSpec(rank=6, objective=settings, share_prompts=False)).sketch(groups)
    shared = Sketcher(model, SketchSpec(rank=6, objective=settings))
    keys = []
    run = shared.policy._run_prompts
    shared.policy._run_prompts = lambda batch, prompts: keys.append(prompts.problem_Q.tolist()) or run(batch, prompts)
    found = shared.sketch(groups)
    assert keys
    assert len(keys[0]) > len(set(keys[0]))  # several prompts of one problem in a micro-batch
    assert relative_error(found.sketches, alone.sketches) < 1e-5
    check(model, groups, settings)
    assert found.n_rollouts.tolist() == [8] * 3
    assert found.pass_rates.tolist() == [np.float32(group.rewards.mean()) for group in groups]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_probes_of_several_outputs(make_model, make_groups, aggregation: Aggregation) -> None:
    """A rollout's derivative is the sum over its outputs, scaled so that the dot is a mean over rollouts."""
    model, groups = make_model("qwen2"), several_outputs(make_groups(4))
    settings = Objective("rloo", aggregation, importance=True, clip_low=0.2, clip_high=0.3)
    batch = check_probes(model, groups, several_outputs(make_groups(3, seed=5), 5), settings)
    for group, lengths in zip(groups, batch.lengths, strict=True):
        assert lengths.tolist() == [group.n_written[group.rollouts == j].sum() for j in range(group.n_rollouts)]


def test_exact_dots_halves_and_joins_of_several_outputs(make_model, make_groups) -> None:
    model, groups = make_model("qwen2"), several_outputs(make_groups(2))
    target = layer_gradients(model, groups)
    batch = exact_dots(model, groups, target)
    for group, found in zip(groups, batch.dots[:, 0], strict=True):
        slow = slow_gradients(model, group, objective("gradalign"), target.names)
        expected = sum(float((g * v.numpy()).sum(dtype=np.float64)) for g, v in zip(slow, target.matrices, strict=True))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5 * target.norm**2)
    whole = groups[0]
    for first, half in enumerate(split([whole])):
        assert half[0].rewards.tolist() == whole.rewards[first::2].tolist()
        places = [place for place, j in enumerate(whole.rollouts) if j % 2 == first]
        assert [response.tolist() for response in half[0].responses] == [whole.responses[p].tolist() for p in places]
        assert half[0].rollouts.tolist() == [whole.rollouts[place] // 2 for place in places]
        check(model, [group for group in half if group.has_signal], objective("gradalign"))
    (plain,) = make_groups(1)
    check(model, [joined([whole, replace(plain, problem_id=whole.problem_id)])], objective("grpo"))


def test_one_output_each_changes_no_bit(make_model, make_groups) -> None:
    model, groups = make_model("gpt2"), make_groups(4)
    stated = [replace(group, prompts=[group.prompt_ids] * 4, rollout_of=np.arange(4), masks=None) for group in groups]
    sketcher = Sketcher(model, SketchSpec(rank=6))
    assert np.array_equal(sketcher.sketch(groups).sketches, sketcher.sketch(stated).sketches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_of": np.array([0, 0, 1])}, r"shape \(3,\) and dtype int64, expected integers for 4 responses"),
        ({"rollout_of": np.array([0.0, 1, 2, 3])}, "dtype float64, expected integers"),
        ({"rollout_of": np.array([0, 1, 1, 3])}, r"names rollouts \[0, 1, 3\], expected each of the 4"),
        ({"prompts": [np.arange(3)]}, "4 responses but 1 prompts"),
        ({"prompts": [np.arange(n) for n in range(4)]}, "the prompt of a response has no tokens"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(make_groups, changes: dict, message: str) -> None:
    (group,) = make_groups(1)
    with pytest.raises(RequestError, match=message):
        replace(group, **changes)
