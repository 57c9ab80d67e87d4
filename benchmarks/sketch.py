"""Cost of sketches in time and memory, relative to a plain forward and backward pass over the same rollouts.

    python -m benchmarks.sketch [--repeats 7] [--threads 2] [--token-budget 2048]
    python -m benchmarks.sketch --memory
    python -m benchmarks.sketch --device cuda --shape qwen2.5-1.5b

One process runs every method once per round. Ratios are to the plain pass of the same round, as median and spread.
Models have random weights. `smollm2-135m` and `qwen3-moe` (a small mixture of experts) are timed on 1 and 4 problems x
16 rollouts. The other models have the shape of Qwen2: `13.8m`, the default (hidden 384, 6 layers, intermediate 1536,
vocabulary 2000, float32, 8 problems x 8 rollouts, prompt 96 and response 96 tokens), and `qwen2.5-1.5b`, for a GPU
(bfloat16, 4 problems x 16 rollouts of 200 + 800 tokens). The plain pass takes 8 rollouts at a time (on a GPU 4); more
do not make it faster. Tokens per second count every rollout's prompt and response. Forward alone, and forward with
input-gradient backward, show the parts of a sketch's cost. If bergson is installed, its gradient collection (p = 16) is
timed too. To compare with it, use `--only bergson,sketch` in a separate environment:

    python -m venv BENCH && BENCH/bin/pip install -c constraints.txt torch==2.13.0
    BENCH/bin/pip install -c constraints.txt -e . bergson==2.5.1
    BENCH/bin/python -m benchmarks.sketch --only bergson,sketch [--problems 2]

--memory: peak memory of each method beyond the model, each in a separate process.
"""

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from gradstore.cli.show import print_table, say
from gradstore.engine import (
    Probe,
    Sketcher,
    SketchSpec,
    exact_dots,
    fit_projection,
    layer_gradients,
    validation_gradient,
)
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.microbatch import pack, rollouts_of
from gradstore.engine.gradients.objectives import advantages, objective
from gradstore.engine.rollouts import Group

PLAIN, APART, SHARED = "plain forward + backward", "sketch, prompts apart", "sketch, prompts shared"
BERGSON = "bergson, p = 16"
IN_MEMORY = (PLAIN, APART, SHARED, "one backward a problem")


@dataclass(frozen=True)
class Shape:
    """A model and the rollouts it is timed on."""

    model: dict[str, Any]
    """Settings of a transformers configuration, including `model_type`."""
    n_problems: int
    n_rollouts: int
    n_prompt: int
    n_response: int
    small: bool = True
    """Whether all methods are timed, including the probe and exact dots in float32."""

    @property
    def n_tokens(self) -> int:
        return self.n_problems * self.n_rollouts * (self.n_prompt + self.n_response)

    def random_model(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
        """A model of this shape with random weights (seed 0), in evaluation mode."""
        torch.manual_seed(0)
        with torch.device(device):
            model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**self.model))
        return model.to(dtype).eval()

    def random_groups(self, n: int, seed: int, vocabulary: int) -> list[Group]:
        """Groups of random tokens; half of each problem's rollouts have reward 1."""
        random = np.random.default_rng(seed)
        return [
            Group(
                f"p{i}",
                random.integers(0, vocabulary, self.n_prompt),
                [random.integers(0, vocabulary, self.n_response) for _ in range(self.n_rollouts)],
                random.permutation(np.arange(self.n_rollouts) % 2).astype(float),
            )
            for i in range(n)
        ]


def _qwen2(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }


_SMOLLM2_135M = {
    **_qwen2(576, 1536, 30, 9, 49_152),
    "model_type": "llama",
    "num_key_value_heads": 3,
}
_QWEN3_MOE = {
    **_qwen2(1024, 2048, 8, 16, 151_936),
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
}

SHAPES = {
    "tiny": Shape(_qwen2(64, 128, 2, 4, 500), 3, 4, 16, 24),
    "13.8m": Shape(_qwen2(384, 1536, 6, 6, 2000), 8, 8, 96, 96),
    "63m": Shape(_qwen2(1024, 4096, 4, 8, 2000), 8, 8, 96, 96),
    "smollm2-135m": Shape(_SMOLLM2_135M, 1, 16, 100, 100),
    "qwen3-moe": Shape(_QWEN3_MOE, 4, 16, 100, 100, small=False),
    "qwen2.5-1.5b": Shape(_qwen2(1536, 8960, 28, 12, 151_936), 4, 16, 200, 800, small=False),
}


class Bench:
    """A model, its rollouts, and the methods, each made on demand."""

    def __init__(self, shape: Shape, device: str, budget: int, plain_rollouts: int) -> None:
        self.shape, self.device, self.budget, self.plain_rollouts = shape, torch.device(device), budget, plain_rollouts
        self.model = shape.random_model(device, torch.float32 if device == "cpu" else torch.bfloat16)
        self.groups = self.make_groups(shape.n_problems)

    def make_groups(self, n: int, seed: int = 0) -> list[Group]:
        return self.shape.random_groups(n, seed, self.shape.model["vocab_size"])

    def methods(self) -> dict[str, Callable[[], Callable[[], object]]]:
        """Name -> factory of the method; the factory also prepares what the method needs."""
        found = {
            PLAIN: lambda: self.plain,
            "forward, prompts shared": self.forward,
            "forward + input gradients, shared": self.unobserved,
            APART: lambda: self.sketch(share_prompts=False),
            SHARED: self.sketch,
            "exact dots, prompts apart": self.exact,
            "one backward a problem": lambda: self.one_backward_a_problem,
        }
        if self.shape.small:
            found["sketch, shared, fitted"] = self.fitted
        if self.shape.small and self.device.type == "cpu":
            found["probe, base known"] = lambda: self.probe(known=True)
            found["probe, central"] = lambda: self.probe(known=False)
        if importlib.util.find_spec("bergson") is not None:
            found[BERGSON] = self.bergson
        return found

    def plain(self) -> None:
        """Forward and backward with all weight gradients."""
        for group in self.groups:
            for start in range(0, len(group.responses), self.plain_rollouts):
                self.loss(group, slice(start, start + self.plain_rollouts)).backward()
        self.model.zero_grad(set_to_none=True)

    def one_backward_a_problem(self) -> None:
        """GradAlign's scorer, as described in its paper: each problem's full gradient, its norm and its dot."""
        target = [torch.ones_like(parameter) for parameter in self.model.parameters()]
        for group in self.groups:
            for start in range(0, len(group.responses), self.plain_rollouts):
                self.loss(group, slice(start, start + self.plain_rollouts)).backward()
            gradients = [parameter.grad for parameter in self.model.parameters()]
            sum(float((g * t).sum()) for g, t in zip(gradients, target, strict=True) if g is not None)
            sum(float(g.square().sum()) for g in gradients if g is not None)
            self.model.zero_grad(set_to_none=True)

    def loss(self, group: Group, rows: slice) -> Tensor:
        ids = np.stack([np.concatenate([group.prompt_ids, response]) for response in group.responses[rows]])
        ids_GT = torch.from_numpy(ids).to(self.device)
        n_prompt = len(group.prompt_ids)
        logits_GTV = self.model(input_ids=ids_GT, use_cache=False).logits[:, n_prompt - 1 : -1]
        logprobs_GT = -nn.functional.cross_entropy(
            logits_GTV.transpose(1, 2).float(), ids_GT[:, n_prompt:], reduction="none"
        )
        weights_G = torch.from_numpy(advantages(group.rewards, "mean")[rows]).float().to(self.device)
        return -(weights_G[:, None] * logprobs_GT).mean()

    def sketch(self, **settings: Any) -> Callable[[], object]:
        sketcher = Sketcher(self.model, SketchSpec(token_budget=self.budget, **settings))
        return lambda: sketcher.sketch(self.groups)

    def fitted(self) -> Callable[[], object]:
        spec = SketchSpec(token_budget=self.budget, basis="fitted", dim=1024)
        sketcher = Sketcher(self.model, spec, fit_projection(self.model, self.make_groups(12, seed=1), spec))
        return lambda: sketcher.sketch(self.groups)

    def forward(self) -> Callable[[], object]:
        policy = GradientPass(self.model, SketchSpec()).policy
        rollouts = rollouts_of(self.groups, objective("gradalign"))
        batches = list(pack(rollouts, self.budget, policy.shares_prompts))
        return lambda: [policy.logprobs(batch.to(self.device)) for batch in batches]

    def unobserved(self) -> Callable[[], object]:
        runner = GradientPass(self.model, SketchSpec(token_budget=self.budget))
        return lambda: runner.run(self.groups, _Nothing())

    def exact(self) -> Callable[[], object]:
        spec = SketchSpec(token_budget=self.budget, share_prompts=False)
        targets = [layer_gradients(self.model, self.make_groups(2, seed=2), spec)]
        return lambda: exact_dots(self.model, self.groups, targets, spec)

    def probe(self, known: bool) -> Callable[[], object]:
        direction = validation_gradient(self.model, self.make_groups(2, seed=2))
        probe = Probe(self.model, direction, token_budget=self.budget)
        base = probe.logprobs(self.groups) if known else None
        return lambda: probe.derivatives(self.groups, base_logprobs=base)

    def bergson(self) -> Callable[[], object]:
        """bergson's collector and loop, set up as by `bergson build`, except that rows stay in memory.

        Weights are frozen and only the embedding requires a gradient; bergson's default of tokens per batch is used;
        projections are made once.
        """
        from bergson.collector.collector import CollectorComputer  # type: ignore[import-not-found]
        from bergson.collector.in_memory_collector import InMemoryCollector  # type: ignore[import-not-found]
        from bergson.config.config import IndexConfig  # type: ignore[import-not-found]
        from bergson.gradients import GradientProcessor  # type: ignore[import-not-found]
        from datasets import Dataset  # type: ignore[import-untyped]

        rows: dict[str, list] = {"input_ids": [], "labels": [], "advantage": [], "length": []}
        for group in self.groups:
            for response, advantage in zip(group.responses, advantages(group.rewards, "mean"), strict=True):
                rows["input_ids"].append([*group.prompt_ids.tolist(), *response.tolist()])
                rows["labels"].append([-100] * len(group.prompt_ids) + response.tolist())
                rows["advantage"].append(float(advantage))
                rows["length"].append(len(group.prompt_ids) + len(response))
        data = Dataset.from_dict(rows)
        at_once = max(1, 2048 // rows["length"][0])  # bergson's default of tokens per batch
        batches = [list(range(i, min(i + at_once, len(data)))) for i in range(0, len(data), at_once)]
        folder, processor = tempfile.mkdtemp(), GradientProcessor(projection_dim=16)
        logging.disable(logging.INFO)  # bergson logs its layers in every run

        def run() -> None:
            flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
            self.model.requires_grad_(False)
            self.model.get_input_embeddings().requires_grad_(True)  # type: ignore[operator]
            config = IndexConfig(run_path=folder, projection_dim=16, overwrite=True)
            Path(config.partial_run_path).mkdir(parents=True, exist_ok=True)
            collector = InMemoryCollector(model=self.model.base_model, data=data, cfg=config, processor=processor)
            computer = CollectorComputer(self.model, data, collector=collector, batches=batches, cfg=config)
            computer.run_with_collector_hooks()
            self.model.zero_grad(set_to_none=True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

        return run


class _Nothing:
    """An observer of no layers, so that only forward and input gradients are computed."""

    def on_input(self, layer: int, x_BTI: Tensor) -> None: ...

    def on_gradient(self, layer: int, kept: object, grad_BTO: Tensor, problem_B: Tensor) -> None: ...

    def reset(self) -> None: ...


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "13.8m",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 7,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    token_budget: Annotated[
        int | None, typer.Option(help="Tokens of a micro-batch, for all but the plain pass [2048; on a GPU 16384].")
    ] = None,
    processor_time: Annotated[bool, typer.Option("--processor-time", help="For a machine that others use.")] = False,
    only: Annotated[str, typer.Option(help="Methods whose names contain one of these, parted by commas.")] = "",
    problems: Annotated[int | None, typer.Option(help="Problems, where not the shape's own.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Measure memory instead of time.")] = False,
    one: Annotated[str, typer.Option(hidden=True, help="Print the bytes that this method held at most.")] = "",
) -> None:
    """Time every method against the plain pass."""
    if any(part and part in BERGSON for part in only.split(",")) and importlib.util.find_spec("bergson") is None:
        say(f"error: --only {only}: bergson is not installed here; the top of benchmarks/sketch.py says how")
        raise typer.Exit(2)
    torch.set_num_threads(threads)
    budget = token_budget or (2048 if device == "cpu" else 16_384)
    if memory:
        show_memory(["--shape", shape, "--device", device, "--threads", str(threads), "--token-budget", str(budget)])
        return
    chosen = SHAPES[shape] if problems is None else replace(SHAPES[shape], n_problems=problems)
    bench = Bench(chosen, device, budget, 8 if device == "cpu" else 4)
    if one:
        print(held(bench.methods()[one](), bench.device))
        return
    methods = {
        name: make()
        for name, make in bench.methods().items()
        if name == PLAIN or any(part in name for part in only.split(","))
    }
    clock = time.process_time if processor_time else time.perf_counter

    def seconds_of(job: Callable[[], object]) -> float:
        started = clock()
        job()
        if device != "cpu":
            torch.cuda.synchronize()
        return clock() - started

    for job in methods.values():
        seconds_of(job)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, job in methods.items():
            seconds[name].append(seconds_of(job))
    show_times(bench, seconds, threads)


def show_times(bench: Bench, seconds: dict[str, list[float]], threads: int) -> None:
    shape, rows = bench.shape, []
    for name, taken in seconds.items():
        ratio = np.array(taken) / np.array(seconds[PLAIN])
        spread = f"{ratio.min():.2f} to {ratio.max():.2f}"
        middle = float(np.median(taken))
        rows.append([name, f"{np.median(ratio):.3f}", spread, f"{middle:.2f}", f"{shape.n_tokens / middle:,.0f}"])
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"CPU, {threads} threads"
    print_table(
        f"{shape.n_problems} problems x {shape.n_rollouts} rollouts x ({shape.n_prompt} + {shape.n_response}) tokens, "
        f"micro-batches of {bench.budget}, {name}",
        ["method", "x plain", "spread", "seconds", "tokens/s"],
        rows,
        right=["x plain", "seconds", "tokens/s"],
    )
    for mine in (APART, SHARED):
        if BERGSON in seconds and mine in seconds:
            ratio = np.array(seconds[BERGSON]) / np.array(seconds[mine])
            spread = f"{ratio.min():.2f} to {ratio.max():.2f}, quartiles {np.quantile(ratio, 0.25):.2f} and "
            say(
                f"bergson takes {np.median(ratio):.2f} times ({spread}{np.quantile(ratio, 0.75):.2f}) as long as {mine}"
            )
    stages = ["forward, prompts shared", "forward + input gradients, shared", SHARED]
    if all(stage in seconds for stage in stages):
        forward, both, whole = (float(np.median(seconds[stage])) for stage in stages)
        parts = [forward / whole, (both - forward) / whole, (whole - both) / whole]
        say("a sketch with prompts shared is {:.0%} forward, {:.0%} backward, {:.0%} projections".format(*parts))


def show_memory(arguments: list[str]) -> None:
    """Print each method's peak memory, measured in a separate process, against the plain pass."""
    peaks = {}
    for name in IN_MEMORY:
        command = [sys.executable, "-m", "benchmarks.sketch", *arguments, "--one", name]
        peaks[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    rows = [[name, f"{peak / 2**20:.0f}", f"{peak / peaks[PLAIN]:.2f}"] for name, peak in peaks.items()]
    print_table("Memory beyond the model", ["method", "MiB", "x plain"], rows, right=["MiB", "x plain"])


def held(job: Callable[[], object], device: torch.device) -> int:
    """Peak bytes while the job runs, minus those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    before = _kilobytes("VmRSS")
    job()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(field: str) -> int:
    lines = Path(f"/proc/{os.getpid()}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    typer.run(main)
