"""Accuracy of `plan`: planned against measured peak memory, and time of each stage relative to a plain pass.

    python -m benchmarks.plan [--shapes demo,13.8m,63m,smollm2-135m,qwen2.5-0.5b] [--repeats 3]

Random weights in float32 on a CPU. Each memory measurement runs in a separate process. It is the peak minus the
process's size before the model was made, so it includes the weights. Times are processor times of interleaved stages;
ratios are to a plain forward and backward pass with all weight gradients over the same rollouts, as medians over the
repeats.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.sketch import PLAIN, SHAPES, Bench, Shape, _kilobytes
from gradstore.cli.show import print_table
from gradstore.engine import Sketcher, SketchSpec, fit_projection, layer_gradients
from gradstore.engine.gradients.exact import exact_against
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.microbatch import pack, rollouts_of
from gradstore.engine.gradients.objectives import objective
from gradstore.engine.planning import costs, memory
from gradstore.engine.planning.costs import Work, Workload
from gradstore.engine.planning.devices import Hardware, hardware
from gradstore.engine.planning.shapes import KNOWN, ModelShape, measured_shape
from gradstore.engine.sketches.fitting import passed

SKETCH, EXACT, FORWARD, FIT = "sketch", "exact gradients", "forward", "fit"
_BENCHMARK = 2
"""Number of benchmark problems for exact scores."""
_DEMO: dict[str, Any] = {
    **KNOWN["SmolLM2-135M"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
}
MEASURED = {
    "demo": Shape(_DEMO, 8, 16, 32, 32),
    "13.8m": SHAPES["13.8m"],
    "63m": SHAPES["63m"],
    "smollm2-135m": Shape(KNOWN["SmolLM2-135M"], 2, 16, 100, 100),
    "qwen2.5-0.5b": Shape(KNOWN["Qwen2.5-0.5B"], 2, 8, 100, 100),
}


def ways(bench: Bench) -> dict[str, Callable[[], object]]:
    """Stage name -> function that runs it over the bench's rollouts, with micro-batches as large as memory allows."""
    model, groups = bench.model, bench.groups
    spec = SketchSpec(basis="fitted")
    sketcher = Sketcher(model, SketchSpec(rank=memory.wide(spec.rank)))
    runner = GradientPass(model, spec)
    shared = runner.policy.shares_prompts
    batches = list(pack(rollouts_of(groups, objective("gradalign")), runner.budget.tokens(), shared))
    return {
        PLAIN: bench.plain,
        SKETCH: lambda: sketcher.sketch(groups),
        EXACT: lambda: layer_gradients(model, groups, spec),
        FORWARD: lambda: [runner.policy.logprobs(batch) for batch in batches],
        FIT: lambda: fit_projection(model, groups, spec),
    }


def planned_work(shape: ModelShape, load: Workload, rank: int) -> dict[str, Work]:
    """Work of the same stages according to `plan`; a plain pass repeats prompts and computes logits everywhere."""
    return {
        PLAIN: costs.weight_gradients(shape, load, sharing=False, head_everywhere=True),
        SKETCH: costs.sketch(shape, load, memory.wide(rank)),
        EXACT: costs.weight_gradients(shape, load),
        FORWARD: costs.forward(shape, load),
        FIT: costs.one_sided(shape, load, rank).times(passed(load.n_problems) / load.n_problems),
    }


def planned_memory(shape: ModelShape, load: Workload, rank: int, device: Hardware) -> dict[str, int]:
    """Planned peak bytes per stage, weights included."""
    tokens = memory.recommended_tokens(shape, device)
    one, benchmark = (replace(load, n_problems=n) for n in (1, _BENCHMARK))
    return {
        SKETCH: memory.sketching(shape, load, tokens.sketching, rank, device),
        EXACT: memory.forming(shape, one, benchmark, tokens.with_inputs, device),
        FIT: memory.fitting(shape, load, tokens.with_inputs, rank, device),
    }


def held(name: str, stage: str) -> int:
    """Peak bytes of this process while the stage runs, minus those before the model was made."""
    tiny = Bench(SHAPES["tiny"], "cpu", 2048, 8)
    ways(tiny)[SKETCH]()  # so that everything is imported before the measurement
    before = _kilobytes("VmRSS")
    bench = Bench(MEASURED[name], "cpu", 2048, 8)
    job = ways(bench)[stage]
    if stage == EXACT:  # `fidelity` runs this; `layer_gradients` would keep every layer's matrix as its result
        job = lambda: exact_against(bench.model, bench.groups[:_BENCHMARK], bench.groups)  # noqa: E731
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    job()
    return 1024 * (_kilobytes("VmHWM") - before)


def timed(bench: Bench, repeats: int) -> dict[str, float]:
    """Each stage's processor time over the plain pass's in the same repeat, median."""
    jobs, rounds = ways(bench), []
    for number in range(repeats + 1):  # the first is not counted
        seconds = {}
        for stage, job in jobs.items():
            started = time.process_time()
            job()
            seconds[stage] = time.process_time() - started
        if number:
            rounds.append(seconds)
    return {stage: float(np.median([each[stage] / each[PLAIN] for each in rounds])) for stage in jobs}


def _row(shape: str, what: str, measured: float, planned: float, unit: str) -> list[str]:
    return [shape, what, f"{measured:.2f}{unit}", f"{planned:.2f}{unit}", f"{planned / measured - 1:+.0%}"]


def main(
    shapes: Annotated[str, typer.Option(help="Shapes, parted by commas.")] = ",".join(MEASURED),
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    one: Annotated[str, typer.Option(hidden=True, help="Print the bytes that this stage held at most.")] = "",
) -> None:
    """Print measured and planned values, with the plan's relative error."""
    torch.set_num_threads(threads)
    if one:
        print(held(shapes, one))
        return
    device, rank, rows = hardware("cpu"), SketchSpec().rank, []
    for name in shapes.split(","):
        rollouts = MEASURED[name]
        load = Workload(rollouts.n_problems, rollouts.n_rollouts, rollouts.n_prompt, rollouts.n_response)
        bench = Bench(rollouts, "cpu", 2048, 8)
        shape = measured_shape(bench.model, name)
        seconds = {stage: work.seconds(device) for stage, work in planned_work(shape, load, rank).items()}
        found = timed(bench, repeats)
        for stage in (SKETCH, EXACT, FORWARD):
            rows.append(_row(name, f"{stage} / plain", found[stage], seconds[stage] / seconds[PLAIN], ""))
        rows.append(_row(name, f"{FIT} / {SKETCH}", found[FIT] / found[SKETCH], seconds[FIT] / seconds[SKETCH], ""))
        del bench
        for stage, planned in planned_memory(shape, load, rank, device).items():
            command = [sys.executable, "-m", "benchmarks.plan", "--shapes", name, "--one", stage]
            command += ["--threads", str(threads)]
            bytes_held = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
            rows.append(_row(name, f"memory, {stage}", bytes_held / 1e6, planned / 1e6, " MB"))
        print("\n".join(" | ".join(row) for row in rows[-7:]), file=sys.stderr, flush=True)
    columns = ["shape", "what", "measured", "planned", "error"]
    print_table("plan against measurements", columns, rows, right=columns[2:])


if __name__ == "__main__":
    typer.run(main)
