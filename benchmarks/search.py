"""Speed and memory of searching a view: one command, ratios within one run.

    python -m benchmarks.search [--only exact,history,bits] [--repeats 7] [--scale 1.0] [--folder DIR]

exact    1 and 16 queries, top 1,000 of 200,000 x 4096 int8. Compared with: a C loop that reads the same bytes with as
         many threads; FAISS Flat on float32 rows; a memory-mapped float32 file with torch, once with a product per
         module of 256 dimensions, as bergson's Attributor does, and once with a single product, the best possible.
history  1,000,000 x 1024 int8 and five refreshes of 20 % each: open, view, query, memory, against a single step.
bits     10,000,000 x 256 with one bit per dimension.

`--scale` makes every store smaller. Stores are made in a temporary folder (in DIR) and removed.
"""

import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import gradstore
from benchmarks.stores import make_store
from benchmarks.timing import interleaved, print_times
from gradstore.engine.searching.fusion import search_each
from gradstore.engine.searching.query import search
from gradstore.engine.searching.scan import scan_rows

K = 1000
MODULE_DIM = 256
"""Dimensions per module in a flat file of gradients projected to 16 x 16."""
_READ = """
#include <stdint.h>
#include <stddef.h>
uint64_t read_all(const uint64_t *p, size_t n) {
    uint64_t a = 0;
    for (size_t i = 0; i < n; i++) a ^= p[i];
    return a;
}
"""


def exact_section(folder: Path, scale: float, repeats: int) -> None:
    """Time 1 and 16 queries against reading the bytes, FAISS Flat and a memory-mapped float32 file."""
    import faiss
    import torch

    rows, dim, threads = int(200_000 * scale), 4096, 2
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    view = make_store(folder / "exact", rows, dim).view("pool")
    queries = np.random.default_rng(1).standard_normal((16, dim)).astype(np.float32)
    query = queries[0] / np.linalg.norm(queries[0])
    flat = faiss.IndexFlatIP(dim)
    file = np.memmap(folder / "rows.f32", np.float32, "w+", shape=(rows, dim))
    for positions, units_PD in view.scan():
        file[positions] = units_PD
        flat.add(units_PD)
    file.flush()
    mapped = torch.from_numpy(np.memmap(folder / "rows.f32", np.float32, "c", shape=(rows, dim)))
    read = c_reader(folder)
    chunks = [piece.codes for piece in view.stored.pieces()]

    def read_all() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, chunks))

    modules = torch.split(mapped, MODULE_DIM, dim=1)

    def by_module() -> None:
        parts = torch.split(torch.from_numpy(query[None]), MODULE_DIM, dim=1)
        scores = [part @ module.mT for part, module in zip(parts, modules, strict=True)]
        torch.topk(torch.stack(scores, dim=-1).sum(-1), K)

    jobs: dict[str, Callable[[], object]] = {
        "C read": read_all,
        "1 query": lambda: search(view, query, K),
        "16 queries": lambda: search_each(view, queries, K),
        "16 queries, every score": lambda: scan_rows(view, queries),
        "FAISS Flat fp32": lambda: flat.search(query[None], K),
        "mapped fp32, by module": by_module,
        "mapped fp32, one product": lambda: torch.topk(mapped @ torch.from_numpy(query), K),
    }
    seconds = interleaved(jobs, repeats)
    print_times(f"{rows} x {dim} int8, top {K}, {threads} threads, {repeats} interleaved repeats", seconds, "C read")
    one = seconds["1 query"]
    asked = {
        "16 queries": "at most 2.5",
        "FAISS Flat fp32": "at least 5",
        "mapped fp32, by module": "at least 5",
        "mapped fp32, one product": "no bound (it reads four times the bytes)",
    }
    for name, bound in asked.items():
        ratio = seconds[name] / one
        print(f"{name} / 1 query: {np.median(ratio):.2f} ({ratio.min():.2f}-{ratio.max():.2f}), asked {bound}")
    speed = seconds["C read"] / one
    print(f"1 query / C read, speed: {np.median(speed):.2f} ({speed.min():.2f}-{speed.max():.2f}), asked at least 0.7")


def history_section(folder: Path, scale: float, repeats: int) -> None:
    """Time a store after five refreshes of a fifth of the problems: cost of finding each problem's newest row."""
    problems, dim = int(1_000_000 * scale), 1024
    make_store(folder / "one", problems, dim)
    make_store(folder / "many", problems, dim, refreshes=[0.2] * 5)
    query = np.random.default_rng(1).standard_normal(dim).astype(np.float32)
    views = {name: gradstore.open(folder / name).view("pool") for name in ("one", "many")}
    past = gradstore.open(folder / "many").view("pool", at=3)

    def fresh(at: int | None) -> float:
        store = gradstore.open(folder / "many")
        started = time.perf_counter()
        store.view("pool", at=at)
        return time.perf_counter() - started

    jobs: dict[str, Callable[[], object]] = {
        "query, one step": lambda: search(views["one"], query, K),
        "query, newest of six": lambda: search(views["many"], query, K),
        "query, at step 3": lambda: search(past, query, K),
        "open": lambda: gradstore.open(folder / "many"),
        "view of a fresh store": lambda: fresh(None),
        "view(at=3) of a fresh store": lambda: fresh(3),
    }
    seconds = interleaved(jobs, repeats)
    print_times(f"{problems} x {dim} int8, five refreshes of 20 %", seconds, "query, one step")
    print_memory(folder / "many", dim)


def bits_section(folder: Path, scale: float, repeats: int) -> None:
    """Time ten million rows of 256 bits."""
    problems, dim = int(10_000_000 * scale), 256
    view = make_store(folder / "bits", problems, dim, "1bit").view("pool")
    query = np.random.default_rng(1).standard_normal(dim).astype(np.float32)
    jobs: dict[str, Callable[[], object]] = {
        "query": lambda: search(view, query, K),
        "scan alone": lambda: scan_rows(view, query[None]),
    }
    print_times(f"{problems} x {dim} 1bit, top {K}", interleaved(jobs, repeats), "query")
    print_memory(folder / "bits", dim)


def print_memory(path: Path, dim: int) -> None:
    """Open and query in a new process; print the times, and its memory without the mapped files."""
    code = f"""
import json, threading, time
import numpy as np
def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1e6
most, stop = [0.0], threading.Event()
def watch():
    while not stop.wait(0.002):
        most[0] = max(most[0], anonymous())
threading.Thread(target=watch, daemon=True).start()
import gradstore
from gradstore.engine.searching.query import search
times = [time.perf_counter()]
store = gradstore.open({str(path)!r}); times.append(time.perf_counter())
view = store.view("pool"); times.append(time.perf_counter())
query = np.random.default_rng(1).standard_normal({dim}).astype(np.float32)
for _ in range(2):
    search(view, query, {K}); times.append(time.perf_counter())
stop.set()
print(json.dumps([*np.diff(times), most[0], anonymous()]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    opened, viewed, first, second, most, left = json.loads(done.stdout)
    print(
        f"fresh process: open {opened:.3f} s, view {viewed:.3f} s, first query {first:.3f} s, second {second:.3f} s; "
        f"memory beside mapped files: most {most:.2f} GB, at the end {left:.2f} GB"
    )


def c_reader(folder: Path) -> Callable[[np.ndarray], int]:
    """A compiled loop over an array's bytes; ctypes releases the GIL while it runs."""
    source, library = folder / "read.c", folder / "read.so"
    source.write_text(_READ)
    subprocess.run(["cc", "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    function = ctypes.CDLL(str(library)).read_all
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    function.restype = ctypes.c_uint64
    return lambda array: int(function(array.ctypes.data, array.nbytes // 8))


SECTIONS: dict[str, Callable[[Path, float, int], None]] = {
    "exact": exact_section,
    "history": history_section,
    "bits": bits_section,
}


def main(
    only: Annotated[str, typer.Option(help="Sections, separated by commas; default: all.")] = "",
    repeats: Annotated[int, typer.Option(help="How often each is timed.")] = 7,
    scale: Annotated[float, typer.Option(help="Share of the rows.")] = 1.0,
    folder: Annotated[Path | None, typer.Option(help="Where the stores are made.")] = None,
) -> None:
    """Time searches."""
    for name in only.split(",") if only else SECTIONS:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            SECTIONS[name](Path(place), scale, repeats)


if __name__ == "__main__":
    typer.run(main)
