"""Peak memory and processor time of `collect` on each of torchrun's ranks, compared with one process.

    python -m benchmarks.two_ranks --model FOLDER [--problems 4] [--ranks 2] [--keep FILE]
    python -m benchmarks.two_ranks --random 1024x16 ...        # a Llama with random weights of this width and depth
    python -m benchmarks.two_ranks --basis fitted ...          # `begin` fits the basis to the same problems

Counted for each stage: a process's largest resident size (weights, activations, buffers of communication, pages of
files) above its size when torch, transformers and the model's code are imported. `load`: the model. `begin`: the new
store; one process measures there what share of the gradient the sketch sees, which takes the gradients of all
weights; the ranks of a sharded model do not. `sketch`: the rest, the same work for both. Linux only: the kernel's
peak is reset between stages. Problems are those of `benchmarks/memory.py`; a random basis is not fitted. The ranks
run with the weights gathered layer by layer, which is what they do on a CPU, and with the whole model gathered.

Each run has a limit of time. With --keep, runs that ended are read from the file, so that the command can go on.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import gradstore
from benchmarks import tiny
from benchmarks.memory import problems, rollouts
from gradstore.cli.show import print_table, say
from gradstore.engine.gradients.models import load_tokenizer
from gradstore.engine.rollouts.write import write_rollouts

_FIRST = "benchmarks.two_ranks.told"
"""First argument of a process that collects and writes down what it took."""
_STAGES = ("load", "begin", "sketch")


def main(
    model: Annotated[str | None, typer.Option(help="Folder of a transformers causal LM.")] = None,
    random: Annotated[str | None, typer.Option(help="WIDTHxLAYERS of a Llama with random weights instead.")] = None,
    n_problems: Annotated[int, typer.Option("--problems", min=2, help="Problems.")] = 4,
    n_rollouts: Annotated[int, typer.Option("--rollouts", min=2, help="Responses to each of them.")] = 8,
    ranks: Annotated[int, typer.Option(min=2, help="Ranks of the sharded model.")] = 2,
    basis: Annotated[str, typer.Option(help="Basis of the sketches: random or fitted.")] = "random",
    ways: Annotated[str, typer.Option(help="How ranks gather weights: layers, whole, or both, by commas.")] = "layers",
    limit: Annotated[float, typer.Option(help="Seconds that a run may take.")] = 1200,
    keep: Annotated[Path | None, typer.Option(help="File of the runs that ended, read and written.")] = None,
) -> None:
    """Print the table."""
    kept: dict[str, list[dict]] = json.loads(keep.read_text(encoding="utf-8")) if keep and keep.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        source = model or str(_random_model(Path(folder, "model"), *map(int, str(random).split("x"))))
        rolled = Path(folder, "rollouts.jsonl")
        with write_rollouts(rolled) as writer:
            writer.append(rollouts(problems(n_problems), n_rollouts, load_tokenizer(source)))
        size = f"{model or random}, {n_problems} x {n_rollouts}, {basis}"
        for n, way in (*((ranks, way) for way in ways.split(",")), (1, "whole")):
            name = f"{size}, {n} {way}"
            if name in kept:
                continue
            say(f"{name}, load {os.getloadavg()[0]:.0f}")
            found = _run(Path(folder), source, rolled, n, way, basis, limit)
            if found is None:
                say(f"{name}: not ended after {limit:.0f} s")
                continue
            kept[name] = found
            if keep:
                keep.write_text(json.dumps(kept), encoding="utf-8")
        _print(size, {name: found for name, found in kept.items() if name.startswith(f"{size}, ")})


def _run(folder: Path, model: str, rolled: Path, n: int, way: str, basis: str, limit: float) -> list[dict] | None:
    """What each rank told, in their order; None if the run met its limit."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    store, told = folder / f"store-{n}-{way}", folder / f"told-{n}-{way}"
    settings = ["--model", model, "--basis", basis, "--rank", "4", "--accept-coverage", "0", "--dtype", "fp32"]
    command = [
        sys.executable,
        *several,
        "-m",
        "benchmarks.two_ranks",
        _FIRST,
        way,
        str(told),
        str(store),
        "pool",
        str(rolled),
        *settings,
    ]
    started = time.monotonic()
    run = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    try:
        status = run.wait(limit)
    except subprocess.TimeoutExpired:
        run.terminate()  # torchrun passes it on to its ranks, which have sessions of their own
        with suppress(subprocess.TimeoutExpired):
            run.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        return None
    if status:
        raise typer.Exit(1)
    own = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(f"{told.name}.*"))]
    view = gradstore.open(store).view("pool")
    rows = np.concatenate([units for _, units in view.blocks()]) * view.norms[:, None]
    order = np.argsort(view.ids)
    own[0] |= {"seconds": time.monotonic() - started, "rows": rows[order, : 1 << 10].tolist()}
    return own


def _print(size: str, kept: dict[str, list[dict]]) -> None:
    rows: list[list[str]] = []
    one = next((found for name, found in kept.items() if name.startswith(f"{size}, 1 ")), None)
    for name, found in kept.items():
        n, way = name.removeprefix(f"{size}, ").split()
        peaks = {stage: max(own["peaks"][stage] for own in found) for stage in _STAGES}
        row = [n, way, *(f"{peaks[stage] / 1e6:,.0f}" for stage in _STAGES)]
        if one is None:
            row += ["", "", ""]
        else:
            base, expected = one[0]["peaks"], np.array(one[0]["rows"])
            off = np.abs(np.array(found[0]["rows"]) - expected).max() / np.abs(expected).max()
            row += [
                f"{peaks['sketch'] / base['sketch']:.2f}",
                f"{max(peaks.values()) / max(base.values()):.2f}",
                f"{off:.0e}",
            ]
        processor = " + ".join(f"{sum(own['processor'].values()):.0f}" for own in found)
        rows.append([*row, processor, f"{found[0]['seconds']:.0f}"])
    columns = ["processes", "weights", *(f"{stage} MB" for stage in _STAGES), "sketch x one", "largest x one"]
    columns += ["rows off by", "processor s", "wall s"]
    print_table(f"Peaks of collect: {size}", columns, rows, right=columns[2:])


def _random_model(folder: Path, width: int, layers: int) -> Path:
    """A Llama of 32,000 tokens in bfloat16, with the tokenizer of the tests."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    made = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    made.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    say(f"{sum(parameter.numel() for parameter in made.parameters()) / 1e6:.0f}M random weights")
    return folder


class _Meter:
    """Peak resident size and processor time of the stages of this process."""

    def __init__(self) -> None:
        self._base, self._begun = self._size("VmRSS"), time.process_time()
        self.peaks = dict.fromkeys(_STAGES, 0)
        self.processor = dict.fromkeys(_STAGES, 0.0)
        self._reset()

    def of(self, stage: str, function: Callable) -> Callable:
        """The function, after which what was taken since the last mark is counted for this stage."""

        @wraps(function)
        def measured(*given: Any, **named: Any) -> Any:
            try:
                return function(*given, **named)
            finally:
                self.mark(stage)

        return measured

    def mark(self, stage: str) -> None:
        """Count what was taken since the last mark for this stage."""
        self.peaks[stage] = max(self.peaks[stage], self._size("VmHWM") - self._base)
        self.processor[stage] += time.process_time() - self._begun
        self._reset()
        self._begun = time.process_time()

    @staticmethod
    def _size(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    @staticmethod
    def _reset() -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def collect_and_tell(way: str, told: str, *arguments: str) -> None:
    """Run `collect` with these arguments in this process, then write what its stages took to a file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from gradstore.engine.assessing import start
    from gradstore.engine.gradients import sharding

    if way == "whole":
        sharding._has_room = lambda model: True
    folder = arguments[arguments.index("--model") + 1]
    AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(folder, trust_remote_code=False))]
    from gradstore.cli import main as gradstore_main

    meter = _Meter()
    command: Any = import_module("gradstore.cli.collect")
    command.load_policy = meter.of("load", command.load_policy)
    start.start_store = meter.of("begin", start.start_store)
    sys.argv = ["gradstore", "collect", *arguments]
    try:
        gradstore_main()
    except SystemExit as stop:
        if stop.code:
            raise
    meter.mark("sketch")
    taken = {"peaks": meter.peaks, "processor": meter.processor}
    Path(f"{told}.{os.environ.get('RANK', '0')}").write_text(json.dumps(taken), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == [_FIRST]:
        collect_and_tell(*sys.argv[2:])
    else:
        typer.run(main)
