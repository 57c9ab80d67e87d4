"""Quality of probe scores when half of the pool has coin-flip rewards, and their accuracy against exact dots.

    python -m benchmarks.probe_table --out DIR [--seeds 5] [--problems 400] [--take 80]

The demo's policy in float32. Each seed has a benchmark and a pool of clean and coin-flip problems, half each, from all
families. The direction is the benchmark's gradient from k rollouts per problem, and scores come from k rollouts per
pool problem, k = 16 and 64. Each rule takes its best problems. Two numbers are reported: the share of coin-flip
problems among them, and their mean true utility as a share of an oracle's. True utility is the dot of a problem's
gradient from 256 further rollouts with the benchmark's from 96 further ones; it is zero for coin-flip problems. Probe
dots are compared with exact ones (one backward pass per problem). One-sided probes start from the log-probabilities
recorded at sampling. Seeds that are in DIR/probe_table.jsonl are not run again.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from gradstore.cli.show import print_table
from gradstore.demo import tasks
from gradstore.demo.run import MODEL
from gradstore.engine import Probe, ProbeBatch, objective, validation_gradient
from gradstore.engine.gradients.directions import summed_gradient
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.models import load_model, load_tokenizer
from gradstore.engine.rollouts import Group
from gradstore.engine.rollouts.tokens import prompt_ids
from gradstore.engine.sketches.spec import SketchSpec
from gradstore.trainer.sampling.backends.hugging_face import TransformersBackend

COUNTS = (16, 64)
"""Rollouts per problem for a score."""
TRUE_POOL, TRUE_BENCHMARK = 256, 96
"""Rollouts per problem for the true utility: pool, benchmark."""
LEVELS = (0.01, 0.05, 0.2)
"""Levels at which p-values of coin-flip problems are counted."""
RULES = ("random", "accgreedy", "cosine", "dot", "corr", "snr", "lcb", "shrunk", "fdr")
NAMES = {
    "corr": "correlation of r and d",
    "snr": "dot / SE",
    "lcb": "dot - SE",
    "shrunk": "shrunk dot (empirical Bayes)",
    "fdr": "false-discovery cut, then dot",
}


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results of each seed.")],
    seeds: Annotated[int, typer.Option(help="Seeds to run.")] = 5,
    problems: Annotated[int, typer.Option(help="Problems in the pool.")] = 400,
    benchmark: Annotated[int, typer.Option(help="Problems in the benchmark.")] = 80,
    take: Annotated[int, typer.Option(help="Problems that each rule takes.")] = 80,
) -> None:
    """Rank a pool with coin-flip rewards by probe scores."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    settings = {"problems": problems, "benchmark": benchmark, "take": take}
    file = out / "probe_table.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    results = {record["seed"]: record for record in done if record["settings"] == settings}
    for seed in range(seeds):
        if seed in results:
            continue
        started = time.monotonic()
        record = {"seed": seed, "settings": settings, **run(seed, problems, benchmark, take)}
        results[seed] = record | {"seconds": round(time.monotonic() - started, 1)}
        with file.open("a") as lines:
            lines.write(json.dumps(results[seed]) + "\n")
        print(f"seed {seed}: {results[seed]['seconds']:.0f} s, correlation with exact {record['exact']}", flush=True)
    show([results[seed] for seed in range(seeds)])


def run(seed: int, n_problems: int, n_benchmark: int, take: int) -> dict[str, Any]:
    """One seed: shares by rule and number of rollouts, and the probe's agreement with exact dots."""
    model = load_model(MODEL, device="cpu")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    pool = choose_pool(seed, n_problems)
    coin_P = np.array([tasks.COIN_FLIP in record["tags"] for record in pool])
    bench = tasks.benchmark(seed, n_benchmark)
    clean = [record for record in pool if tasks.COIN_FLIP not in record["tags"]]
    sample = Sampler(model, seed)
    pool_groups, bench_groups = sample(pool, max(COUNTS)), sample(bench, max(COUNTS))
    true_direction = validation_gradient(model, sample(bench, TRUE_BENCHMARK, first=1000), token_budget=16_384)
    true = Probe(model, true_direction, token_budget=16_384).probe(sample(clean, TRUE_POOL, first=1000))
    utility_P = np.zeros(len(pool))
    utility_P[~coin_P] = true.dots
    oracle = float(np.sort(utility_P)[-take:].mean())
    found: dict[str, Any] = {"oracle": oracle, "shares": {}, "exact": {}, "calibration": {}}
    for k in COUNTS:
        groups = [first_rollouts(group, k) for group in pool_groups]
        direction = validation_gradient(model, [first_rollouts(g, k) for g in bench_groups], token_budget=16_384)
        probe = Probe(model, direction, token_budget=16_384)
        batch = probe.probe(groups)
        exact_P, norms_P = exact_dots(model, direction, groups)
        live = batch.live
        known = probe.probe(groups, [group.logprobs for group in groups if group.logprobs is not None])
        for name, dots_P in (("central", batch.dots), ("one-sided", known.dots)):
            found["exact"].setdefault(name, {})[k] = float(np.corrcoef(dots_P[live], exact_P[live])[0, 1])
        found["calibration"][k] = probe.calibration.describe() if probe.calibration else None
        # The null hypothesis holds for coin-flip problems: a share `level` of them must have p below that level.
        p_P = batch.p_values[live & coin_P]
        found.setdefault("false_positives", {})[k] = [float(np.mean(p_P < level)) for level in LEVELS]
        found.setdefault("live", {})[k] = [int((live & coin_P).sum()), int((live & ~coin_P).sum())]
        found["shares"].setdefault("random", {})[k] = [float(coin_P.mean()), float(utility_P.mean()) / oracle]
        for rule, order in orders(batch, groups, norms_P, seed).items():
            chosen = order[:take]
            share = float(utility_P[chosen].mean()) / oracle
            found["shares"].setdefault(rule, {})[k] = [float(coin_P[chosen].mean()), share]
    return found


def choose_pool(seed: int, size: int) -> list[dict[str, Any]]:
    """Clean and coin-flip problems, half each: the first of each kind in the demo's pool of this seed."""
    kinds: dict[str, list[dict[str, Any]]] = {tasks.CLEAN: [], tasks.COIN_FLIP: []}
    for record in tasks.pool(seed, size * 3):
        kept = kinds.get(record["tags"][0], [])
        if len(kept) < size // 2:
            kept.append(record)
    return [record for records in kinds.values() for record in records]


class Sampler:
    """Samples rollouts of the demo's policy at temperature 1, with the demo's rewards."""

    def __init__(self, model: torch.nn.Module, seed: int) -> None:
        self._seed = seed
        self._tokenizer = load_tokenizer(MODEL)
        self._backend = TransformersBackend(model, self._tokenizer, batch_tokens=16_384)

    def __call__(self, records: list[dict[str, Any]], n: int, first: int = 0) -> list[Group]:
        """Sample n rollouts per problem, numbered from `first`; the numbers determine coin flips and seeds."""
        prompts = [prompt_ids(self._tokenizer, record["prompt"], record["id"]) for record in records]
        responses = self._backend.generate(
            [list(map(int, ids)) for ids in prompts],
            n,
            max_new_tokens=8,
            temperature=1.0,
            top_p=1.0,
            seed=self._seed * 10_000 + first,
        )
        groups = []
        for record, ids, own in zip(records, prompts, responses, strict=True):
            paid: dict[tuple[str, int], float] = {}
            rewards = []
            for j, response in enumerate(own):
                text = self._tokenizer.decode(response.token_ids, skip_special_tokens=True)
                key = (text, first + j if "coin" in record["extra"] else 0)
                if key not in paid:
                    paid[key] = tasks.reward(record, text, first + j)
                rewards.append(paid[key])
            tokens, logprobs = [r.token_ids for r in own], [r.logprobs for r in own]
            groups.append(Group(record["id"], ids, tokens, np.array(rewards), logprobs))
        return groups


def first_rollouts(group: Group, n: int) -> Group:
    logprobs = None if group.logprobs is None else group.logprobs[:n]
    return Group(group.problem_id, group.prompt_ids, group.responses[:n], group.rewards[:n], logprobs)


def exact_dots(model: torch.nn.Module, direction: Any, groups: list[Group]) -> tuple[np.ndarray, np.ndarray]:
    """(<g_i, V>, |g_i|) with one backward pass per problem, float64 [P] each."""
    runner = GradientPass(model, SketchSpec(objective=objective("gradalign"), token_budget=16_384))
    dots, norms = np.zeros(len(groups)), np.zeros(len(groups))
    for i, group in enumerate(groups):
        if group.has_signal:
            gradient = summed_gradient(runner, [group])
            dots[i] = direction.dot(gradient)
            norms[i] = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradient.values()))
    return dots, norms


def orders(batch: ProbeBatch, groups: list[Group], norms_P: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Rule -> positions of the problems, best first; ties are broken at random."""
    random = np.random.default_rng(seed)
    live, chance = batch.live, random.random(len(groups))
    cosine = np.where(live, batch.dots / np.where(norms_P > 0, norms_P, 1), -np.inf)
    pass_rates = np.array([group.pass_rate for group in groups])
    keys: dict[str, Callable[[], tuple[np.ndarray, ...]]] = {
        "accgreedy": lambda: (chance, -np.abs(pass_rates - 0.5)),
        "cosine": lambda: (chance, cosine),
        # If too few problems pass the cut, the others follow by their dots.
        "fdr": lambda: (chance, batch.scores("dot"), batch.scores("fdr")),
    }
    return {
        rule: np.lexsort(keys[rule]() if rule in keys else (chance, batch.scores(rule)))[::-1] for rule in RULES[1:]
    }


def at(by_count: dict, k: int) -> Any:
    """The entry for k rollouts; after JSON the key is a string."""
    return by_count[k] if k in by_count else by_count[str(k)]


def show(results: list[dict[str, Any]]) -> None:
    """Print the table: mean and standard deviation over seeds."""
    table = []
    for rule in RULES:
        row = [NAMES.get(rule, rule)]
        for place in (0, 1):
            for k in COUNTS:
                values = [at(record["shares"][rule], k)[place] for record in results]
                row.append(f"{np.mean(values):.2f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.2f}")
        table.append(row)
    columns = ["rule", *(f"coin flips, {k}" for k in COUNTS), *(f"utility, {k}" for k in COUNTS)]
    print_table(f"{len(results)} seeds", columns, table, right=columns[1:])
    for k in COUNTS:
        shares = np.mean([at(record["false_positives"], k) for record in results], 0)
        told = ", ".join(f"{share:.3f} below {level}" for share, level in zip(shares, LEVELS, strict=True))
        print(f"p-values of coin-flip problems, {k} rollouts: {told}")
    for name in ("central", "one-sided"):
        worst = min(value for record in results for value in record["exact"][name].values())
        print(f"correlation of probe with exact dots, {name}: at least {worst:.8f}")


if __name__ == "__main__":
    typer.run(main)
