"""The exact scan: products of stored rows with queries, straight from the mapped chunk files.

Rows are never decoded. A query is written as a sum of a few vectors in the rows' own type (its digits), numkong
multiplies codes with digits in whole numbers, and the digits' products are weighed and added:

    q  =  w0 q0 + w1 q1 + ...          row . q  =  scale * (w0 (codes . q0) + w1 (codes . q1) + ...)

int8 rows take three digits, int4 rows six, fp16 rows two and fp32 rows one: what is left of q after them is below
1.3e-7 of its largest entry, less than float32 products lose. Rows of one bit are unpacked to bytes 0 and 1, a
block that fits in the cache at a time. A digit more costs almost nothing: one query is bound by reading the rows.

Rows that a query does not want (superseded, deleted, not live, filtered out) are skipped by whole chunks, scored
and thrown away where they lie among wanted ones, and only where few of a chunk are wanted are those copied together.

P problems of a view, Q queries, D sketch dimensions, W columns of codes, G digits of a query, N rows of a block.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numkong
import numpy as np

from engine.searching.blocks import blocks_of
from gradstore import View
from gradstore.view import Piece

QUERIES_AT_ONCE = 16
"""More queries are answered in several passes: beyond this the arithmetic, not the reading, is what takes time."""
_FEW = 4096
"""Rows that one core scores sooner than threads begin."""
_SPARSE = 0.25
"""Below this share of wanted rows between the first and the last wanted one of a chunk, they are copied together."""
_UNPACKED_BYTES = 1 << 20
"""Of a block of one-bit rows as bytes: fits in the cache."""
_COLUMNS_AT_ONCE = 4
"""numkong's kernels take four vectors at a time; three took an eighth longer than four."""
_SAFE_COLUMNS = (2**31 - 1) // 127**2
"""Columns over which products of int8 cannot leave int32."""

Kind = Literal["int8", "int4", "float16", "float32"]
Product = Callable[[np.ndarray], np.ndarray]
"""codes [N, W] -> products of the codes, as numbers, with every query: float64 [N, Q]."""


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
    return _in_one_basis(view, queries_QD, positions)


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
    pieces = view.pieces(positions)
    few = positions is not None and len(positions) < _FEW
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(queries_QD), QUERIES_AT_ONCE):
            some_QP = scores_QP[start : start + QUERIES_AT_ONCE]
            product = _PRODUCTS[view.store.dtype](queries_QD[start : start + QUERIES_AT_ONCE])

            def score(piece: Piece, some_QP: np.ndarray = some_QP, product: Product = product) -> None:
                some_QP[:, _as_slice(piece.positions)] = _score(piece, product).T

            if few:  # Starting threads takes longer than scoring a few rows: an unused pool starts none.
                _score_few(pieces, some_QP, product)
                continue
            for _ in pool.map(score, pieces):
                pass
    return scores_QP


def _score(piece: Piece, product: Product) -> np.ndarray:
    """Products of a piece's rows with the queries: float64 [N, Q]."""
    codes, within = piece.span()
    if len(within) == len(codes):
        products_NQ = product(codes)
    elif len(within) < _SPARSE * len(codes):
        products_NQ = product(codes[within])
    else:
        products_NQ = product(codes)[within]
    products_NQ *= piece.scale[:, None]
    return products_NQ


def _score_few(pieces: list[Piece], some_QP: np.ndarray, product: Product) -> None:
    """Scores of a few rows that are spread over many chunks, copied together."""
    if not pieces:
        return
    codes = np.concatenate([span[within] for span, within in (piece.span() for piece in pieces)])
    products_NQ = product(codes) * np.concatenate([piece.scale for piece in pieces])[:, None]
    some_QP[:, np.concatenate([piece.positions for piece in pieces])] = products_NQ.T


def _as_slice(places: np.ndarray) -> slice | np.ndarray:
    """Places as a slice where they are consecutive: assigning to it is many times faster."""
    first, last = int(places[0]), int(places[-1])
    consecutive = last - first + 1 == len(places) and bool(np.all(places[1:] > places[:-1]))
    return slice(first, last + 1) if consecutive else places


def _digits(queries_QD: np.ndarray, largest: int, n_digits: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries as sums of vectors of whole numbers: digits [G, Q, D] in [-largest, largest], weights float64 [G, Q].

    A digit's step is the one before it over 2 * largest + 1, at most half of which was left over.
    """
    rest_QD = queries_QD.astype(np.float64)
    step_Q = np.abs(rest_QD).max(axis=1) / largest
    digits, weights = [], []
    for _ in range(n_digits):
        digit_QD = np.rint(rest_QD / np.where(step_Q > 0, step_Q, 1)[:, None])
        digit_QD = np.clip(digit_QD, -largest, largest)
        rest_QD -= digit_QD * step_Q[:, None]
        digits.append(digit_QD)
        weights.append(step_Q)
        step_Q = step_Q / (2 * largest)
    return np.stack(digits), np.stack(weights)


def _int8_product(queries_QD: np.ndarray) -> Product:
    digits, weights_GQ = _digits(queries_QD, 127, 3)
    return _weighed(digits.astype(np.int8), weights_GQ, "int8", _SAFE_COLUMNS)


def _int4_product(queries_QD: np.ndarray) -> Product:
    digits, weights_GQ = _digits(queries_QD, 7, 6)
    digits = np.pad(digits, ((0, 0), (0, 0), (0, digits.shape[2] % 2))).astype(np.int8).view(np.uint8)
    return _weighed((digits[..., 0::2] & 15) | (digits[..., 1::2] << 4), weights_GQ, "int4")


def _half_product(queries_QD: np.ndarray) -> Product:
    peak_Q = np.abs(queries_QD).max(axis=1).astype(np.float64)
    units_QD = queries_QD / np.where(peak_Q > 0, peak_Q, 1)[:, None]
    high_QD = units_QD.astype(np.float16)
    low_QD = ((units_QD - high_QD) * 2048).astype(np.float16)
    return _weighed(np.stack([high_QD, low_QD]), np.stack([peak_Q, peak_Q / 2048]), "float16")


def _float_product(queries_QD: np.ndarray) -> Product:
    return _weighed(queries_QD[None], np.ones((1, len(queries_QD))), "float32")


def _bit_product(queries_QD: np.ndarray) -> Product:
    """A row's codes are 2 bits - 1: twice the product with the bits, less the sum of the query."""
    of_bytes = _int8_product(queries_QD)
    dim = queries_QD.shape[1]
    digits, weights_GQ = _digits(queries_QD, 127, 3)
    sums_Q = np.einsum("gqd,gq->q", digits, weights_GQ)
    block = max(1, _UNPACKED_BYTES // dim)

    def product(codes: np.ndarray) -> np.ndarray:
        products_NQ = np.empty((len(codes), len(queries_QD)))
        for start in range(0, len(codes), block):
            bits = np.unpackbits(codes[start : start + block], axis=1, count=dim, bitorder="little")
            products_NQ[start : start + block] = of_bytes(bits.view(np.int8))
        products_NQ *= 2
        products_NQ -= sums_Q
        return products_NQ

    return product


def _weighed(digits: np.ndarray, weights_GQ: np.ndarray, kind: Kind, safe_columns: int | None = None) -> Product:
    """Products with digits [G, Q, W] of numkong's type `kind`, weighed and added over the digits."""
    n_digits, n_queries, width = digits.shape
    flat = digits.reshape(n_digits * n_queries, width)
    flat = np.ascontiguousarray(np.pad(flat, ((0, -len(flat) % _COLUMNS_AT_ONCE), (0, 0))))
    stops = range(0, width, safe_columns or width)
    packed = [
        (columns, _pack(flat[:, columns], kind)) for columns in (slice(s, s + (safe_columns or width)) for s in stops)
    ]

    def product(codes: np.ndarray) -> np.ndarray:
        total_NQ = np.zeros((len(codes), n_queries))
        term_NQ = np.empty_like(total_NQ)
        for columns, matrix in packed:
            part = np.asarray(numkong.dots_packed(_tensor(codes[:, columns], kind), matrix))
            for digit in range(n_digits):
                np.multiply(part[:, digit * n_queries : (digit + 1) * n_queries], weights_GQ[digit], out=term_NQ)
                total_NQ += term_NQ
        return total_NQ

    return product


def _pack(rows: np.ndarray, kind: Kind) -> "numkong.PackedMatrix":
    return numkong.dots_pack(_tensor(rows, kind), dtype=kind)


def _tensor(rows: np.ndarray, kind: Kind) -> "numkong.Tensor | np.ndarray":
    """Rows as numkong takes them: numpy has no type for two numbers a byte."""
    if kind != "int4":
        return rows
    return numkong.from_pointer(rows.ctypes.data, rows.shape, kind, strides=rows.strides, owner=rows)


_PRODUCTS: dict[str, Callable[[np.ndarray], Product]] = {
    "int8": _int8_product,
    "int4": _int4_product,
    "1bit": _bit_product,
    "fp16": _half_product,
    "fp32": _float_product,
}
