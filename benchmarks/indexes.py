"""Indexes on gradient-like rows: recall against the exact scan, time, bytes, and the choice of `auto`.

    python -m benchmarks.indexes [--dims 1024,4096,16384] [--kinds turbovec,flat] [--scale 1.0]

Rows are low rank plus noise with log-normal norms: 32 shared directions of decreasing strength, noise of twice their
strength in every row, norms exp(N(0, 1)). Queries are targets of 32 other benchmarks: means of 16 gradients made the
same way, which are not in the pool. Recall is shown as mean and minimum over the queries. Times are of one query,
interleaved with the exact scan and, if turbovec is installed, with its own search of the same rows for the same k,
which does not rescore. Then the same for `--together` queries at once, by `search_each`, with the index's recall over
all of them.
"""

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import gradstore
from benchmarks.timing import interleaved, print_times
from gradstore import View
from gradstore.cli.show import print_table
from gradstore.engine import Index, index_for, search, search_each
from gradstore.engine.searching.fisher import LARGEST_MATRIX
from gradstore.engine.searching.indexes.kinds import installed
from gradstore.engine.searching.indexes.serve import _chosen

NUMBERS = 200_000_000
"""Rows times dimensions of a store."""
BLOCK = 4096


def make_gradients(n: int, dim: int, random: np.random.Generator, base_RD: np.ndarray) -> np.ndarray:
    """Random gradients, low rank plus noise, with heavy-tailed norms: float32 [n, D]."""
    strength_R = np.linspace(1, 0.1, len(base_RD), dtype=np.float32)
    rows = (random.standard_normal((n, len(base_RD)), dtype=np.float32) * strength_R) @ base_RD
    rows += random.standard_normal((n, dim), dtype=np.float32) * np.float32(2 / np.sqrt(dim))
    rows *= random.lognormal(0, 1, (n, 1)).astype(np.float32) / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def shared_directions(dim: int) -> np.ndarray:
    """Directions shared by all rows, float32 [R, D]."""
    return np.random.default_rng(5).standard_normal((32, dim), dtype=np.float32) / np.float32(np.sqrt(dim))


def make_view(folder: Path, n: int, dim: int) -> View:
    """View of a new int8 store of such rows."""
    random, base_RD = np.random.default_rng(0), shared_directions(dim)
    store = gradstore.create(folder / f"d{dim}", dim=dim, fingerprint={})
    ids = [f"p{i:07d}" for i in range(n)]
    store.add_problems("pool", [{"id": name, "prompt": "?"} for name in ids])
    with store.writer("pool", step=0) as writer:
        for start in range(0, n, BLOCK):
            some = ids[start : start + BLOCK]
            writer.append(some, make_gradients(len(some), dim, random, base_RD))
    return store.view("pool")


def recalls(view: View, index: Index | None, queries: np.ndarray, k: int, metric: str) -> tuple[float, float]:
    """(mean, minimum) share of the exact k best that a search with the index finds, for largest and smallest."""
    shares = []
    for query in queries:
        for largest in (True, False):
            exact = search(view, query, k, metric=metric, largest=largest)  # type: ignore[arg-type]
            found = search(view, query, k, metric=metric, largest=largest, index=index)  # type: ignore[arg-type]
            shares.append(np.isin(exact.positions, found.positions).mean())
    return float(np.mean(shares)), float(np.min(shares))


def main(
    dims: Annotated[str, typer.Option(help="Dimensions, with commas.")] = "1024,4096,16384",
    kinds: Annotated[str, typer.Option(help="Kinds of index, with commas.")] = "turbovec,flat",
    scale: Annotated[float, typer.Option(help="Size of the stores, 1: 200 million numbers.")] = 1.0,
    repeats: Annotated[int, typer.Option(help="How often each is timed.")] = 7,
    together: Annotated[int, typer.Option(help="Queries asked together.")] = 256,
) -> None:
    """Print recall, time and bytes of every kind, and the choices of `auto`."""
    wanted = [kind for kind in kinds.split(",") if kind and installed(kind)]
    for dim in map(int, dims.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            view = make_view(Path(folder), max(2000, int(NUMBERS * scale) // dim), dim)
            one_dim(view, wanted, repeats, together)


def ask_together(view: View, indexes: dict[str, Index], n_queries: int, repeats: int) -> None:
    """Time queries asked together, and print the recall of each index."""
    others = make_gradients(n_queries * 16, view.dim, np.random.default_rng(78), shared_directions(view.dim))
    queries = others.reshape(n_queries, 16, view.dim).mean(axis=1)
    jobs: dict[str, Callable[[], object]] = {"scan": lambda: search_each(view, queries, 100)}
    exact = search_each(view, queries, 100)
    for kind, index in indexes.items():
        jobs[kind] = lambda index=index: search_each(view, queries, 100, index=index)
        found = search_each(view, queries, 100, index=index)
        shares = [np.isin(a.positions, b.positions).mean() for a, b in zip(exact, found, strict=True)]
        print(f"{kind}, {n_queries} queries together: recall {np.mean(shares):.4f}, least {np.min(shares):.3f}")
    print_times(f"{n_queries} queries together, k = 100, cosine", interleaved(jobs, repeats), "scan")


def one_dim(view: View, kinds: list[str], repeats: int, together: int) -> None:
    """Print the tables for one row dimension."""
    random = np.random.default_rng(77)
    others = make_gradients(32 * 16, view.dim, random, shared_directions(view.dim))
    queries = others.reshape(32, 16, view.dim).mean(axis=1)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    jobs: dict[str, Callable[[], object]] = {"scan": lambda: search(view, queries[0], 100)}
    rows, indexes = [], {}
    for kind in kinds:
        for metric in ("cosine", "dot"):
            started = time.perf_counter()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                index = index_for(view, 100, metric=metric, kind=kind)
            took = time.perf_counter() - started
            if index is None:
                rows.append([kind, metric, f"{took:.1f}", "", "refused", "", str(caught[0].message)[:60]])
                continue
            mean, least = recalls(view, index, queries, 100, metric)
            place = view.store.path / "collections/pool/indexes" / f"{kind}-{metric}"
            size = sum(path.stat().st_size for path in place.iterdir()) / len(view)
            shown = f"x{index.tested[0].factor:g}" if index.tested else ""
            rows.append([kind, metric, f"{took:.1f}", f"{size:.0f}", f"{mean:.4f}", f"{least:.3f}", shown])
            if metric == "cosine":
                indexes[kind] = index
                jobs[kind] = lambda index=index: search(view, queries[0], 100, index=index)
                if kind == "turbovec":
                    jobs["turbovec alone"] = lambda own=index.kind: own.search(queries[:1], 100, None)
    title = f"{len(view)} x {view.dim} int8, k = 100, both directions"
    columns = ["kind", "metric", "built and tested s", "bytes a row", "recall", "least", "fetched"]
    print_table(title, columns, rows, right=columns[2:6])
    print_times("one query, k = 100, cosine", interleaved(jobs, repeats), "turbovec alone" if len(jobs) > 2 else "scan")
    ask_together(view, indexes, together, repeats)
    choices = []
    solved_directly = min(view.dim, len(view)) <= LARGEST_MATRIX  # else each step of each query passes over the rows
    for k in (100, len(view) // 20):
        for n_queries in (1, 1000):
            for metric in ("cosine", "dot", "fisher") if solved_directly else ("cosine", "dot"):
                way = _chosen(view, len(view), k, metric, n_queries)
                index = index_for(view, k, metric=metric, n_queries=n_queries)
                mean, least = recalls(view, index, queries[::4], k, metric) if index is not None else (1.0, 1.0)
                serves = "scan" if index is None else way
                choices.append([str(k), str(n_queries), metric, way, serves, f"{mean:.4f}", f"{least:.3f}"])
    columns = ["k", "queries", "metric", "auto", "served by", "recall", "least"]
    print_table("what `auto` picks", columns, choices, right=["k", "queries", "recall", "least"])


if __name__ == "__main__":
    typer.run(main)
