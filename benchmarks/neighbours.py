"""How long `collect` takes beside other jobs that train with torch, with its own threads and with one.

    python -m benchmarks.neighbours [--jobs 0,1,2] [--repeats 3] [--model FOLDER --rollouts FILE]

Each job trains a small network with torch's default number of threads, without end. Beside them `collect` sketches the
same 50 problems into new stores, in turns: as a user starts it, and with OMP_NUM_THREADS=1. The other load of the
machine meets both alike, so the ratio is what counts.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from gradstore.cli.show import print_line, print_table
from gradstore.demo import tasks
from gradstore.demo.run import MODEL
from gradstore.engine.gradients.models import load_model, load_tokenizer
from gradstore.trainer.sampling.backends.hugging_face import TransformersBackend
from gradstore.trainer.sampling.reward import Reward
from gradstore.trainer.sampling.rollout import rollout

GOAL = 1.6
"""Most that the time with its own threads may be of the time with one."""
_JOB = """
import torch
model = torch.nn.Sequential(*[layer for _ in range(4) for layer in (torch.nn.Linear(512, 512), torch.nn.GELU())])
optimizer = torch.optim.AdamW(model.parameters())
while True:
    model(torch.randn(256, 512)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def main(
    jobs: Annotated[str, typer.Option(help="Numbers of jobs beside it, by commas.")] = "0,1,2",
    repeats: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 3,
    model: Annotated[str, typer.Option(help="Folder of the model [the demo's].")] = str(MODEL),
    rollouts: Annotated[str, typer.Option(help="Rollouts [50 problems of the demo].")] = "",
    limit: Annotated[float, typer.Option(help="Seconds after which a run is ended and counts as that long.")] = 300,
) -> None:
    """Print the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(rollouts) if rollouts else _rollouts(Path(folder))
        for n_jobs in (int(text) for text in jobs.split(",")):
            with _training(n_jobs):
                times: dict[str, list[float]] = {"own": [], "one": []}
                for turn in range(repeats):
                    for name in times:
                        store = Path(folder) / f"{n_jobs}-{turn}-{name}"
                        times[name].append(_collect(store, file, model, name == "one", limit))
            own, one = (np.median(times[name]) for name in ("own", "one"))
            ranges = [f"{np.median(t):.1f} ({min(t):.1f}-{max(t):.1f})" for t in times.values()]
            rows.append([str(n_jobs), *ranges, f"{own / one:.2f}", f"{GOAL:.1f}"])
            print_line(f"{n_jobs} jobs: {ranges[0]} against {ranges[1]} s")
    columns = ["jobs beside it", "own threads, s", "one thread, s", "ratio", "goal"]
    print_table("collect beside training jobs", columns, rows, right=columns)
    print_line(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; medians and ranges of {repeats}")


def _rollouts(folder: Path) -> Path:
    """Rollouts of 50 problems of the demo, sixteen each, by the demo's model."""
    torch.set_num_threads(1)
    backend = TransformersBackend(load_model(MODEL, device="cpu"), load_tokenizer(MODEL), batch_tokens=16_384)
    reward = Reward("demo", tasks.reward)
    rollout(tasks.pool(0, 50), backend, reward, folder / "pool.jsonl", n=16, max_new_tokens=8, seed=0, step=0)
    return folder / "pool.jsonl"


@contextmanager
def _training(n_jobs: int) -> Iterator[None]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    started = [subprocess.Popen([sys.executable, "-c", _JOB], env=environment) for _ in range(n_jobs)]
    try:
        time.sleep(8 if n_jobs else 0)  # until they train
        yield
    finally:
        for job in started:
            job.kill()
            job.wait()


def _collect(store: Path, file: Path, model: str, one_thread: bool, limit: float) -> float:
    """Wall seconds of one `gradstore collect` into a new store."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if one_thread:
        environment["OMP_NUM_THREADS"] = "1"
    words = ["collect", str(store), "pool", str(file), "--model", model, "--accept-coverage", "0", "--quiet"]
    start = time.perf_counter()
    try:
        subprocess.run([sys.executable, "-m", "gradstore", *words], env=environment, check=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return limit
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
