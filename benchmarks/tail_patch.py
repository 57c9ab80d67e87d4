"""Tail patch of selectors: does one training step on a selector's picks improve the demo's policy on the benchmark?

The demo's model, problems of its pool with 16 rollouts each. Every selector picks 64 from a store, and the policy takes
one step of a fixed length along the picks' mean gradient. The mean log-likelihood of the benchmark's right answers is
measured before and after; it needs no rollouts, so it has no sampling noise. References: the benchmark's own gradient,
and that of all clean problems of its family. The weights are restored after each step.

    python -m benchmarks.tail_patch [--seeds 3] [--pool 600] [--picked 64] [--out FILE.json]
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.probe_table import Sampler
from benchmarks.suspicion import N_ROLLOUTS, collected
from gradstore.cli.show import print_table, say
from gradstore.demo import tasks
from gradstore.demo.run import MODEL
from gradstore.engine.gradients.directions import validation_gradient
from gradstore.engine.gradients.models import load_model, load_tokenizer
from gradstore.engine.probing.displacement import displaced
from gradstore.engine.rollouts.group import Group
from gradstore.engine.searching.targets import target
from gradstore.engine.selecting.selection import select

SELECTORS = ("cosine", "dot", "fisher", "norm", "simacc", "accgreedy", "rand", "negsim")
LENGTH = 0.03
"""Length of the step in parameter space."""


def main(
    seeds: Annotated[int, typer.Option(help="Repeats.")] = 3,
    pool: Annotated[int, typer.Option(help="Problems of the pool.")] = 600,
    picked: Annotated[int, typer.Option(help="Problems a selector picks.")] = 64,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """Print the gain of one step on each selector's picks, mean and range over seeds."""
    torch.set_num_threads(1)
    runs = []
    for seed in range(seeds):
        runs.append(measure(seed, pool, picked))
        say(f"seed {seed}: " + ", ".join(f"{name} {gain:+.4f}" for name, gain in runs[-1].items()))
    rows = []
    for name in runs[0]:
        gains = np.array([run[name] for run in runs])
        rows.append([name, f"{gains.mean():+.4f}", f"{gains.min():+.4f} to {gains.max():+.4f}"])
    print_table(f"nats an answer, one step of length {LENGTH}, {seeds} seeds", ["step on", "gain", "range"], rows)
    if out is not None:
        out.write_text(json.dumps({"length": LENGTH, "picked": picked, "runs": runs}, indent=2))


def measure(seed: int, n_pool: int, n_picked: int) -> dict[str, float]:
    """Selector or reference -> change of the benchmark's mean log-likelihood of right answers, in nats."""
    problems, wanted = tasks.pool(seed, n_pool), tasks.benchmark(seed)
    model, tokenizer = load_model(MODEL, device="cpu"), load_tokenizer(MODEL)
    sample = Sampler(model, seed)
    groups = {group.problem_id: group for group in sample([*problems, *wanted], N_ROLLOUTS)}
    answers = right_answers(tokenizer, wanted, groups)
    clean = [r["id"] for r in problems if r["source"] == tasks.TARGET_FAMILY and r["tags"] == [tasks.CLEAN]]
    picks = {"the benchmark itself": [record["id"] for record in wanted], "clean problems of its family": clean}
    with tempfile.TemporaryDirectory() as folder:
        store = collected(Path(folder), seed, problems)
        goal = target(store, "benchmark")
        for name in SELECTORS:
            picks[name] = select(store, "pool", goal, n_picked, name, seed=seed).ids
    before = log_likelihood(model, answers)
    found = {}
    for name, ids in picks.items():
        along = validation_gradient(model, [groups[one] for one in ids], token_budget=16_384)
        with displaced(model, along) as move:
            move(LENGTH / along.norm)
            found[name] = log_likelihood(model, answers) - before
    return found


def right_answers(tokenizer: Any, records: Sequence[dict], groups: dict[str, Group]) -> list[tuple[list[int], int]]:
    """(token ids of prompt and right answer, prompt length) of each problem."""
    found = []
    for record in records:
        prompt = groups[record["id"]].prompt_ids.tolist()
        answer = tokenizer(record["ground_truth"] + tokenizer.eos_token).input_ids
        found.append((prompt + answer, len(prompt)))
    return found


@torch.no_grad()
def log_likelihood(model: torch.nn.Module, answers: Sequence[tuple[list[int], int]]) -> float:
    """Log-likelihood of the answers, summed over tokens, mean over problems."""
    longest = max(len(ids) for ids, _ in answers)
    ids_PT = torch.zeros(len(answers), longest, dtype=torch.long)
    counted_PT = torch.zeros(len(answers), longest, dtype=torch.bool)
    for p, (ids, start) in enumerate(answers):
        ids_PT[p, : len(ids)] = torch.tensor(ids)
        counted_PT[p, start : len(ids)] = True
    logits_PTV = model(ids_PT).logits[:, :-1].double()
    tokens_PT = torch.log_softmax(logits_PTV, dim=2).gather(2, ids_PT[:, 1:, None])[:, :, 0]
    return float((tokens_PT * counted_PT[:, 1:]).sum() / len(answers))


if __name__ == "__main__":
    typer.run(main)
