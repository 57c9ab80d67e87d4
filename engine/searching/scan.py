"""Exact scan: products of stored rows with queries, directly from the memory-mapped chunk files.

Rows are never decoded: codes are multiplied with the digits of queries (products.py). For one query, reading the rows
is the bottleneck, so one more digit costs almost nothing. For sixteen queries, arithmetic is the bottleneck.

Unwanted rows are superseded, deleted, not live or filtered out. Chunks without a wanted row are skipped. Unwanted rows
between wanted ones are scored and discarded. If few rows of a chunk are wanted, those are copied together first.

P problems of a view, Q queries, D sketch dimensions, W columns of codes, N rows of a block or pairs of row and query.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from gradstore import View
from gradstore.engine.searching.blocks import blocks_of
from gradstore.engine.searching.products import (
    PRODUCTS,
    Pick,
    Product,
    int8_product_apart,
    int8_product_of_pairs,
    picked_at_once,
    picking,
)
from gradstore.engine.searching.ranking import best
from gradstore.errors import DamagedError
from gradstore.stored_rows import Piece

QUERIES_AT_ONCE = 16
"""Queries per pass; with more, arithmetic takes the time, not reading."""
_FEW = 4096
"""Below this number of rows, one core is faster than starting threads."""
_MANY = 0.1
"""If k is above this share of the rows, a threshold saves nothing: score all."""
_SAMPLE = 2048
"""Sample size for the top-k threshold."""
_RANKS_MORE = 16
"""Ranks added to the threshold's rank in the sample (that of the best 2 k rows), against sampling error."""
_LONGEST = 1.001
"""Length that a stored row, a unit row but for rounding, can have."""
_SPARSE = 0.25
"""Below this share of wanted rows, from the first to the last wanted one of a chunk, they are copied together."""


def scan_rows(view: View, queries_QD: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """Products of unit rows with queries: float32 [Q, P], NaN for problems that are not at the positions.

    queries_QD: float [Q, D], finite. With several bases also [Q, bases * D] (blocks.py): each row is multiplied with
    the block of its own basis, NaN if that is unknown. positions: int64, distinct, in any order; None: all. Every core
    takes chunk files in turn. Memory beyond the result: one block of products per core, two integers per position.
    """
    queries_QD = np.asarray(queries_QD, np.float32)
    if view.n_bases > 1:
        return _in_each_basis(view, queries_QD, positions)
    return _in_one_basis(view, queries_QD, positions)


def scan_at(view: View, queries_QD: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Products of the unit rows at a few positions with queries, in that order: float32 [Q, n]; for one basis only.

    Where the kernel cannot read scattered rows, they are copied into memory first.
    """
    queries_QD = np.asarray(queries_QD, np.float32)
    scores_QN = np.empty((len(queries_QD), len(positions)), np.float32)
    for start in range(0, len(queries_QD), QUERIES_AT_ONCE) if len(positions) else ():
        some = slice(start, start + QUERIES_AT_ONCE)
        apart = int8_product_apart(queries_QD[some]) if view.stored.dtype == "int8" else None
        if apart is not None:
            apart(*view.stored.places(positions), scores_QN[some])
        else:
            PRODUCTS[view.stored.dtype](queries_QD[some])(*view.stored.codes(positions), scores_QN[some])
    _check(view, positions, scores_QN, _most(queries_QD))
    return scores_QN


def scan_pairs(view: View, queries_QD: np.ndarray, positions_Q: list[np.ndarray]) -> list[np.ndarray]:
    """Products of each query with unit rows of its own, at few positions: float32 [n] for each query; one basis only.

    Equal to `scan_at` for each query alone. All pairs are scored together, in the order of the rows.
    """
    product = int8_product_of_pairs(queries_QD) if view.stored.dtype == "int8" else None
    if product is None:
        pairs = zip(queries_QD, positions_Q, strict=True)
        return [scan_at(view, query_D[None], positions)[0] for query_D, positions in pairs]
    sizes = [len(positions) for positions in positions_Q]
    query_N, position_N = np.repeat(np.arange(len(sizes)), sizes), np.concatenate(positions_Q)
    order, scores_N = np.argsort(position_N), np.empty(len(position_N), np.float32)

    def score(some: np.ndarray) -> None:
        scores = np.empty(len(some), np.float32)
        arrays, array_of, within, scale = view.stored.places(position_N[some])
        product(arrays, array_of, within, query_N[some], scale, scores)
        scores_N[some] = scores

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(score, np.array_split(order, -(-len(order) // _FEW))))
    _check(view, position_N, scores_N, _most(np.asarray(queries_QD, np.float32))[query_N])
    return np.split(scores_N, np.cumsum(sizes)[:-1])


def scan_best(
    view: View, queries_QD: np.ndarray, k: int, positions: np.ndarray | None = None, weights_P: np.ndarray | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Top-k of each query, equal to `best` of `scan_rows`: positions, int64, and scores, float32.

    weights_P: positive float32 factor for the products of each row; None: 1. A sample of the rows gives a threshold per
    query, and only rows that reach it are collected (`picking`). If fewer than k rows reach it, all rows are scored for
    that query.
    """
    queries_QD = np.asarray(queries_QD, np.float32)
    positions = np.arange(len(view)) if positions is None else np.asarray(positions)
    if weights_P is not None:
        weights_P = np.ascontiguousarray(weights_P, np.float32)
    few = len(positions) <= 4 * _SAMPLE or k > _MANY * len(positions)
    if few or view.stored.dtype != "int8" or view.n_bases > 1:
        return _best_of_all(view, queries_QD, k, positions, weights_P)
    found = []
    at_once = picked_at_once(queries_QD.shape[1])
    for start in range(0, len(queries_QD), at_once):
        some_QD = queries_QD[start : start + at_once]
        pick = picking(some_QD)
        best_of = _best_of_all if pick is None else partial(_best_of_near, pick)
        found += best_of(view, some_QD, k, positions, weights_P)
    return found


Found = list[tuple[np.ndarray, np.ndarray]]
"""Per query: positions, int64, and their scores, float32."""


def _best_of_all(
    view: View, queries_QD: np.ndarray, k: int, positions: np.ndarray, weights_P: np.ndarray | None
) -> Found:
    scores_QP = scan_rows(view, queries_QD, positions)
    if weights_P is not None:
        scores_QP *= weights_P
    best_Q = [best(scores_P, k, view.ids_at) for scores_P in scores_QP]
    return [(places, scores_P[places]) for places, scores_P in zip(best_Q, scores_QP, strict=True)]


def _best_of_near(
    pick: Pick, view: View, queries_QD: np.ndarray, k: int, positions: np.ndarray, weights_P: np.ndarray | None
) -> Found:
    sample = positions[:: len(positions) // _SAMPLE]
    rank = -1 - int(2 * k * len(sample) / len(positions)) - _RANKS_MORE
    sampled_QN = scan_at(view, queries_QD, sample)
    if weights_P is not None:
        sampled_QN *= weights_P[sample]
    least_Q = np.partition(sampled_QN, rank, axis=1)[:, rank]
    near_Q = _no_less(view, queries_QD, pick, positions, weights_P, least_Q)
    short = [q for q, (places, _) in enumerate(near_Q) if len(places) < k]
    if short:
        for q, answer in zip(short, _best_of_all(view, queries_QD[short], k, positions, weights_P), strict=True):
            near_Q[q] = answer
    found = []
    for places, scores in near_Q:
        chosen = best(scores, k, partial(_ids_among, view, places))
        found.append((places[chosen], scores[chosen]))
    return found


def _no_less(
    view: View,
    queries_QD: np.ndarray,
    pick: Pick,
    positions: np.ndarray,
    weights_P: np.ndarray | None,
    least_Q: np.ndarray,
) -> Found:
    """Rows at the positions whose score reaches the query's least score, for each query."""

    most_Q = _most(queries_QD)

    def look(piece: Piece) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        weights_N = None if weights_P is None else weights_P[piece.at]
        within = None if piece.whole else piece.within
        query, number, score = pick(piece.codes, within, piece.scale, weights_N, least_Q)
        places, most_N = piece.positions[number], most_Q[query]
        _check(view, places, score, most_N if weights_P is None else most_N * weights_P[places].astype(np.float64))
        return query, places, score

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(look, view.stored.pieces(positions)))
    query_N, position_N, score_N = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(query_N, kind="stable")
    cuts = np.searchsorted(query_N[order], np.arange(1, len(least_Q)))
    return list(zip(np.split(position_N[order], cuts), np.split(score_N[order], cuts), strict=True))


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
            found_QP = _in_one_basis(view, block_QD[known_Q], here)
            scores_QP[np.ix_(known_Q, here)] = found_QP[:, here]
    return scores_QP


def _in_one_basis(view: View, queries_QD: np.ndarray, positions: np.ndarray | None) -> np.ndarray:
    scores_QP = np.full((len(queries_QD), len(view)), np.nan, np.float32)
    if positions is not None and len(positions) < _FEW:
        scores_QP[:, positions] = scan_at(view, queries_QD, positions)
        return scores_QP
    pieces = view.stored.pieces(positions)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(queries_QD), QUERIES_AT_ONCE):
            some_QP = scores_QP[start : start + QUERIES_AT_ONCE]
            some_QD = queries_QD[start : start + QUERIES_AT_ONCE]
            product, most_Q = PRODUCTS[view.stored.dtype](some_QD), _most(some_QD)

            def score(
                piece: Piece, some_QP: np.ndarray = some_QP, product: Product = product, most_Q: np.ndarray = most_Q
            ) -> None:
                _score(piece, product, some_QP)
                _check(view, piece.positions, some_QP[:, piece.at], most_Q)

            for _ in pool.map(score, pieces):
                pass
    return scores_QP


def _score(piece: Piece, product: Product, some_QP: np.ndarray) -> None:
    """Write the products of a piece's rows with the queries to some_QP, at the rows' positions."""
    codes, places, scale = piece.codes, piece.at, piece.scale
    if piece.whole and isinstance(places, slice):
        product(codes, scale, some_QP[:, places])
        return
    within = piece.within
    if len(within) < _SPARSE * len(codes):
        scores_QN = np.empty((len(some_QP), len(within)), np.float32)
        product(codes[within], scale, scores_QN)
        some_QP[:, places] = scores_QN
    else:
        scale_N = np.zeros(len(codes), np.float32)
        scale_N[within] = scale
        scores_QN = np.empty((len(some_QP), len(codes)), np.float32)
        product(codes, scale_N, scores_QN)
        some_QP[:, places] = scores_QN[:, within]


def _most(queries_QD: np.ndarray) -> np.ndarray:
    """The largest product that each query can have with a stored row, float64 [Q]."""
    most_Q: np.ndarray = _LONGEST * np.linalg.norm(queries_QD.astype(np.float64), axis=1) + np.finfo(np.float32).tiny
    return most_Q


def _check(view: View, positions: np.ndarray, scores: np.ndarray, most: np.ndarray) -> None:
    """DamagedError for a product that no unit row has: checksums do not tell who wrote the bytes.

    scores: float [Q, N], columns are the rows at `positions`, most [Q]; or [N], pairs of query and row, most [N].
    """
    if not scores.size:
        return
    if scores.ndim == 2:
        largest_Q = np.maximum(scores.max(axis=1), -scores.min(axis=1))
        if (largest_Q <= most).all():
            return
        most = most[:, None]
    wrong = ~(np.abs(scores) <= most)  # also NaN
    if wrong.any():
        column = int(np.argwhere(wrong)[0][-1])
        problem = view.ids_at(positions[column : column + 1])[0]
        raise DamagedError(
            f"{view.store.path}: collection {view.collection!r}: damaged: the row of problem {problem!r} is no unit row"
        )
