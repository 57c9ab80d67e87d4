"""Off-policy rules: their gradients are those that autograd gives for the published surrogates, written out here.

Dimension letters: P problems, G rollouts of a group, B sequences, N response tokens.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradstore.engine import Probe, Sketcher, SketchSpec, validation_gradient
from gradstore.engine.gradients.exact import exact_dots, layer_gradients
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.logprobs import response_logprobs
from gradstore.engine.gradients.microbatch import rollouts_of
from gradstore.engine.gradients.objectives import (
    PRESETS,
    Objective,
    advantages,
    importance_weights,
    objective,
)
from gradstore.engine.rollouts import Group
from gradstore.errors import RequestError

RULES = {
    "unbounded": Objective(importance=True),
    "ppo": Objective(importance=True, clip_low=0.2, clip_high=0.28),
    "dual-clip": Objective(importance=True, clip_low=0.2, clip_high=0.28, ratio_cap=1.5),
    "cispo": Objective(importance=True, off_policy="cispo", clip_high=0.3),
    "cispo-both": Objective(importance=True, off_policy="cispo", clip_low=0.1, clip_high=0.3),
    "truncate": Objective(importance=True, off_policy="truncate", ratio_cap=1.3),
    "mask": Objective(importance=True, off_policy="mask", ratio_cap=1.3),
}
RATIOS = ("token", "sequence", "product")
ALL = {f"{name}-{ratio}": replace(rule, ratio=ratio) for name, rule in RULES.items() for ratio in RATIOS}


def published(logprobs_N: Tensor, behaviour_N: Tensor, written_N: Tensor, A: float, rule: Objective) -> Tensor:
    """The surrogate of each token of one response, [N]; it is maximised. One token at a time, as the papers say it."""
    own = [t for t in range(len(logprobs_N)) if written_N[t]]
    logs = [logprobs_N[t] - behaviour_N[t] for t in own]
    terms = [torch.zeros((), dtype=logprobs_N.dtype)] * len(logprobs_N)
    for t, log_ratio in zip(own, logs, strict=True):
        if rule.ratio == "token":
            ratio = log_ratio.exp()
        else:  # s_t = sg[s] pi / sg[pi] (GSPO-token, arXiv 2507.18071, equation 14)
            total = torch.stack(logs).sum()
            whole = (total / len(own) if rule.ratio == "sequence" else total).exp().detach()
            ratio = whole * (logprobs_N[t] - logprobs_N[t].detach()).exp()
        low = 0.0 if rule.clip_low is None else 1 - rule.clip_low
        high = float("inf") if rule.clip_high is None else 1 + rule.clip_high
        if rule.off_policy == "ppo":  # arXiv 1707.06347, equation 7; dual clip: 1912.09729, equation 8
            terms[t] = torch.min(ratio * A, ratio.clamp(low, high) * A)
            if rule.ratio_cap is not None and A < 0:
                terms[t] = torch.max(terms[t], torch.tensor(rule.ratio_cap * A, dtype=terms[t].dtype))
        elif rule.off_policy == "cispo":  # arXiv 2506.13585, equation 4
            terms[t] = ratio.clamp(low, high).detach() * A * logprobs_N[t]
        elif rule.off_policy == "truncate":  # truncated importance sampling: a constant weight on log pi
            terms[t] = ratio.clamp(max=rule.ratio_cap).detach() * A * logprobs_N[t]
        elif 1 / rule.ratio_cap <= ratio <= rule.ratio_cap:
            terms[t] = ratio * A
    return torch.stack(terms)


@pytest.mark.parametrize("name", ALL)
def test_weights_are_the_derivatives_of_the_published_surrogate(name: str) -> None:
    """Both signs, ratios on both sides of every bound, responses of several lengths with holes of tools in them."""
    rule, generator = ALL[name], torch.Generator().manual_seed(1)
    B, N = 64, 9
    behaviour_BN = -torch.rand(B, N, generator=generator, dtype=torch.float64)
    spread = 0.15 if rule.ratio == "product" else 0.4
    shift_B1 = 0.3 * torch.randn(B, 1, generator=generator, dtype=torch.float64) / (3 if rule.ratio == "product" else 1)
    logprobs_BN = behaviour_BN + shift_B1 + spread * torch.randn(B, N, generator=generator, dtype=torch.float64)
    written_BN = torch.arange(N) < torch.randint(1, N + 1, (B, 1), generator=generator)
    written_BN[::3, 1] = False
    A_B = torch.randn(B, generator=generator, dtype=torch.float64)
    found_BN = importance_weights(logprobs_BN, behaviour_BN, A_B[:, None] * written_BN, written_BN, rule)
    leaf_BN = logprobs_BN.clone().requires_grad_(True)
    rows = zip(leaf_BN, behaviour_BN, written_BN, A_B.tolist(), strict=True)
    torch.stack([published(*row, rule).sum() for row in rows]).sum().backward()
    assert leaf_BN.grad is not None
    torch.testing.assert_close(found_BN, leaf_BN.grad, rtol=1e-12, atol=1e-12)
    flat_BN = (found_BN == 0) & written_BN
    for sign in (1, -1):
        reached = bool(flat_BN[A_B * sign > 0].any())
        assert reached == (rule.sign_dependent or rule.off_policy == "mask"), "the data must reach the bounds"


@pytest.mark.parametrize("rule", [*ALL.values(), *PRESETS.values()])
def test_at_ratio_one_every_rule_is_the_on_policy_gradient_bit_for_bit(rule: Objective) -> None:
    """A rule that is not neutral on-policy would make fresh rows differ from those of another rule."""
    generator = torch.Generator().manual_seed(0)
    logprobs_BN = -torch.rand(16, 8, generator=generator)
    weights_BN = torch.randn(16, 8, generator=generator)
    written_BN = torch.rand(16, 8, generator=generator) < 0.7
    weights_BN = weights_BN * written_BN
    assert torch.equal(importance_weights(logprobs_BN, logprobs_BN, weights_BN, written_BN, rule), weights_BN)


def test_ratios_that_overflow_meet_no_zero() -> None:
    """An infinite ratio is bounded where the rule bounds it, and is no nan where the token has no weight."""
    logprobs_BN, behaviour_BN = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-500.0, -500.0]])
    written_BN = torch.ones(1, 2, dtype=torch.bool)
    weights_BN = torch.tensor([[-1.0, 0.0]])
    for rule, wanted in (
        (RULES["truncate"], [-1.3, 0.0]),
        (RULES["cispo"], [-1.3, 0.0]),
        (RULES["mask"], [0.0, 0.0]),
        (RULES["dual-clip"], [0.0, 0.0]),
        (RULES["ppo"], [-np.inf, 0.0]),
    ):
        found_BN = importance_weights(logprobs_BN, behaviour_BN, weights_BN, written_BN, rule)
        torch.testing.assert_close(found_BN, torch.tensor([wanted]))


def stale_groups(model: nn.Module, groups: list[Group], seed: int = 0, noise: float = 0.25) -> list[Group]:
    """The groups as if another policy had sampled them: the model's own log-probabilities, changed at random."""
    random = np.random.default_rng(seed)

    def moved(own_N: np.ndarray) -> np.ndarray:
        return (own_N - random.normal(0, noise) - random.normal(0, noise, len(own_N))).astype(np.float32)

    own = response_logprobs(GradientPass(model, SketchSpec()), groups)
    return [replace(group, logprobs=[moved(x) for x in rows]) for group, rows in zip(groups, own, strict=True)]


def slow_gradient(model: nn.Module, group: Group, rule: Objective) -> dict[str, Tensor]:
    """The gradient of the published surrogate over every parameter, one rollout at a time."""
    assert group.logprobs is not None
    total, lengths = torch.zeros(()), [len(response) for response in group.responses]
    for j, (response, A) in enumerate(zip(group.responses, advantages(group.rewards, rule.advantage), strict=True)):
        ids = torch.tensor([*group.prompt_ids, *response])[None]
        log_TV = model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
        logprobs_N = log_TV.gather(1, torch.tensor(response)[:, None])[:, 0]
        written_N = torch.ones(len(response), dtype=torch.bool)
        terms_N = published(logprobs_N, torch.from_numpy(group.logprobs[j]), written_N, float(A), rule)
        share = 1 / sum(lengths) if rule.aggregation == "token-mean" else 1 / len(lengths) / lengths[j]
        total = total + share * terms_N.sum()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained.items(), found, strict=True)}


MODEL_RULES = {
    **{name: ALL[name] for name in ("dual-clip-token", "truncate-sequence", "mask-token", "mask-sequence")},
    **{name: ALL[name] for name in ("cispo-both-token", "ppo-sequence", "truncate-product")},
    "dapo": PRESETS["dapo"],
    "cispo": replace(PRESETS["cispo"], clip_high=0.3),
    "gspo": PRESETS["gspo"],
}


@pytest.mark.parametrize("name", MODEL_RULES)
def test_sketches_exact_dots_and_probes_are_of_the_published_surrogate(
    make_model: Callable[[str], nn.Module], make_groups: Callable[..., list[Group]], name: str
) -> None:
    """All three measure one gradient; a rule known to two of them would rank differently in the third."""
    rule, model = MODEL_RULES[name], make_model("llama")  # untied: a probe moves every parameter once
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    groups = stale_groups(model, make_groups(4))
    direction = validation_gradient(model, make_groups(3, seed=7))
    slow = [slow_gradient(model, group, rule) for group in groups]
    dots_P = np.array([sum(float((g * direction.tensors[n]).sum()) for n, g in own.items()) for own in slow])
    norms_P = [sum(float(g.square().sum()) for g in own.values()) ** 0.5 for own in slow]
    assert max(norms_P) > 0
    scale = max(norms_P) * direction.norm

    probed = Probe(model, direction, rule).probe(groups)
    assert np.abs(probed.dots - dots_P).max() < 2e-3 * scale

    spec = SketchSpec(rank=64, objective=rule)  # wider than the layers: nothing is projected
    sketcher, wanted = Sketcher(model, spec), make_groups(3, seed=7)
    target = layer_gradients(model, wanted)
    places = [place for place, name in enumerate(target.names) if f"{name}.weight" in slow[0]]
    linear = [place for place in places if slow[0][f"{target.names[place]}.weight"].ndim == 2]
    expected_PL = [
        [float((own[f"{target.names[k]}.weight"] * target.matrices[k]).sum()) for k in linear] for own in slow
    ]
    exact = exact_dots(model, groups, target, replace(spec, token_budget=30), norms=True)
    assert len(linear) == 15
    assert np.abs(exact.terms[:, 0, linear] - expected_PL).max() < 1e-5 * scale
    batch = sketcher.sketch(groups)
    target_D = Sketcher(model, SketchSpec(rank=64)).sketch(wanted).sketches.mean(0)
    assert np.abs(batch.sketches @ target_D - exact.dots[:, 0]).max() < 1e-5 * scale
    for budget, share in ((1, True), (60, False), (1000, True)):  # batch, order, sharing
        other = Sketcher(model, replace(spec, token_budget=budget, share_prompts=share)).sketch(groups[::-1])
        assert np.abs(other.sketches[::-1] - batch.sketches).max() < 1e-5 * np.abs(batch.sketches).max()
        assert batch.ess is not None
        assert other.ess is not None
        assert other.ess[::-1] == pytest.approx(batch.ess, rel=1e-4)


@pytest.mark.parametrize("name", ["unbounded-token", "ppo-token", "mask-sequence", "truncate-product", "ppo-sequence"])
def test_effective_sample_size_counts_each_ratio_once(
    make_model: Callable[[str], nn.Module], make_groups: Callable[..., list[Group]], name: str
) -> None:
    """Kish's size by hand: over tokens, or over responses if each has one ratio, whatever its length."""
    rule, model = ALL[name], make_model("qwen2")
    groups = stale_groups(model, make_groups(5, n_rollouts=6), noise=0.2)
    own = response_logprobs(GradientPass(model, SketchSpec()), groups)
    ess = Sketcher(model, SketchSpec(rank=6, objective=rule)).sketch(groups).ess
    assert ess is not None
    for found, group, rows in zip(ess, groups, own, strict=True):
        ratios: list[float] = []
        for A, now_N, then_N in zip(advantages(group.rewards, "mean"), rows, group.logprobs or [], strict=True):
            logs_N = now_N.astype(np.float64) - then_N
            whole = logs_N.mean() if rule.ratio == "sequence" else logs_N.sum()
            for ratio in np.exp(logs_N if rule.ratio == "token" else [whole]):
                flat = rule.off_policy == "ppo" and rule.clip_high is not None
                flat = flat and (ratio > 1.28 if A > 0 else ratio < 0.8)
                flat |= rule.off_policy == "mask" and not 1 / 1.3 <= ratio <= 1.3
                ratios.append(0.0 if flat else min(ratio, 1.3) if rule.off_policy == "truncate" else ratio)
        size = sum(ratios) ** 2 / sum(r * r for r in ratios) if any(ratios) else 0.0
        assert found == pytest.approx(6 * size / len(ratios), rel=1e-4)


def test_equal_responses_are_summed_only_where_no_sign_decides() -> None:
    """Equal responses of opposite signs cancel under every rule but PPO's with a bound, which may drop one of them."""
    response, logprobs = np.array([3, 4]), np.array([-1.0, -2.0], np.float32)
    group = Group("p", np.array([1]), [response, response], np.array([0.0, 1.0]), [logprobs, logprobs])
    for rule in ALL.values():
        assert len(rollouts_of([group], rule)) == (2 if rule.sign_dependent else 0)


def test_settings_without_meaning_are_refused() -> None:
    """A bound that no rule reads would be taken for one that holds."""
    for settings, message in (
        ({"clip_low": 0.2}, "clip_low needs importance=True"),
        ({"ratio": "sequence", "off_policy": "cispo"}, "ratio and off_policy need importance=True"),
        ({"importance": True, "off_policy": "truncate"}, "truncate needs ratio_cap"),
        ({"importance": True, "off_policy": "mask", "clip_high": 0.2}, "clip_high is a bound of ppo and cispo"),
        ({"importance": True, "off_policy": "truncate", "ratio_cap": 2, "clip_low": 0.2}, "clip_low is a bound"),
        ({"importance": True, "off_policy": "cispo"}, "cispo needs clip_high"),
        ({"importance": True, "off_policy": "cispo", "clip_high": 1, "ratio_cap": 3}, "ratio_cap is no bound of cispo"),
        ({"importance": True, "ratio_cap": 1.0}, "ratio_cap is 1.0, expected above 1"),
        ({"importance": True, "clip_low": -0.1}, "clip_low is -0.1, expected at least 0"),
        ({"importance": True, "ratio": "word"}, "ratio"),
        ({"importance": True, "off_policy": "sapo"}, "off_policy"),
    ):
        with pytest.raises(RequestError, match=message):
            Objective(**settings)


def test_fingerprints_of_older_stores_stay() -> None:
    """A field at its default in a fingerprint would refuse the rows of every store that is there."""
    names = ["advantage", "aggregation", "importance", "clip_low", "clip_high", "temperature"]
    assert list(objective("gradalign").as_dict()) == names
    assert list(objective("dapo").as_dict()) == names
    for rule in (*ALL.values(), *PRESETS.values()):
        assert Objective(**rule.as_dict()) == rule
    assert len({str(rule.as_dict()) for rule in ALL.values()}) == len(ALL)
