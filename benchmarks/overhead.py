"""Overhead of selection: seconds of a budgeted round without its rollouts, relative to the training that follows.

    python -m benchmarks.overhead [--shape 13.8m] [--rounds 3] [--train-batch 16] [--benchmark 6] [--refresh 4]
    python -m benchmarks.overhead --refresh 8 --target-rollouts 8 --observe all
    python -m benchmarks.overhead --shape demo
    python -m benchmarks.overhead --shape 63m --rounds 1 --repeats 2
    python -m benchmarks.overhead --shape qwen2.5-1.5b --device cuda

The embedded trainer runs on random weights. Prompts are random tokens; a response has reward 1 if most of its tokens
are even, so groups have signal and the policy learns. Proportions are GradAlign's published ones (10 steps of 128
problems per round, a benchmark of 43), by default an eighth of them. The selector is `lcb` with a budgeted refresh, as
in the study's `budgeted/4-lcb`: one candidate in 32 is rolled out, and a benchmark problem gets half as many rollouts
as a trained one. The training rollouts of the last pass over the picks become rows (`observe`). `demo` uses the study's
small model and problems instead. The first round, which makes the store and fits the projection, is not counted.

Afterwards, updates with and without sketches are timed alternately, to measure the cost of `observe`.
"""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import gradstore
from benchmarks.sketch import SHAPES
from benchmarks.study.toy import ARMS, problems
from benchmarks.timing import interleaved
from gradstore.cli.show import print_table, say
from gradstore.demo import tasks
from gradstore.demo.run import MODEL
from gradstore.engine.gradients.models import load_model, load_tokenizer
from gradstore.engine.sketches.spec import SketchSpec
from gradstore.trainer.local.grpo import Learner
from gradstore.trainer.local.policy import LocalPolicy
from gradstore.trainer.local.settings import Sampling, UpdateSettings
from gradstore.trainer.local.training import Training
from gradstore.trainer.round.driver import Rounds
from gradstore.trainer.round.settings import Observe, RoundSettings
from gradstore.trainer.sampling.reward import Reward


@dataclass(frozen=True)
class Size:
    """Sizes of a round: numbers of problems, rollouts, tokens and dimensions."""

    pool: int
    selected: int
    train_batch: int
    steps: int
    benchmark: int
    refresh: int
    rollouts: int
    target_rollouts: int
    prompt: int = 0
    response: int = 8
    rank: int = 16
    dim: int = 1024
    token_budget: int = 2048
    observe: Observe = "last"


SIZES = {
    "tiny": Size(16, 8, 4, 4, 4, 4, 4, 4, 12, 12, rank=4, dim=64),
    "demo": Size(320, 16, 16, 4, 32, 28, 16, 8, rank=8, dim=512, token_budget=16_384),
    "13.8m": Size(128, 32, 16, 10, 6, 4, 8, 4, 64, 64),
    "63m": Size(128, 32, 16, 10, 6, 4, 8, 4, 64, 64),
    "qwen2.5-1.5b": Size(256, 64, 32, 10, 11, 8, 8, 4, 200, 400, token_budget=16_384),
}


class Numbers:
    """A tokenizer whose text is the token ids in decimal."""

    pad_token_id = eos_token_id = chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, row: Sequence[int], **_: Any) -> str:
        return " ".join(str(int(token)) for token in row)


def mostly_even(_: Mapping[str, Any], response: str, __: int) -> float:
    """1.0 if more than half of the tokens are even."""
    tokens = [int(word) for word in response.split()]
    return float(sum(token % 2 == 0 for token in tokens) > len(tokens) / 2)


def made(shape: str, size: Size, device: str) -> tuple[LocalPolicy, list[dict[str, Any]], list[dict[str, Any]]]:
    """(policy, pool records, benchmark records)."""
    if shape == "demo":
        found = problems(ARMS["imbalance"], 5, size.pool, size.benchmark, 1)
        policy = LocalPolicy(
            load_model(MODEL, device=device),
            load_tokenizer(MODEL),
            Reward("study", tasks.reward),
            Sampling(max_new_tokens=size.response, batch_tokens=1 << 20),
            token_budget=size.token_budget,
        )
        return policy, found.pool, found.validation
    about, random = SHAPES[shape], np.random.default_rng(0)
    model = about.random_model(device)
    model.generation_config.eos_token_id = None
    sampling = Sampling(max_new_tokens=size.response)
    policy = LocalPolicy(model, Numbers(), Reward("even", mostly_even), sampling, token_budget=size.token_budget)
    prompts = random.integers(0, about.model["vocab_size"], (size.pool + size.benchmark, size.prompt))
    records = [{"id": f"p{i:04d}", "prompt": " ".join(map(str, ids))} for i, ids in enumerate(prompts.tolist())]
    return policy, records[: size.pool], records[size.pool :]


def measured(shape: str, size: Size, rounds: int, device: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of each stage, one number per round after the first."""
    policy, pool, benchmark = made(shape, size, device)
    learner = Learner(policy.model, UpdateSettings(lr=3e-5, token_budget=size.token_budget))
    settings = RoundSettings(
        selector="lcb",
        refresh=size.refresh,
        refresh_first=4 * size.refresh,
        selected=size.selected,
        train_batch=size.train_batch,
        steps=size.steps,
        rounds=rounds + 1,
        rollouts=size.rollouts,
        target_rollouts=size.target_rollouts,
        observe=size.observe,
        fit_problems=size.refresh,
        accept_coverage=0.0,  # weights are random
        spec=SketchSpec(basis="fitted", rank=size.rank, dim=size.dim),
    )
    with tempfile.TemporaryDirectory(prefix="gradstore-overhead-") as folder:
        chooser = Rounds(Path(folder) / "store", pool, {"benchmark": benchmark}, settings)
        Training(policy, learner, chooser, pool, settings, Path(folder) / "run", rollouts=size.rollouts).run()
        costs = [dict(found.about["costs"]) for found in _rounds(Path(folder) / "store", rounds)]
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    groups = policy.roll_out(pool[: size.train_batch], size.rollouts, seed=1)
    times = interleaved(
        {
            "without": lambda: learner.step(groups),
            "with": lambda: learner.step_and_sketch(groups, policy.sketcher),
        },
        repeats,
    )
    ratio = float(np.median(times["with"] / times["without"]))
    say(f"an update with the sketches of its groups takes {ratio:.3f} times one without ({repeats} in turn)")
    of_round = [
        [row for row in rows if row["kind"] == "step" and row["round"] == number] for number in range(rounds + 1)
    ]
    totals = [row["seconds"] for row in rows if row["kind"] == "round"]
    kept = [settings.observes((step + 1) * size.train_batch, size.selected) for step in range(size.steps)]
    found: dict[str, list[float]] = {}
    for number in range(1, rounds + 1):
        spent, steps = costs[number], of_round[number]
        updates = np.array([row["seconds_update"] for row in steps])
        sketches = float(np.sum(updates * (1 - 1 / ratio), where=kept))
        stages = {
            "training: rollouts": sum(row["seconds_rollouts"] for row in steps),
            "training: updates": float(updates.sum()) - sketches,
            "observation: sketches": sketches,
            "observation: store": sum(row["seconds_observe"] for row in steps),
            "selection: rollouts": 0.0,
            **{f"selection: {name}": seconds for name, seconds in spent.items()},
            "selection: the rest": totals[number] - sum(spent.values()),
        }
        for name, seconds in stages.items():
            found.setdefault(name, [0.0] * rounds)[number - 1] = seconds
    return found


def _rounds(path: Path, last: int) -> list[gradstore.Round]:
    store = gradstore.open(path)
    return [store.rounds("pool")[number] for number in range(last + 1)]


def share(stages: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Overhead per round: (selection without rollouts + observation) / (training's rollouts + updates)."""
    training = np.sum([own for name, own in stages.items() if name.startswith("training")], axis=0)
    added = [own for name, own in stages.items() if not name.startswith("training") and name != "selection: rollouts"]
    return np.sum(added, axis=0) / training


def main(
    shape: Annotated[str, typer.Option(help=", ".join(SIZES))] = "13.8m",
    rounds: Annotated[int, typer.Option(help="rounds after the first")] = 3,
    device: str = "cpu",
    threads: Annotated[int, typer.Option(help="of a CPU; 0: as torch chooses")] = 0,
    repeats: Annotated[int, typer.Option(help="updates with and without sketches, in turn")] = 5,
    train_batch: Annotated[int | None, typer.Option(help="problems of a step")] = None,
    benchmark: Annotated[int | None, typer.Option(help="problems of the benchmark")] = None,
    refresh: Annotated[int | None, typer.Option(help="problems rolled out anew in a round")] = None,
    rollouts: Annotated[int | None, typer.Option(help="responses to a problem")] = None,
    target_rollouts: Annotated[int | None, typer.Option(help="to one of the benchmark's")] = None,
    observe: Annotated[str | None, typer.Option(help="training rollouts that become rows: last, all or none")] = None,
    response: Annotated[int | None, typer.Option(help="tokens of a response, and of a prompt of random tokens")] = None,
    processor: Annotated[bool, typer.Option(help="processor seconds of all threads, for a busy CPU")] = False,
) -> None:
    """Print the seconds of each stage and the share."""
    given: dict[str, Any] = {"benchmark": benchmark, "refresh": refresh, "rollouts": rollouts}
    given |= {"target_rollouts": target_rollouts, "observe": observe}
    given |= {"response": response, "prompt": response if SIZES[shape].prompt else None}
    given |= {"train_batch": train_batch, "selected": 2 * train_batch if train_batch else None}
    size = replace(SIZES[shape], **{name: value for name, value in given.items() if value is not None})
    if processor:  # every stage is timed with one of these two clocks
        for clock in ("monotonic", "perf_counter"):
            setattr(time, clock, time.process_time)
    if threads:
        torch.set_num_threads(threads)
    if device != "cpu":
        torch.set_float32_matmul_precision("high")
    started = time.monotonic()
    stages = measured(shape, size, rounds, device, repeats)
    training = float(np.sum([np.median(own) for name, own in stages.items() if name.startswith("training")]))
    rows = [
        [name, f"{np.median(own):.3f}", f"{min(own):.3f}-{max(own):.3f}", f"{100 * np.median(own) / training:.1f} %"]
        for name, own in stages.items()
    ]
    title = f"{shape}, {device}, {torch.get_num_threads()} threads, {rounds} rounds: {size}"
    print_table(title, ["stage", "median s", "range", "of training"], rows, right=["median s", "of training"])
    shares = 100 * share(stages)
    say(
        f"selection without its rollouts, with observation: {np.median(shares):.1f} % of training "
        f"({shares.min():.1f} to {shares.max():.1f} % over {rounds} rounds); {time.monotonic() - started:.0f} s in all"
    )


if __name__ == "__main__":
    typer.run(main)
