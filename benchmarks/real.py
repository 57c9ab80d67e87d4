"""All main commands of gradstore in order, on a real model's shape: exit status, time, peak memory.

    python -m benchmarks.real --model FOLDER [--out FILE]
    python -m benchmarks.real --shape qwen2.5-0.5b --tokenizer FOLDER [--out FILE]

Each row is a separate process. `load`: only the model. `plain`: a forward and backward pass with all weight gradients
over the pool's rollouts, one problem at a time. Then rollout, collect, query, select, fidelity, probe, train and report
on a few sums in chat format. A shape gets random float32 weights, saved to a temporary folder, and the tokenizer of a
given folder, whose ids must fit its vocabulary. The reward depends on a response's length. Times and tokens per second
include imports and loading; `x plain` is processor time above that of `load`, relative to `plain`. On a GPU, the peak
is the host's. The exit status is 1 if one of the commands failed.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.peaks import Outcome, outcome
from gradstore.cli.show import print_table, say

SHAPES = {"smollm2-135m": "SmolLM2-135M", "qwen2.5-0.5b": "Qwen2.5-0.5B", "qwen3-0.6b": "Qwen3-0.6B"}
"""Short name -> name in `gradstore.engine.planning.shapes.KNOWN`."""
ROUND = ["rounds=1", "steps=1", "selector=lcb", "refresh=all", "fit_problems=8", "accept_coverage=0"]
"""Settings of the round: every candidate is measured and probed; one training step uses the picks."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of problems, rollouts and tokens to sample."""

    pool: int
    benchmark: int
    rollouts: int
    tokens: int


def even(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """A reward that about half of all responses get, even with random weights; nearly every problem has a gradient."""
    return float(len(solution_str) % 2 == 0)


def problems(n: int, first: int) -> Iterator[dict[str, Any]]:
    """Problem records of one-digit sums in chat format; the first 81 are distinct."""
    for i in range(first, first + n):
        a, b = 1 + i * 7 % 9, 1 + i * 7 // 9 % 9
        text = f"What is {a} plus {b}? Answer with a number."
        yield {"id": f"sum{i}", "prompt": [{"role": "user", "content": text}], "ground_truth": str(a + b)}


def save_random(name: str, tokenizer: str, folder: str) -> None:
    """Save a model of this shape with random weights (seed 0), and a tokenizer, to the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from gradstore.engine.gradients.models import load_tokenizer
    from gradstore.engine.planning.shapes import KNOWN

    torch.manual_seed(0)
    words = load_tokenizer(tokenizer)
    ids = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = AutoConfig.for_model(**{**KNOWN[SHAPES[name]], **ids})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words.save_pretrained(folder)


def plain(model: str, rollouts: str) -> dict[str, float]:
    """Times of the passes without loading, and token counts of the rollouts."""
    import torch

    from gradstore.engine.gradients.models import load_model, load_tokenizer, vocabulary_size
    from gradstore.engine.rollouts import read_rollouts

    source = read_rollouts(rollouts, tokenizer=load_tokenizer(model), vocabulary=vocabulary_size(model))
    groups, loaded = list(source.groups()), load_model(model)
    started, processor = time.perf_counter(), time.process_time()
    for group in groups:
        rows = [torch.from_numpy(response) for response in group.responses]
        ids_GT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).long()
        prompt_GT = torch.from_numpy(group.prompt_ids).long().expand(len(rows), -1)
        whole_GT = torch.cat([prompt_GT, ids_GT], 1).to(next(loaded.parameters()).device)
        logits_GTV = loaded(input_ids=whole_GT, use_cache=False).logits[:, len(group.prompt_ids) - 1 : -1]
        loss_GT = torch.nn.functional.cross_entropy(
            logits_GTV.transpose(1, 2).float(), whole_GT[:, len(group.prompt_ids) :], reduction="none"
        )
        loss_GT.mean().backward()
    took = {"seconds": time.perf_counter() - started, "processor": time.process_time() - processor}
    responses = sum(len(response) for group in groups for response in group.responses)
    prompts = sum(len(group.prompt_ids) * len(group.responses) for group in groups)
    return {**took, "response_tokens": responses, "tokens": prompts + responses}


def commands(model: str, folder: Path, sizes: Sizes) -> dict[str, list[str]]:
    """Row name -> command, in running order; the folder holds the problems and gets all output."""
    pool, bench, store = (str(folder / name) for name in ("pool.jsonl", "bench.jsonl", "store"))
    rolled = {name: str(folder / f"{name}-rollouts.jsonl") for name in ("pool", "bench")}
    of = ["--model", model]
    sampled = [*of, "--reward", "benchmarks.real:even", "--max-new-tokens", str(sizes.tokens)]
    pairs = ["--pool", "pool", "--against", "bench"]
    both = [*pairs, "--rollouts", rolled["pool"], "--benchmark-rollouts", rolled["bench"], *of]
    where = ["--pool", pool, "--benchmark", f"bench={bench}", "--out", str(folder / "run")]
    n, picks = str(sizes.rollouts), str(sizes.pool // 3)
    looked = [f"candidates={sizes.pool}", f"selected={picks}", f"train_batch={picks}"]
    looked += [f"rollouts={n}", f"target_rollouts={n}"]
    us = [sys.executable, "-m", "gradstore"]
    loads = "import sys; from gradstore.engine.gradients.models import load_model; load_model(sys.argv[1])"
    return {
        "load": [sys.executable, "-c", loads, model],
        "rollout": [*us, "rollout", pool, "--out", rolled["pool"], "-n", n, *sampled],
        "rollout, benchmark": [*us, "rollout", bench, "--out", rolled["bench"], "-n", n, *sampled],
        "plain": [sys.executable, "-m", "benchmarks.real", "--model", model, "--plain", rolled["pool"]],
        "collect": [*us, "collect", store, "pool", rolled["pool"], *of, "--accept-coverage", "0"],
        "collect, benchmark": [*us, "collect", store, "bench", rolled["bench"], *of],
        "query": [*us, "query", store, *pairs],
        "select": [*us, "select", store, *pairs, "-n", picks, "--out", str(folder / "selected")],
        "fidelity": [*us, "fidelity", store, *both],
        "probe": [*us, "probe", store, *both],
        "train": [*us, "train", *sampled, *where, "--train-rollouts", n, *looked, *ROUND],
        "report": [*us, "report", str(folder / "run" / "store"), "--out", str(folder / "report.html")],
    }


def figures(found: dict[str, Outcome]) -> Iterator[dict[str, Any]]:
    """Yield a row per command: status, times in seconds, peak GB, and if defined tokens per second and x plain."""
    load, passes = found["load"], {} if found["plain"].status else json.loads(found["plain"].out)
    for name, done in found.items():
        took = {"seconds": done.seconds, "processor": done.processor}
        row: dict[str, Any] = {"command": name, "status": done.status, **took, "gb": done.peak / 1e9}
        tokens = {"rollout": "response_tokens", "collect": "tokens", "plain": "tokens"}.get(name)
        if passes and tokens:
            row["tokens_per_second"] = passes[tokens] / done.seconds
        if passes and name == "collect":
            row["x_plain"] = (done.processor - load.processor) / passes["processor"]
        yield row


def run(model: str, folder: Path, sizes: Sizes) -> dict[str, Outcome]:
    """Run every command and return the outcomes; a failure is reported at once, and the next command still runs."""
    for name, n, first in (("pool", sizes.pool, 0), ("bench", sizes.benchmark, sizes.pool)):
        lines = [json.dumps(record) + "\n" for record in problems(n, first)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    found = {}
    for name, command in commands(model, folder, sizes).items():
        done = found[name] = outcome(command)
        took = f"{done.seconds:.0f} s, {done.processor:.0f} CPU s, {done.peak / 1e9:.2f} GB"
        say(f"{name}: status {done.status}, {took}")
        if done.status:
            say(done.said[-3000:])
    return found


def main(
    model: Annotated[str, typer.Option(help="Folder or name of a transformers causal LM.")] = "",
    shape: Annotated[str, typer.Option(help=f"Random weights instead: {', '.join(SHAPES)}.")] = "",
    tokenizer: Annotated[str, typer.Option(help="Folder of the tokenizer beside random weights.")] = "",
    pool: Annotated[int, typer.Option(min=4, max=60, help="Problems of the pool.")] = 12,
    benchmark: Annotated[int, typer.Option(min=1, max=20, help="Problems of the benchmark.")] = 4,
    rollouts: Annotated[int, typer.Option(min=2, help="Responses to each.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 24,
    out: Annotated[Path | None, typer.Option(help="File to append the rows to, as JSON lines.")] = None,
    plain_: Annotated[str, typer.Option("--plain", hidden=True, help="Time plain passes over these rollouts.")] = "",
) -> None:
    """Run all commands and print the table."""
    if plain_:
        print(json.dumps(plain(model, plain_)))
        return
    if bool(model) == bool(shape) or (shape and (shape not in SHAPES or not tokenizer)):
        raise typer.BadParameter(f"give --model, or --shape ({', '.join(SHAPES)}) with --tokenizer")
    with tempfile.TemporaryDirectory() as folder:
        if shape:
            model = str(Path(folder, "model"))
            save_random(shape, tokenizer, model)
        rows = list(figures(run(model, Path(folder), Sizes(pool, benchmark, rollouts, tokens))))
    label = shape or Path(model).name
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"model": label, **row}) + "\n" for row in rows)
    columns = ["command", "status", "seconds", "CPU s", "peak GB", "tokens/s", "x plain"]
    print_table(label, columns, [_cells(row) for row in rows], right=columns[1:])
    if any(row["status"] for row in rows):
        raise typer.Exit(1)


def _cells(row: dict[str, Any]) -> list[str]:
    optional = [f"{row[name]:.{digits}f}" if name in row else "" for name, digits in _OPTIONAL.items()]
    times = [f"{row[name]:.0f}" for name in ("seconds", "processor")]
    return [row["command"], str(row["status"]), *times, f"{row['gb']:.2f}", *optional]


_OPTIONAL = {"tokens_per_second": 0, "x_plain": 1}
"""Optional figures of a row -> digits shown."""


if __name__ == "__main__":
    typer.run(main)
