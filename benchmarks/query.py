"""Time of a query from the command line, start-up included, split into its parts.

    python -m benchmarks.query [--rows 20000] [--dim 4096] [--repeats 7]

Makes an int8 store of random rows in a temporary folder and runs `gradstore query` on it in new processes. This process
times, interleaved: the exact scan, reading the same bytes once, and decoding them once. Times have their spread.

The query runs also without the checks of files and codes, which only this benchmark can switch off. Both are compared
in the same repeat: wall time, and processor time, which other load on the machine changes less. The same for the first
and a later scan in this process.
"""

import resource
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
from benchmarks.timing import interleaved
from gradstore import chunks
from gradstore.cli.show import print_table
from gradstore.engine.searching.query import search

_UNCHECKED = """
from gradstore import Store, chunks
from gradstore.stored_rows import StoredRows
chunks._Checked.holds = lambda *_: True
Store.check_files = StoredRows.read_ahead = lambda *_: None
"""
_RUN = "from gradstore.cli import main; main()"


def main(
    rows: Annotated[int, typer.Option(help="Problems in the pool.")] = 20_000,
    dim: Annotated[int, typer.Option(help="Dimensions of a sketch.")] = 4096,
    repeats: Annotated[int, typer.Option(help="How often each is timed.")] = 7,
) -> None:
    """Time a query from the command line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        make_store(path, rows, dim)
        compare_checks(path, dim, repeats)
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


def compare_checks(path: Path, dim: int, repeats: int) -> None:
    """Time queries with and without the checks, and print the ratios of each repeat."""
    asked = ["query", str(path), "--against", "bench", "--top", "20"]
    query = np.random.default_rng(1).normal(size=dim).astype(np.float32)
    view, holds = gradstore.open(path).view("pool"), chunks._Checked.holds
    spent: dict[str, list[float]] = {}

    def processor_time(name: str, job: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
            told = job()
            after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
            pairs = zip(before, after, strict=True)
            spent.setdefault(name, []).append(sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in pairs))
            return told

        return run

    def first(checked: bool) -> float:
        fresh = gradstore.open(path).view("pool")
        chunks._CHECKED = chunks._Checked()
        chunks._Checked.holds = holds if checked else lambda *_: True  # type: ignore[method-assign, assignment]
        try:
            started = time.perf_counter()
            search(fresh, query, 20)
            return time.perf_counter() - started
        finally:
            chunks._Checked.holds = holds  # type: ignore[method-assign]

    def files() -> float:
        fresh = gradstore.open(path)
        started = time.perf_counter()
        fresh.check_files()
        return time.perf_counter() - started

    def command(before: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", before + _RUN, *asked], check=True, capture_output=True)

    jobs: dict[str, Callable[[], object]] = {
        "query in a fresh process, unchecked": command(_UNCHECKED),
        "query in a fresh process": command(""),
        "first scan, unchecked": lambda: first(False),
        "first scan": lambda: first(True),
        "later scan": lambda: search(view, query, 20),
        "check_files": files,
    }
    seconds = interleaved({name: processor_time(name, job) for name, job in jobs.items()}, repeats)
    bases = {"query in a fresh process": "query in a fresh process, unchecked", "first scan": "first scan, unchecked"}
    lines = []
    for name, wall in seconds.items():
        used = np.array(spent[name][-repeats:])
        base = bases.get(name, name)
        ratios = wall / seconds[base], used / np.array(spent[base][-repeats:])
        shown = [f"{np.median(ratio):.3f} ({ratio.min():.2f}-{ratio.max():.2f})" for ratio in ratios]
        lines.append([name, f"{np.median(wall):.4f}", f"{np.median(used):.4f}", *(shown if base != name else ["", ""])])
    columns = ["what", "wall s", "processor s", "wall, x unchecked", "processor, x unchecked"]
    print_table(f"the checks, {repeats} interleaved repeats, medians (range)", columns, lines, right=columns[1:3])


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
