"""Cost of fitting and measuring a projection, in units of one problem's sketch; a benchmark's collect; several ranks.

    python -m benchmarks.fitting [--repeats 5]
    python -m benchmarks.fitting --model FOLDER --rollouts pool.jsonl --benchmark-rollouts bench.jsonl
    python -m benchmarks.fitting --ranks 2

One process runs every job once per repeat; ratios are within a repeat, shown as median and range. The unit is the time
to sketch one problem, from sketches of `--problems` problems. This is also the size of the sample: three quarters are
fitted to, one quarter is held out and measured (`collect` does the same, with 88). Without `--model`, a model of the
demo's shape has random weights. Without `--rollouts`, responses are random tokens; this gives valid times but no
meaningful correlation.

--quick, for models whose jobs take minutes: no warm-up run, the unit from 16 problems, and no row for the fit alone or
with a benchmark.

--ranks: the fit alone, by one process and by this many FSDP2 ranks (gloo) that share the sample, one thread each. Every
repeat starts new processes; each times only its fit, from a barrier on.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import typer
from torch import nn
from torch.distributed.fsdp import fully_shard

from benchmarks.sketch import Shape, _qwen2
from benchmarks.timing import interleaved
from gradstore.cli.show import print_table
from gradstore.engine import Sketcher, SketchSpec, collect
from gradstore.engine.assessing.refit import ENOUGH, FirstFit, first_fit, parts
from gradstore.engine.gradients.models import load_model, load_tokenizer, vocabulary_size
from gradstore.engine.rollouts import Group, read_rollouts
from gradstore.engine.sketches.bases import create_store
from gradstore.engine.sketches.fitting import fit

DEMO = Shape(_qwen2(128, 256, 3, 4, 64), 0, 16, 24, 8)
UNIT = "sketches"
_FEW = 16
"""Problems used to measure the unit with `--quick`."""


def main(
    model: Annotated[str, typer.Option(help="Folder or name of a transformers causal LM [the demo's shape].")] = "",
    rollouts: Annotated[str, typer.Option(help="Rollouts of the pool [random tokens].")] = "",
    benchmark_rollouts: Annotated[str, typer.Option(help="Rollouts of the benchmark [random tokens].")] = "",
    problems: Annotated[int, typer.Option(min=16, help="Problems fitted to and measured.")] = ENOUGH,
    benchmark: Annotated[int, typer.Option(min=2, help="Problems of the benchmark.")] = 64,
    group: Annotated[int, typer.Option(min=2, help="Rollouts of a problem of random tokens.")] = 16,
    prompt: Annotated[int, typer.Option(min=1, help="Their prompt, in tokens.")] = DEMO.n_prompt,
    response: Annotated[int, typer.Option(min=1, help="Their response, in tokens.")] = DEMO.n_response,
    rank: Annotated[int, typer.Option(min=1, help="Width of each side.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats that count; one more does not.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    quick: Annotated[bool, typer.Option(help="Fewer jobs, each run --repeats times and no more.")] = False,
    ranks: Annotated[int, typer.Option(min=1, help="Compare one process with so many ranks instead.")] = 1,
    rank_number: Annotated[int, typer.Option("--rank-number", hidden=True)] = -1,
    meeting: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print the table."""
    if ranks > 1 and rank_number < 0:
        print_ranks(ranks, repeats, quick)
        return
    torch.set_num_threads(threads)
    policy = load_model(model) if model else DEMO.random_model()
    shape = Shape({}, 0, group, prompt, response)
    pool = _groups(rollouts, model, policy, problems, shape, 1)
    bench = _groups(benchmark_rollouts, model, policy, benchmark, shape, 2)
    spec = SketchSpec(rank=rank, basis="fitted", dim=1024)
    if rank_number >= 0:
        print(json.dumps(as_rank(policy, parts(pool)[1], spec, ranks, rank_number, meeting)))
        return
    print_costs(policy, spec, pool, bench, repeats, quick)


def print_costs(
    policy: nn.Module, spec: SketchSpec, pool: list[Group], bench: list[Group], repeats: int, quick: bool
) -> None:
    """Print costs of the fit, its measurement and a benchmark's collect, and the quality of the fit."""
    found: dict[str, FirstFit] = {}
    sketcher = (
        Sketcher(policy, spec, fit(policy, pool[:_FEW], spec).projection)
        if quick
        else first_fit(policy, spec, pool).sketcher
    )
    unit = pool[:_FEW] if quick else pool
    steps = iter(range(1_000_000))
    with tempfile.TemporaryDirectory() as folder:
        store = create_store(Path(folder) / "store", sketcher)
        store.add_problems("bench", [{"id": group.problem_id, "prompt": "?"} for group in bench])
        store.add_problems("pool", [{"id": group.problem_id, "prompt": "?"} for group in pool])
        collect(store, "pool", pool[:8], sketcher=sketcher, step=0, accept_coverage=0.0)  # weights may be random

        def measured(name: str, benchmark: list[Group]) -> None:
            found[name] = first_fit(policy, spec, pool, benchmark)

        held_out, fitted_to = parts(pool)
        jobs: dict[str, Callable[[], object]] = {
            UNIT: lambda: sketcher.sketch(unit),
            f"fit to {len(fitted_to)}, measure on {len(held_out)}": lambda: measured("alone", []),
            f"sketches of {len(bench)} of a benchmark": lambda: sketcher.sketch(bench),
            "its collect": lambda: collect(store, "bench", bench, sketcher=sketcher, step=next(steps)),
        }
        if not quick:
            jobs[f"fit to {len(fitted_to)}"] = lambda: fit(policy, fitted_to, spec)
            jobs[f"the same with {len(bench)} of a benchmark"] = lambda: measured("benchmark", bench)
        seconds = interleaved(jobs, repeats, warm=0 if quick else 1)
    one = seconds[UNIT] / len(unit)
    rows = [[name, f"{np.median(took):.2f}", *_spread(took / one, 0)] for name, took in seconds.items() if name != UNIT]
    rows.append(
        [
            "its collect / its sketches",
            "",
            *_spread(seconds["its collect"] / seconds[f"sketches of {len(bench)} of a benchmark"], 3),
        ]
    )
    columns = ["what", "seconds", "in sketches of one problem", "range"]
    print_table(f"Fit and measure, {len(pool)} problems", columns, rows, right=columns[1:])
    rows = []
    for name, first in found.items():
        projection = first.sketcher.projection
        fidelity = "" if projection.fidelity is None else f"{projection.fidelity:.4f}"
        rows.append([name, f"{projection.captured:.4f}", fidelity])
    columns = ["fitted", "energy held", "Spearman on problems held out"]
    print_table(f"{sketcher.dim} dimensions", columns, rows, right=columns[1:])


def print_ranks(ranks: int, repeats: int, quick: bool) -> None:
    """Print times of the fit by one process and by several ranks, measured alternately."""
    told: dict[int, dict] = {}

    def run(world: int) -> float:
        told[world] = _started(world)
        return float(told[world]["seconds"])

    names = {1: "one process", ranks: f"{ranks} ranks"}
    seconds = interleaved(
        {name: lambda world=world: run(world) for world, name in names.items()}, repeats, warm=0 if quick else 1
    )
    rows = []
    for world, name in names.items():
        took, about = seconds[name], told[world]
        ratio = _spread(took / seconds[names[1]], 2)
        rows.append([name, f"{np.median(took):.2f}", *ratio, f"{about['captured']:.4f}", about["same"]])
    columns = ["fit by", "seconds", "x one process", "range", "energy held", "same bases on all ranks"]
    print_table("A fit divided over ranks", columns, rows, right=columns[1:5])


def as_rank(policy: nn.Module, groups: list[Group], spec: SketchSpec, world: int, rank: int, meeting: str) -> dict:
    """Fit as one of the ranks; returns seconds (from a barrier on), digest and captured energy."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        for layer in policy.model.layers:
            fully_shard(layer)
        fully_shard(policy)
        dist.barrier()
    started = time.perf_counter()
    projection = fit(policy, groups, spec).projection
    took = time.perf_counter() - started
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return {"seconds": took, "digest": projection.digest(), "captured": projection.captured}


def _started(world: int) -> dict:
    """Start this command once per rank; returns the results with the slowest rank's seconds."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        given = [*sys.argv[1:], "--ranks", str(world), "--meeting", str(Path(folder) / "meeting"), "--rank-number"]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.fitting", *given, str(rank)],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a rank failed")
    found = [json.loads(text.strip().rpartition("\n")[2]) for text in said]
    same = "yes" if len({one["digest"] for one in found}) == 1 else "NO"
    return {**found[0], "seconds": max(one["seconds"] for one in found), "same": same}


def _groups(path: str, model: str, policy: nn.Module, n: int, shape: Shape, seed: int) -> list[Group]:
    """The first n groups with a signal of a rollout file, or random ones."""
    if path:
        source = read_rollouts(path, tokenizer=load_tokenizer(model), vocabulary=vocabulary_size(model))
        return [group for group in source.groups() if group.has_signal][:n]
    return shape.random_groups(n, seed, policy.get_input_embeddings().weight.shape[0])


def _spread(values: np.ndarray, digits: int) -> list[str]:
    """(median, minimum to maximum) as text."""
    return [f"{np.median(values):.{digits}f}", f"{values.min():.{digits}f}-{values.max():.{digits}f}"]


if __name__ == "__main__":
    typer.run(main)
