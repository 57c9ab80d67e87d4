"""The exact scan: products of stored rows with queries, straight from the mapped chunk files.

Rows are never decoded: codes are multiplied with the digits of queries (products.py). A digit more costs almost nothing
where one query is bound by reading the rows; sixteen queries are bound by arithmetic.

Rows that a query does not want (superseded, deleted, not live, filtered out) are skipped by whole chunks, scored
and thrown away where they lie among wanted ones, and only where few of a chunk are wanted are those copied together.

P problems of a view, Q queries, D sketch dimensions, W columns of codes, N rows of a block or pairs of row and query.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from engine.searching.blocks import blocks_of
from engine.searching.products import PRODUCTS, PairProduct, Product, ProductOf, int8_product, left_of, pair_product
from engine.searching.ranking import best, kth_smallest
from gradstore import View
from gradstore.view import Piece

QUERIES_AT_ONCE = 16
"""More queries are answered in several passes: beyond this the arithmetic, not the reading, is what takes time."""
_FEW = 4096
"""Rows that one core scores sooner than threads begin."""
_SPARSE = 0.25
"""Below this share of wanted rows between the first and the last wanted one of a chunk, they are copied together."""


def scan_rows(view: View, queries_QD: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """Products of unit rows with queries: float32 [Q, P], NaN for problems that are not at the positions.

    queries_QD: float [Q, D], finite; of a store with several bases also [Q, bases * D] (blocks.py), each row being
    multiplied with the block of its own basis, NaN where that is not known. positions: int64, distinct, in any order;
    None: all. Every core takes chunk files in turn. Memory beyond the result: one block of products a core, and two
    whole numbers a position.
    """
    queries_QD = np.asarray(queries_QD, np.float32)
    if view.n_bases > 1:
        return _in_each_basis(view, queries_QD, positions)
    return _in_one_basis(view, queries_QD, positions, PRODUCTS[view.store.dtype])


def scan_best(
    view: View,
    queries_QD: np.ndarray,
    k: int,
    positions: np.ndarray | None = None,
    weights_P: np.ndarray | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each query's k largest scores, as `best` of `scan_rows` has them: their positions, int64, and float32 scores.

    weights_P: positive, what the products of each row are multiplied with; None: 1. Several queries multiply int8 rows
    with two digits first. Only rows whose score could, by what that may be wrong by, reach the k-th that is certain can
    be among the k, and those are scored anew with all digits.
    """
    queries_QD = np.asarray(queries_QD, np.float32)
    exact = pair_product(queries_QD) if view.store.dtype == "int8" and view.n_bases == 1 else None
    if exact is None:
        scores_QP = scan_rows(view, queries_QD, positions)
        scores_QP *= 1 if weights_P is None else weights_P
        best_Q = [best(scores_P, k, view.ids_at) for scores_P in scores_QP]
        return [(places, scores_P[places]) for places, scores_P in zip(best_Q, scores_QP, strict=True)]
    scores_QP = _in_one_basis(view, queries_QD, positions, partial(int8_product, n_digits=2))
    near_Q = _near(scores_QP, left_of(queries_QD, 2), k, weights_P)
    found = []
    for places, scores in zip(near_Q, _score_near(view, near_Q, exact), strict=True):
        scores *= 1 if weights_P is None else weights_P[places]
        chosen = best(scores, k, partial(_ids_among, view, places))
        found.append((places[chosen], scores[chosen]))
    return found


def _near(scores_QP: np.ndarray, left_Q: np.ndarray, k: int, weights_P: np.ndarray | None) -> list[np.ndarray]:
    """For each query the positions, ascending, of all that can be among the k best.

    left_Q: what the scores, without weights, may be wrong by at most.
    """

    def near(scores_P: np.ndarray, left: float) -> np.ndarray:
        if weights_P is None:
            return np.flatnonzero(scores_P >= -kth_smallest(-scores_P, k) - 2 * left)
        return np.flatnonzero((scores_P + left) * weights_P >= -kth_smallest((left - scores_P) * weights_P, k))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(near, scores_QP, left_Q))


def _score_near(view: View, near_Q: list[np.ndarray], exact: PairProduct) -> list[np.ndarray]:
    """Scores of each query's positions, float32, chunk file by chunk file: a row is read once for all queries."""
    counts = [len(places) for places in near_Q]
    places_N, query_N = np.concatenate(near_Q), np.repeat(np.arange(len(near_Q)), counts)
    row_N = view.row_numbers[places_N]
    order = np.argsort(row_N)
    row_N, query_N = row_N[order], query_N[order]
    wanted = np.zeros(len(view), bool)
    wanted[places_N] = True
    pieces = view.pieces(wanted)
    starts = np.searchsorted(row_N, [piece.rows[0] for piece in pieces])
    stops = np.append(starts[1:], len(row_N))
    found_N = np.empty(len(row_N), np.float32)

    def score(piece: Piece, start: int, stop: int) -> None:
        rows = row_N[start:stop]
        scale = piece.scale[np.searchsorted(piece.rows, rows)]
        found_N[start:stop] = exact(piece.span()[0], rows - piece.rows[0], query_N[start:stop], scale)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(score, pieces, starts, stops))
    scores_N = np.empty_like(found_N)
    scores_N[order] = found_N
    return np.split(scores_N, np.cumsum(counts)[:-1])


def _ids_among(view: View, places: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    return view.ids_at(places[chosen])


def _in_each_basis(view: View, queries_QW: np.ndarray, positions: np.ndarray | None) -> np.ndarray:
    scores_QP = np.full((len(queries_QW), len(view)), np.nan, np.float32)
    places = np.arange(len(view)) if positions is None else np.asarray(positions)
    basis_P = view.bases[places]
    for basis, block_QD in enumerate(blocks_of(queries_QW, view.dim, view.n_bases)):
        here = places[basis_P == basis]
        known_Q = ~np.isnan(block_QD).any(axis=1)
        if len(here) and known_Q.any():
            found_QP = _in_one_basis(view, block_QD[known_Q], here, PRODUCTS[view.store.dtype])
            scores_QP[np.ix_(known_Q, here)] = found_QP[:, here]
    return scores_QP


def _in_one_basis(
    view: View, queries_QD: np.ndarray, positions: np.ndarray | None, product_of: ProductOf
) -> np.ndarray:
    scores_QP = np.full((len(queries_QD), len(view)), np.nan, np.float32)
    pieces = view.pieces(positions)
    few = positions is not None and len(positions) < _FEW
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(queries_QD), QUERIES_AT_ONCE):
            some_QP = scores_QP[start : start + QUERIES_AT_ONCE]
            product = product_of(queries_QD[start : start + QUERIES_AT_ONCE])

            def score(piece: Piece, some_QP: np.ndarray = some_QP, product: Product = product) -> None:
                _score(piece, product, some_QP)

            if few:  # Starting threads takes longer than scoring a few rows: an unused pool starts none.
                _score_few(pieces, some_QP, product)
                continue
            for _ in pool.map(score, pieces):
                pass
    return scores_QP


def _score(piece: Piece, product: Product, some_QP: np.ndarray) -> None:
    """Products of a piece's rows with the queries, to their places."""
    codes, within = piece.span()
    places, scale = _as_slice(piece.positions), piece.scale
    if len(within) == len(codes) and isinstance(places, slice):
        product(codes, scale, some_QP[:, places])
    elif len(within) < _SPARSE * len(codes):
        scores_QN = np.empty((len(some_QP), len(within)), np.float32)
        product(codes[within], scale, scores_QN)
        some_QP[:, places] = scores_QN
    else:
        scale_N = np.zeros(len(codes), np.float32)
        scale_N[within] = scale
        scores_QN = np.empty((len(some_QP), len(codes)), np.float32)
        product(codes, scale_N, scores_QN)
        some_QP[:, places] = scores_QN[:, within]


def _score_few(pieces: list[Piece], some_QP: np.ndarray, product: Product) -> None:
    """Scores of a few rows that are spread over many chunks, copied together."""
    if not pieces:
        return
    codes = np.concatenate([span[within] for span, within in (piece.span() for piece in pieces)])
    scores_QN = np.empty((len(some_QP), len(codes)), np.float32)
    product(codes, np.concatenate([piece.scale for piece in pieces]), scores_QN)
    some_QP[:, np.concatenate([piece.positions for piece in pieces])] = scores_QN


def _as_slice(places: np.ndarray) -> slice | np.ndarray:
    """Places as a slice where they are consecutive: assigning to it is many times faster."""
    first, last = int(places[0]), int(places[-1])
    consecutive = last - first + 1 == len(places) and bool(np.all(places[1:] > places[:-1]))
    return slice(first, last + 1) if consecutive else places
