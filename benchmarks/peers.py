"""One query, and many at once, by the scan and by other libraries on the same rows: time, recall, bytes.

    python -m benchmarks.peers [--dims 512,1024,4096] [--scale 1.0] [--repeats 7] [--threads 2]

Rows and queries are those of benchmarks/indexes.py, k = 20, cosine. The scan is exact on the stored int8 rows; recall
is the share of its best that a peer finds, over 32 queries. A peer that is not installed is left out:

FAISS SQ8       IndexScalarQuantizer of 8 bits, on unit rows, exhaustive
FAISS RaBitQ    IndexRaBitQ, 1 bit, the best 8 x k refined by SQ8
turbovec        its own search, which does not rescore; and as our index, rescored
usearch         exact search of int8 vectors, the query rounded to int8 too
numkong         products of int8 rows with a query rounded to int8, the best by numpy
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.indexes import NUMBERS, make_gradients, make_view, shared_directions
from benchmarks.timing import interleaved, print_times
from gradstore import View
from gradstore.cli.show import print_table
from gradstore.engine import Index, index_for, search_each

K = 20
AT_ONCE = 8192
FACTOR = 8
"""RaBitQ's best FACTOR x k are refined."""
Found = Callable[[np.ndarray], np.ndarray]
"""Queries [Q, D] -> positions [Q, K]."""


def main(
    dims: Annotated[str, typer.Option(help="Dimensions, with commas.")] = "512,1024,4096",
    scale: Annotated[float, typer.Option(help="Size of the stores, 1: 200 million numbers.")] = 1.0,
    repeats: Annotated[int, typer.Option(help="How often each is timed.")] = 7,
    together: Annotated[int, typer.Option(help="Queries asked together.")] = 256,
    threads: Annotated[int, typer.Option(help="Threads of the peers that can be told.")] = 2,
) -> None:
    """Print a table of times for one query, one for many, and one of recalls, for each number of dimensions."""
    for dim in map(int, dims.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            view = make_view(Path(folder), max(2000, int(NUMBERS * scale) // dim), dim)
            others = make_gradients(together * 16, dim, np.random.default_rng(77), shared_directions(dim))
            queries_QD = others.reshape(together, 16, dim).mean(axis=1)
            queries_QD /= np.linalg.norm(queries_QD, axis=1, keepdims=True)
            compare(view, queries_QD, repeats, threads)


def compare(view: View, queries_QD: np.ndarray, repeats: int, threads: int) -> None:
    """Print the tables of one store."""
    ways: dict[str, Found] = {"scan": partial(_ours, view, None)}
    index = index_for(view, K, metric="cosine", kind="turbovec")
    if index is not None:
        ways["turbovec, rescored"] = partial(_ours, view, index)
        ways["turbovec alone"] = partial(_alone, index)
    for name, make in (("faiss", _faiss), ("usearch", _usearch), ("numkong", _numkong)):
        try:
            ways |= make(view, threads)
        except ImportError:
            print(f"{name} is not installed: left out")
    exact_QK = ways["scan"](queries_QD[:32])
    rows = []
    for name, way in ways.items():
        shares = [np.isin(a, b).mean() for a, b in zip(exact_QK, way(queries_QD[:32]), strict=True)]
        rows.append([name, f"{np.mean(shares):.4f}", f"{np.min(shares):.2f}"])
    title = f"{len(view)} x {view.dim}, cosine, k = {K}"
    print_table(f"{title}: recall", ["what", "mean", "least"], rows, right=["mean", "least"])
    for n in (1, len(queries_QD)):
        jobs = {name: partial(way, queries_QD[:n]) for name, way in ways.items()}
        print_times(f"{title}, {n} {'query' if n == 1 else 'queries'}", interleaved(jobs, repeats), "scan")


def _ours(view: View, index: Any, queries_QD: np.ndarray) -> np.ndarray:
    return np.array([found.positions for found in search_each(view, list(queries_QD), K, index=index)])


def _alone(index: Index, queries_QD: np.ndarray) -> np.ndarray:
    return index.kind.search(queries_QD, K, None)[1]


def _faiss(view: View, threads: int) -> dict[str, Found]:
    import faiss

    faiss.omp_set_num_threads(threads)

    def exhaustive() -> Any:
        return faiss.IndexScalarQuantizer(view.dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)

    made = {
        "FAISS SQ8": exhaustive(),
        "FAISS RaBitQ, refined": faiss.IndexRefine(
            faiss.IndexRaBitQ(view.dim, faiss.METRIC_INNER_PRODUCT), exhaustive()
        ),
    }
    for index in made.values():
        index.train(view.rows(np.arange(0, len(view), max(1, len(view) // 20_000))))
        for start in range(0, len(view), AT_ONCE):
            index.add(view.rows(np.arange(start, min(len(view), start + AT_ONCE))))
    made["FAISS RaBitQ, refined"].k_factor = FACTOR
    return {name: partial(_best_of_faiss, index) for name, index in made.items()}


def _best_of_faiss(index: Any, queries_QD: np.ndarray) -> np.ndarray:
    return np.asarray(index.search(queries_QD.astype(np.float32), K)[1])


def _usearch(view: View, threads: int) -> dict[str, Found]:
    from usearch.index import MetricKind, search  # type: ignore[import-not-found]

    codes_ND = _codes(view)

    def exact(queries_QD: np.ndarray) -> np.ndarray:
        found = search(codes_ND, _rounded(queries_QD), K, MetricKind.Cos, exact=True, threads=threads)
        return np.asarray(found.keys).reshape(len(queries_QD), K).astype(np.int64)

    return {"usearch, int8": exact}


def _numkong(view: View, threads: int) -> dict[str, Found]:
    import numkong

    codes_ND = _codes(view)
    lengths_N = np.linalg.norm(codes_ND.astype(np.float32), axis=1)

    def exact(queries_QD: np.ndarray) -> np.ndarray:
        packed = numkong.dots_pack(_rounded(queries_QD), dtype="int8")
        scores_NQ = np.asarray(numkong.dots_packed(codes_ND, packed)) / lengths_N[:, None]
        best_KQ = np.argpartition(-scores_NQ, K, axis=0)[:K]
        return best_KQ.T

    return {"numkong, int8": exact}


def _codes(view: View) -> np.ndarray:
    """Rows rounded to int8 by their largest entry, [N, D]."""
    parts = (np.arange(start, min(len(view), start + AT_ONCE)) for start in range(0, len(view), AT_ONCE))
    return np.concatenate([_rounded(view.rows(part)) for part in parts])


def _rounded(rows_ND: np.ndarray) -> np.ndarray:
    largest_N1 = np.abs(rows_ND).max(axis=1, keepdims=True)
    return np.rint(rows_ND * (127 / np.where(largest_N1 > 0, largest_N1, 1))).astype(np.int8)


if __name__ == "__main__":
    typer.run(main)
