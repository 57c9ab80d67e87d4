"""Peak memory of `collect` on each of torchrun's ranks, compared with one process.

    python -m benchmarks.two_ranks --model FOLDER [--problems 4] [--ranks 2]

Counted: a process's largest resident size (weights, activations, buffers of communication, pages of files) above its
own base, which is its largest resident size when torch, transformers and the model's code are imported. Problems are
those of `benchmarks/memory.py`; the basis is random, so that nothing is fitted. Default settings otherwise: on a CPU
the ranks of a sharded model divide the memory for activations among them. The ranks run twice: with the whole model
gathered for a pass, and layer by layer (engine/gradients/sharding.py says which of the two is the default).
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.memory import problems, rollouts
from gradstore.cli.show import print_table
from gradstore.engine.gradients.models import load_tokenizer
from gradstore.engine.rollouts.write import write_rollouts

_FIRST = "benchmarks.two_ranks.told"
"""First argument of a process that collects and writes down its peak."""


def main(
    model: Annotated[str, typer.Option(help="Folder of a transformers causal LM.")],
    n_problems: Annotated[int, typer.Option("--problems", min=2, help="Problems.")] = 4,
    ranks: Annotated[int, typer.Option(min=2, help="Ranks of the sharded model.")] = 2,
) -> None:
    """Print the table."""
    rows, one = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        rolled = Path(folder, "rollouts.jsonl")
        with write_rollouts(rolled) as writer:
            writer.append(rollouts(problems(n_problems), 8, load_tokenizer(model)))
        for n, way in ((1, "whole"), (ranks, "whole"), (ranks, "by layer")):
            several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
            name = f"{n}-{way.split()[-1]}"
            store, told = Path(folder, f"store-{name}"), Path(folder, f"told-{name}")
            settings = ["--model", model, "--basis", "random", "--rank", "4", "--accept-coverage", "0"]
            command = [sys.executable, *several, __file__, _FIRST, way, str(told), str(store), "pool", str(rolled)]
            started = time.monotonic()
            subprocess.run([*command, *settings], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            took = time.monotonic() - started
            peaks = [float(file.read_text(encoding="utf-8")) for file in sorted(Path(folder).glob(f"told-{name}.*"))]
            one = one or max(peaks)
            each = ", ".join(f"{peak / 1e6:.0f}" for peak in peaks)
            rows.append([str(n), way, each, f"{max(peaks) / one:.2f}", f"{took:.0f}"])
    columns = ["processes", "weights", "peak MB above the base, of each", "largest x one", "seconds"]
    print_table("Memory of collect", columns, rows, right=columns[2:])


def collect_and_tell(way: str, told: str, *arguments: str) -> None:
    """Run `collect` with these arguments in this process, then write its peak above its base to a file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from gradstore.engine.gradients import sharding

    sharding._has_room = lambda model: way == "whole"
    folder = arguments[arguments.index("--model") + 1]
    AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(folder, trust_remote_code=False))]
    from gradstore.cli import main as gradstore

    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.argv = ["gradstore", "collect", *arguments]
    try:
        gradstore()
    except SystemExit as stop:
        if stop.code:
            raise
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path(f"{told}.{os.environ.get('RANK', '0')}").write_text(str((peak - base) * 1024), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == [_FIRST]:
        collect_and_tell(*sys.argv[2:])
    else:
        typer.run(main)
