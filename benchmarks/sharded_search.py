"""Search of ten million 1-bit rows by Ray workers, each with a part of the rows, against one process.

    python -m benchmarks.sharded_search [--rows 10000000] [--dim 256] [--workers 4] [--repeats 5] [--folder DIR]

The rows are random (`benchmarks/stores.py`: blocks of them repeat, so that many rows differ by a rotation alone). Both
must give the same hits, bit for bit, for cosine and dot, smallest and largest, and with a filter.
Then both are timed, interleaved, with the same queries; and what starting Ray and opening the store cost.

On one machine the workers share its cores and memory bandwidth with each other: what is shown there is the cost of
dividing. A gain needs more machines, or rows on disks that one machine cannot read as fast.
"""

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.stores import make_store
from benchmarks.timing import interleaved, print_times
from gradstore import View
from gradstore.engine.cluster.ray_start import connected
from gradstore.engine.searching.on_workers import SearchOnWorkers
from gradstore.engine.searching.query import Hits, search

K = 1000


def main(
    rows: Annotated[int, typer.Option(help="Rows of the store.")] = 10_000_000,
    dim: Annotated[int, typer.Option(help="Dimensions of a sketch.")] = 256,
    workers: Annotated[int, typer.Option(help="Ray workers.")] = 4,
    repeats: Annotated[int, typer.Option(help="How often each search is timed.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="Where the store is made and removed.")] = None,
) -> None:
    """Compare the hits, then print the times."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        started = time.perf_counter()
        view = make_store(Path(temporary) / "store", rows, dim, "1bit").view("pool")
        print(f"{rows} x {dim}, 1 bit, written in {time.perf_counter() - started:.1f} s; load {_load()}", flush=True)
        opened = time.perf_counter()
        with connected("local", workers):
            started = time.perf_counter()
            with SearchOnWorkers(view, workers=workers) as spread:
                ready = time.perf_counter()
                compare(view, spread, dim)
                _time(view, spread, dim, repeats)
                shares = ", ".join(f"{cost.problems / 1e6:.1f}M" for cost in spread.costs)
    print(f"Ray started in {started - opened:.1f} s, {workers} workers with the view open in {ready - started:.1f} s")
    print(f"rows scanned by each worker, all searches together: {shares}; load at the end {_load()}")


def compare(view: View, spread: SearchOnWorkers, dim: int) -> None:
    """The first searches, which read and check the codes; ValueError where hits differ."""
    query = np.random.default_rng(1).standard_normal(dim).astype(np.float32)
    thirds = np.arange(len(view)) % 3 == 1
    asked: list[tuple[int, dict[str, Any]]] = [
        (K, {}), (K, {"metric": "dot"}), (K, {"largest": False}), (K, {"where": thirds}), (100 * K, {"metric": "dot"}),
    ]  # fmt: skip
    for k, options in asked:
        expected, alone = _timed(partial(search, view, query, k, **options))
        found, together = _timed(partial(spread.search, query, k, **options))
        what = f"top {k} ({', '.join(options) or 'cosine'})"
        for name in ("positions", "scores", "ids"):
            if not np.array_equal(getattr(found, name), getattr(expected, name)):
                raise ValueError(f"{what}: the workers' {name} differ from those of one process")
        ties = int((expected.scores[1:] == expected.scores[:-1]).sum())
        print(f"{what}: equal, {ties} ties; one process {alone:.2f} s, workers {together:.2f} s", flush=True)


def _timed(job: Callable[[], Hits]) -> tuple[Hits, float]:
    started = time.perf_counter()
    return job(), time.perf_counter() - started


def _time(view: View, spread: SearchOnWorkers, dim: int, repeats: int) -> None:
    query = np.random.default_rng(2).standard_normal(dim).astype(np.float32)
    jobs: dict[str, Callable[[], object]] = {
        "one process": lambda: search(view, query, K),
        "workers": lambda: spread.search(query, K),
    }
    cores = len(os.sched_getaffinity(0))
    print_times(f"top {K}, {cores} cores, {repeats} interleaved repeats", interleaved(jobs, repeats), "one process")


def _load() -> str:
    return f"{os.getloadavg()[0]:.0f}"


if __name__ == "__main__":
    typer.run(main)
