"""Time of a query from the command line, start-up included, split into its parts.

    python -m benchmarks.query [--rows 20000] [--dim 4096] [--repeats 7]

Makes an int8 store of random rows in a temporary folder and runs `gradstore query` on it in new processes. This process
times, interleaved: the exact scan, reading the same bytes once, and decoding them once. Times have their spread.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import gradstore
from gradstore.cli.show import print_table
from gradstore.engine.searching.query import search


def main(
    rows: Annotated[int, typer.Option(help="Problems in the pool.")] = 20_000,
    dim: Annotated[int, typer.Option(help="Dimensions of a sketch.")] = 4096,
    repeats: Annotated[int, typer.Option(help="How often each is timed.")] = 7,
) -> None:
    """Time a query from the command line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        make_store(path, rows, dim)
        view = gradstore.open(path).view("pool")
        query = np.random.default_rng(1).normal(size=dim).astype(np.float32)
        codes = sorted(path.glob("collections/pool/*/codes/c*"))
        command = [sys.executable, "-m", "gradstore", "query", str(path), "--against", "bench", "--top", "20"]
        jobs: dict[str, Callable[[], object]] = {
            "gradstore query (fresh process)": lambda: subprocess.run(command, check=True, capture_output=True),
            "gradstore --help (fresh process)": lambda: subprocess.run(
                [sys.executable, "-m", "gradstore", "--help"], check=True, capture_output=True
            ),
            "exact scan in process": lambda: search(view, query, 20),
            "decode every row": lambda: [units_PD.shape for _, units_PD in view.scan()],
            "read the bytes": lambda: [int(np.fromfile(file, np.int64).sum()) for file in codes],
        }
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(repeats):
            for name, job in jobs.items():
                started = time.perf_counter()
                job()
                seconds[name].append(time.perf_counter() - started)
    floor = np.median(seconds["read the bytes"])
    print_table(
        f"{rows} x {dim} int8, {repeats} interleaved repeats",
        ["what", "median s", "min s", "max s", "x reading"],
        [
            [name, f"{np.median(t):.3f}", f"{min(t):.3f}", f"{max(t):.3f}", f"{np.median(t) / floor:.1f}"]
            for name, t in seconds.items()
        ],
        right=["median s", "min s", "max s", "x reading"],
    )


def make_store(path: Path, rows: int, dim: int) -> None:
    """Make a store with a pool of random rows and a benchmark of sixteen."""
    random = np.random.default_rng(0)
    store = gradstore.create(path, dim=dim, fingerprint={"made": "at random"})
    for name, n in (("pool", rows), ("bench", 16)):
        ids = [f"{name}-{i:06d}" for i in range(n)]
        store.add_problems(name, [{"id": i, "prompt": f"Problem {i}", "source": "random"} for i in ids])
        with store.writer(name, step=0) as writer:
            for start in range(0, n, 2048):
                part = ids[start : start + 2048]
                writer.append(part, random.normal(size=(len(part), dim)).astype(np.float32))


if __name__ == "__main__":
    typer.run(main)
