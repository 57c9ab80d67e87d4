"""When do stale rollouts invert a ranking, and which off-policy rule saves it?

    python -m benchmarks.off_policy [--quick] [--seeds 3] [--ages 2,8,32] [--lr 5e-5]

The demo's model is trained with GRPO on clean problems of the target family (benchmarks/drift.py), for as many steps as
the oldest rollouts are to be old. The pool is rolled out before steps n - k: those rollouts are k steps old when step n
is reached. There, with the current weights, every problem's gradient is computed from its old rollouts under each rule,
and its exact cosine to the benchmark's gradient (fresh rollouts). The ranking is compared with the one from fresh
rollouts of the current policy, four times as many as a ranking has. The ceiling is what another fresh ranking reaches.
Spearman correlations are over the problems with a signal in both rollouts; where a rule drops every token, the cosine
is 0. On-policy (0 steps) all rules are one.

Beside them: effective sample sizes of token ratios and of their products, as shares of the rollouts; the estimate of
KL(behaviour || policy) per token, the mean of log mu - log pi. A second table pools all seeds and ages: the error of a
problem's cosine by its own effective sample size.

Dimension letters: P problems.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from torch import nn

from benchmarks.evaluation import spread
from benchmarks.probe_table import Sampler
from gradstore.cli.show import print_table, say
from gradstore.demo import tasks
from gradstore.demo.run import MODEL
from gradstore.engine import Sketcher, SketchSpec
from gradstore.engine.gradients.directions import validation_gradient
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.logprobs import response_logprobs
from gradstore.engine.gradients.models import load_model
from gradstore.engine.gradients.objectives import Objective, objective
from gradstore.engine.rollouts import Group
from gradstore.engine.sketches.spec import SketchBatch

N_TRAIN, TRAIN_ROLLOUTS, BUDGET = 48, 16, 16_384
BASE = objective("gradalign")
RULES: Mapping[str, Objective] = {
    "no correction": BASE,
    "token": replace(BASE, importance=True),
    "token, PPO 0.2": replace(BASE, importance=True, clip_low=0.2, clip_high=0.2),
    "token, truncated at 2": replace(BASE, importance=True, off_policy="truncate", ratio_cap=2.0),
    "token, masked at 2": replace(BASE, importance=True, off_policy="mask", ratio_cap=2.0),
    "sequence (GSPO's ratio)": replace(BASE, importance=True, ratio="sequence"),
    "sequence, GSPO's clip": replace(BASE, importance=True, ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    "product": replace(BASE, importance=True, ratio="product"),
    "product, truncated at 2": replace(BASE, importance=True, ratio="product", off_policy="truncate", ratio_cap=2.0),
}
BINS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 1.0)
"""Edges of the bins of a problem's effective sample size, as a share of its rollouts."""


CEILING, RANKED = "fresh rollouts again", "problems ranked"
ESS, PRODUCT_ESS, KL = "ESS of tokens, share", "ESS of products, share", "KL per token, nats"
ABOUT = (ESS, PRODUCT_ESS, KL, RANKED)


@dataclass(frozen=True, slots=True)
class Ranked:
    """One ranking of a pool from rollouts of some age, beside the fresh one."""

    age: int
    rule: str
    spearman: float
    ess_P: np.ndarray
    """Effective sample size of the token ratios as a share of the rollouts, of the problems ranked in both."""
    error_P: np.ndarray
    """Cosine less the fresh cosine."""


def main(
    quick: Annotated[bool, typer.Option("--quick", help="One seed, ages 4 and 16, a pool of 40 problems.")] = False,
    seeds: Annotated[int, typer.Option(help="Repeats.")] = 3,
    first: Annotated[int, typer.Option(help="Number of the first seed.")] = 0,
    ages: Annotated[str, typer.Option(help="Ages of rollouts, in training steps.")] = "2,8,32",
    lr: Annotated[float, typer.Option(help="Adam's learning rate: how far a step moves the policy.")] = 5e-5,
    problems: Annotated[int, typer.Option(help="Problems in the pool.")] = 64,
    rollouts: Annotated[int, typer.Option(help="Rollouts of a problem.")] = 16,
) -> None:
    """Print the rank correlation with fresh rollouts by age and rule, and the error by effective sample size."""
    if quick:
        seeds, ages, problems = 1, "4,16", 40
    torch.set_num_threads(1)
    known = [0, *sorted(int(age) for age in ages.split(","))]
    found: list[Ranked] = []
    about: dict[tuple[str, int], list[float]] = {}
    for seed in range(first, first + seeds):
        found += one_seed(seed, known, lr, problems, rollouts, about)
        show(found, about, known, f"{seed + 1 - first} seeds, lr {lr:g}")


def show(found: list[Ranked], about: dict[tuple[str, int], list[float]], ages: list[int], what: str) -> None:
    """Print both tables."""
    columns = [f"{age} steps" for age in ages]
    values = {**about, **{(rule, age): [] for rule in RULES for age in ages}}
    for one in found:
        values[one.rule, one.age].append(one.spearman)
    rows = [[name, *(spread(values.get((name, age), [])) for age in ages)] for name in [CEILING, *RULES, *ABOUT]]
    print_table(f"Spearman with fresh rollouts: {what}, mean (range)", ["rule", *columns], rows, right=columns)
    labels = [f"{low:g} to {high:g}" for low, high in pairwise(BINS)]
    rows = [[rule, *_errors([one for one in found if one.rule == rule])] for rule in RULES]
    print_table("Error of a cosine by its ESS share, root mean square", ["rule", *labels], rows, right=labels)


def one_seed(
    seed: int, ages: list[int], lr: float, n_problems: int, n: int, about: dict[tuple[str, int], list[float]]
) -> list[Ranked]:
    """All rankings of one seed; the ceiling, ESS and KL of each age are added to `about`."""
    model = load_model(MODEL, device="cpu").requires_grad_(True)
    pool, bench = tasks.pool(seed, n_problems), tasks.benchmark(seed, 64)
    rolled_out = dict(trained(model, seed, ages, lr, pool, n))
    sample = Sampler(model, seed + 500)
    rolled_out[0] = sample(pool, n, first=3000)
    target_D = sketches(model, sample(bench, 4 * n, first=4000), BASE).sketches.mean(0)
    target_D /= np.linalg.norm(target_D)
    truth_P, _ = cosines(model, sample(pool, 4 * n, first=1000), target_D, BASE)
    again_P, _ = cosines(model, sample(pool, n, first=2000), target_D, BASE)
    about.setdefault((CEILING, 0), []).append(correlation(again_P, truth_P))
    found = []
    for age, groups in sorted(rolled_out.items()):
        token_P, ess_P = cosines(model, groups, target_D, RULES["token"])
        _, whole_P = cosines(model, groups, target_D, RULES["product"])
        ranked_P = np.isfinite(token_P) & np.isfinite(truth_P)
        for name, value in ((ESS, ess_P[ranked_P].mean()), (PRODUCT_ESS, whole_P[ranked_P].mean())):
            about.setdefault((name, age), []).append(float(value))
        about.setdefault((KL, age), []).append(divergence(model, groups))
        about.setdefault((RANKED, age), []).append(float(ranked_P.sum()))
        for rule, settings in RULES.items() if age else [("no correction", BASE)]:
            found_P = np.nan_to_num(cosines(model, groups, target_D, settings)[0])[ranked_P]
            spearman = correlation(found_P, truth_P[ranked_P])
            found.append(Ranked(age, rule, spearman, ess_P[ranked_P], found_P - truth_P[ranked_P]))
            say(f"seed {seed}, {age} steps, ESS {ess_P[ranked_P].mean():.3f}, {rule}: {spearman:.3f}")
    return found


def trained(
    model: nn.Module, seed: int, ages: list[int], lr: float, pool: list[dict], n: int
) -> Iterator[tuple[int, list[Group]]]:
    """Train for max(ages) steps; the pool's rollouts of each age at the end, made on the way."""
    clean = [p for p in tasks.pool(seed + 100, 400) if p["source"] == tasks.TARGET_FAMILY and tasks.CLEAN in p["tags"]]
    random, settings = np.random.default_rng(seed), objective("grpo")
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(max(ages)):
        if max(ages) - step in ages:
            yield max(ages) - step, Sampler(model, seed + 200 + step)(pool, n)
        chosen = [clean[i] for i in random.choice(len(clean), N_TRAIN, replace=len(clean) < N_TRAIN)]
        groups = Sampler(model, 1000 + step)(chosen, TRAIN_ROLLOUTS)
        ascent = validation_gradient(model, groups, settings, token_budget=BUDGET)
        for name, parameter in model.named_parameters():
            parameter.grad = -ascent.tensors[name]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def sketches(model: nn.Module, groups: list[Group], rule: Objective) -> SketchBatch:
    """The groups' whole gradients: sketches wider than every layer, so that nothing is projected."""
    return Sketcher(model, SketchSpec(rank=512, objective=rule, token_budget=BUDGET)).sketch(groups)


def cosines(
    model: nn.Module, groups: list[Group], target_D: np.ndarray, rule: Objective
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of the problems' gradients to a unit vector, and ESS as a share of the rollouts; [P], nan where none."""
    batch = sketches(model, groups, rule)
    norms_P = np.linalg.norm(batch.sketches, axis=1)
    found_P = np.divide(batch.sketches @ target_D, norms_P, out=np.full(len(groups), np.nan), where=norms_P > 0)
    sizes_P = np.full(len(groups), np.nan) if batch.ess is None else batch.ess / batch.n_rollouts
    return found_P, np.where([group.has_signal for group in groups], sizes_P, np.nan)


def correlation(found_P: np.ndarray, truth_P: np.ndarray) -> float:
    """Spearman's correlation over the problems that have both."""
    both_P = np.isfinite(found_P) & np.isfinite(truth_P)
    return float(spearmanr(found_P[both_P], truth_P[both_P]).statistic)


def divergence(model: nn.Module, groups: list[Group]) -> float:
    """Estimate of KL(behaviour || policy) per token, nats: the mean of log mu - log pi over the rollouts' tokens."""
    now = response_logprobs(GradientPass(model, SketchSpec(token_budget=BUDGET)), groups)
    differences = [
        then_N - now_N
        for group, rows in zip(groups, now, strict=True)
        for then_N, now_N in zip(group.logprobs or [], rows, strict=True)
    ]
    return float(np.concatenate(differences).mean())


def _errors(found: list[Ranked]) -> list[str]:
    """Root mean square error in each bin of BINS; empty for fewer than ten problems."""
    ess_P, error_P = (np.concatenate([getattr(one, name) for one in found]) for name in ("ess_P", "error_P"))
    bins_P = np.clip(np.digitize(ess_P, BINS) - 1, 0, len(BINS) - 2)
    parts = [error_P[bins_P == number] for number in range(len(BINS) - 1)]
    return [f"{np.sqrt(np.mean(part**2)):.3f}" if len(part) >= 10 else "" for part in parts]


if __name__ == "__main__":
    typer.run(main)
