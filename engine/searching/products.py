"""Inner products of stored codes with queries, without decoding; a scan (scan.py) calls them for each block of rows.

    q  =  w0 q0 + w1 q1 + ...          row . q  =  scale * (w0 (codes . q0) + w1 (codes . q1) + ...)

A query is a weighted sum of a few vectors in the rows' own type, its digits. Codes are multiplied with digits in
integer arithmetic (fp16 and fp32 rows: in floats); the products are then weighted and added. int8 rows take three
digits, int4 rows six, fp16 rows two and fp32 rows one. The rest of q is below 1.3e-7 of its largest entry, less than
the rounding of float32 products. 1-bit rows are unpacked to bytes -1 and 1, one cache-sized block at a time.

numkong computes the products. For bytes, _products.c computes the same integers faster: with AVX512-VNNI (if the
processor has no AMX) for any number of queries, with AVX2 for a few. An installation without a C compiler gets the same
scores.

Q queries, D sketch dimensions, W columns of codes, G digits of a query, C digits of all queries, N rows of a block.
"""

import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Literal

import numkong
import numpy as np

log = logging.getLogger(__name__)

SAFE_COLUMNS = (2**31 - 1) // 127**2
"""Most columns for which a sum of int8 products cannot overflow int32."""
_UNPACKED_BYTES = 1 << 20
"""Size of a block of unpacked 1-bit rows: fits in the cache."""
_COLUMNS_AT_ONCE = 4
"""numkong's kernels process four vectors at a time; three took an eighth longer than four."""
_LANES = 16
_LINE = 64
_NARROW = (3, 6)
"""Numbers of vectors that _products.c multiplies element by element; more vectors become SIMD lanes."""
_FEW_QUERIES = 5
"""So few queries are multiplied one by one: in the wide order most lanes would be empty."""
_MOST_COLUMNS = 48
"""Most digit vectors that _products.c multiplies at once."""
_FIRST_DIGITS_BYTES = 1 << 14
"""With AVX2 the first digits of the queries of a `picking` should stay in the first-level cache, beside four rows."""
_EVERY, _ONES = np.empty(0, np.int64), np.empty(0, np.float32)
"""What `_products.c` gets for "all rows" and "every weight is 1"."""
_ROUNDED = 1e-6
"""Rounding allowance, as a share of a query's length: above the float32 rounding of scores and row lengths."""

Kind = Literal["int8", "int4", "float16", "float32"]
Product = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
"""(codes [N, W], scale float32 [N], out float32 [Q, N]): writes the products of codes * scale with every query."""
ProductOf = Callable[[np.ndarray], Product]
"""float32 queries [Q, D] -> their Product."""
ProductApart = Callable[[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]
"""Product of scattered rows: arrays of codes, each row's array and its place there, int64 [N]; scale and out follow."""
ProductOfPairs = Callable[[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]
"""The same with one query per row: its number, int64 [N], comes before the scale; out is float32 [N]."""
Pick = Callable[
    [np.ndarray, np.ndarray | None, np.ndarray, np.ndarray | None, np.ndarray],
    tuple[np.ndarray, np.ndarray, np.ndarray],
]
"""(codes [M, W], rows int64 [N] or None for all, scale float32 [N], weights float32 [N] or None for 1, least score per
query float32 [Q]) -> the pairs whose product * weight reaches the least score: query uint8, index into rows int32,
score float32."""


def digits_of(queries_QD: np.ndarray, largest: int, n_digits: int) -> tuple[np.ndarray, np.ndarray]:
    """Write queries as weighted sums of integers: int8 digits [G, Q, D] in [-largest, largest], weights float64 [G, Q].

    The rest after a digit is at most half its step, so the next step is this step / (2 * largest).
    """
    digits, weights = np.empty((n_digits, *queries_QD.shape), np.int8), np.empty((n_digits, len(queries_QD)))
    kernel = _kernel() if (largest, n_digits) == (127, 3) else None
    if kernel is not None and registers() == 512:
        kernel.digits_int8(queries_QD.shape[1], np.ascontiguousarray(queries_QD, np.float32), digits, weights)
        return digits, weights
    rest_QD = queries_QD.astype(np.float64)
    step_Q = np.abs(rest_QD).max(axis=1) / largest
    digit_QD = np.zeros_like(rest_QD)
    for g in range(n_digits):
        step_Q1 = step_Q[:, None]
        np.divide(rest_QD, step_Q1, out=digit_QD, where=step_Q1 > 0)
        digits[g] = np.rint(digit_QD, out=digit_QD)
        rest_QD -= np.multiply(digit_QD, step_Q1, out=digit_QD)
        weights[g], step_Q = step_Q, step_Q / (2 * largest)
    return digits, weights


def int8_product(queries_QD: np.ndarray) -> Product:
    digits, weights_GQ = digits_of(queries_QD, 127, 3)
    return _compiled_product(digits, weights_GQ) or _weighed(digits, weights_GQ, "int8", SAFE_COLUMNS)


def int8_product_apart(queries_QD: np.ndarray) -> ProductApart | None:
    """Product of scattered rows without copying them, equal to `int8_product` of copies; None without the kernel."""
    kernel, width = _kernel(), queries_QD.shape[1]
    if kernel is None or width > SAFE_COLUMNS or 3 * len(queries_QD) > _MOST_COLUMNS:
        return None
    digits, weights_GQ = digits_of(queries_QD, 127, 3)
    (ordered, starts), score = _ordered(digits.reshape(-1, width)), kernel.score_apart_int8

    def product(
        arrays: list[np.ndarray], array_N: np.ndarray, within_N: np.ndarray, scale_N: np.ndarray, out_QN: np.ndarray
    ) -> None:
        score(arrays, array_N, within_N, width, ordered, starts, weights_GQ, scale_N, out_QN)

    return product


def int8_product_of_pairs(queries_QD: np.ndarray) -> ProductOfPairs | None:
    """Product of scattered rows, each with one of the queries, equal to `int8_product`; None without the kernel."""
    kernel, width = _kernel(), queries_QD.shape[1]
    if kernel is None or width > SAFE_COLUMNS:
        return None
    (digits, starts), weights_QG = _by_query(*digits_of(queries_QD, 127, 3))

    def product(
        arrays: list[np.ndarray],
        array_N: np.ndarray,
        within_N: np.ndarray,
        query_N: np.ndarray,
        scale_N: np.ndarray,
        out_N: np.ndarray,
    ) -> None:
        kernel.score_pairs_int8(arrays, array_N, within_N, query_N, width, digits, starts, weights_QG, scale_N, out_N)

    return product


def int8_sums(columns_KW: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Function from int8 rows [N, W] to their exact sums of products with int8 columns: whole numbers [N, K]."""
    n, width = columns_KW.shape
    filled = np.ascontiguousarray(np.pad(columns_KW, ((0, -n % _COLUMNS_AT_ONCE), (0, 0))))
    parts = [slice(start, start + SAFE_COLUMNS) for start in range(0, width, SAFE_COLUMNS)]
    packed = [_pack(np.ascontiguousarray(filled[:, part]), "int8") for part in parts]

    def sums(rows_NW: np.ndarray) -> np.ndarray:
        if len(parts) == 1:
            return np.asarray(numkong.dots_packed(rows_NW, packed[0]))[:, :n]
        each = (
            np.asarray(numkong.dots_packed(np.ascontiguousarray(rows_NW[:, part]), own)).astype(np.int64)
            for part, own in zip(parts, packed, strict=True)
        )
        return np.sum(list(each), axis=0)[:, :n]

    return sums


def _int4_product(queries_QD: np.ndarray) -> Product:
    digits, weights_GQ = digits_of(queries_QD, 7, 6)
    digits = np.pad(digits, ((0, 0), (0, 0), (0, digits.shape[2] % 2))).view(np.uint8)
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
    of_bytes = int8_product(queries_QD)
    dim = queries_QD.shape[1]
    block = max(1, _UNPACKED_BYTES // dim)

    def product(codes: np.ndarray, scale_N: np.ndarray, out_QN: np.ndarray) -> None:
        for start in range(0, len(codes), block):
            part = slice(start, start + block)
            signs = np.unpackbits(codes[part], axis=1, count=dim, bitorder="little").view(np.int8)
            signs += signs
            signs -= 1
            of_bytes(signs, scale_N[part], out_QN[:, part])

    return product


@cache
def _kernel() -> ModuleType | None:
    """The compiled module of `_products.c`; None if it was not built or this processor does not support it."""
    try:
        from gradstore.engine.searching import _products
    except ImportError:
        log.warning("gradstore was installed without a C compiler: scans for several queries take half as long again")
        return None
    return _products if _products.registers() else None


def registers() -> int:
    """Bits of the vector registers that the compiled module uses: 512 (AVX512-VNNI) or 256 (AVX2); 0 without it."""
    kernel = _kernel()
    return 0 if kernel is None else int(kernel.registers())


def _compiled_product(digits_GQW: np.ndarray, weights_GQ: np.ndarray) -> Product | None:
    """Product with int8 digits by `_products.c`; None where it cannot be used or numkong is faster."""
    kernel, width = _kernel(), digits_GQW.shape[2]
    if kernel is None or width > SAFE_COLUMNS or (weights_GQ.size > _NARROW[-1] and _has_tiles()):
        return None
    if registers() == 256 and weights_GQ.size > 3 * _FEW_QUERIES:
        return None
    (ordered, starts), score = _ordered(digits_GQW.reshape(-1, width)), kernel.score_int8
    weights_GQ = np.ascontiguousarray(weights_GQ)

    def product(codes: np.ndarray, scale_N: np.ndarray, out_QN: np.ndarray) -> None:
        score(codes, width, ordered, starts, weights_GQ, scale_N, out_QN)

    return product


def _has_tiles() -> bool:
    """Whether numkong multiplies bytes with AMX, which is several times faster than AVX512-VNNI."""
    return bool(numkong.get_capabilities().get("sapphireamx"))


def picked_at_once(width: int) -> int:
    """Most queries per `picking`, which multiplies one digit vector per query."""
    if registers() != 256:
        return _MOST_COLUMNS
    return min(_MOST_COLUMNS, max(_FEW_QUERIES, _FIRST_DIGITS_BYTES // width))


def picking(queries_QD: np.ndarray) -> Pick | None:
    """Pick function that finds the rows whose scores reach a threshold; the first digit alone rules out most rows.

    For a row of at most unit length, the other digits add at most the length of the query's rest after the first digit
    (Cauchy-Schwarz). Scores equal those of `int8_product` bit for bit. At most `picked_at_once` queries.
    None without the kernel, or where numkong is faster.
    """
    kernel, (n_queries, width) = _kernel(), queries_QD.shape
    one_by_one = n_queries <= _FEW_QUERIES or registers() == 256
    if kernel is None or width > SAFE_COLUMNS or not (one_by_one or not _has_tiles()):
        return None
    digits_GQD, weights_GQ = digits_of(queries_QD, 127, 3)
    first = np.empty(0, np.int8) if one_by_one else _wide(digits_GQD[0])
    (digits, starts), weights_QG = _by_query(digits_GQD, weights_GQ)
    lengths_Q = np.linalg.norm(queries_QD.astype(np.float64), axis=1)
    left_Q = np.linalg.norm(queries_QD - digits_GQD[0] * weights_GQ[0][:, None], axis=1) + _ROUNDED * lengths_Q
    left_Q = left_Q.astype(np.float32)

    def pick(
        codes: np.ndarray,
        places_N: np.ndarray | None,
        scale_N: np.ndarray,
        weights_N: np.ndarray | None,
        least_Q: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        most = n_queries * len(scale_N)
        places_N = _EVERY if places_N is None else places_N
        weights_N = _ONES if weights_N is None else weights_N
        found = np.empty(most, np.uint8), np.empty(most, np.int32), np.empty(most, np.float32)
        asked = first, digits, starts, weights_QG, left_Q, np.ascontiguousarray(least_Q, np.float32)
        n = kernel.pick_int8(width, codes, places_N, scale_N, weights_N, *asked, *found)
        return found[0][:n].copy(), found[1][:n].copy(), found[2][:n].copy()

    return pick


def _ordered(digits_CW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 digits in the layout that `_products.c` reads for this number, zero-padded; and each sum's start, int32."""
    n = len(digits_CW)
    if registers() == 256:
        return _narrow(digits_CW)
    columns = next((most for most in _NARROW if n <= most), None)
    if columns is None:
        return _wide(digits_CW), np.zeros(-(-n // _LANES) * _LANES, np.int32)
    return _narrow(_filled_up(digits_CW, columns, 1))


def _by_query(digits_GQW: np.ndarray, weights_GQ: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Digits in the narrow order, those of a query together, and each sum's start; weights [Q, G]."""
    ordered = _narrow(digits_GQW.swapaxes(0, 1).reshape(-1, digits_GQW.shape[2]))
    return ordered, np.ascontiguousarray(weights_GQ.T)


def _narrow(digits_CW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    padded = _filled_up(digits_CW, 1, _LINE)
    return padded, (-128 * padded.sum(axis=1, dtype=np.int64)).astype(np.int32)


def _wide(digits_CW: np.ndarray) -> np.ndarray:
    padded = _filled_up(digits_CW, _LANES, 4)
    moved = (padded.view(np.uint8) ^ 128).reshape(len(padded), -1, 4)
    return np.ascontiguousarray(moved.swapaxes(0, 1))


def _filled_up(digits_CW: np.ndarray, columns: int, places: int) -> np.ndarray:
    """Pad with zeros to multiples of `columns` and `places`."""
    n, width = digits_CW.shape
    if n % columns == 0 and width % places == 0:
        return digits_CW
    filled = np.zeros((-(-n // columns) * columns, -(-width // places) * places), np.int8)
    filled[:n, :width] = digits_CW
    return filled


def _weighed(digits: np.ndarray, weights_GQ: np.ndarray, kind: Kind, safe_columns: int | None = None) -> Product:
    """Product by numkong with digits [G, Q, W] of type `kind`: a weighted sum over the digits."""
    n_digits, n_queries, width = digits.shape
    flat = digits.reshape(n_digits * n_queries, width)
    flat = np.ascontiguousarray(np.pad(flat, ((0, -len(flat) % _COLUMNS_AT_ONCE), (0, 0))))
    stops = range(0, width, safe_columns or width)
    packed = [
        (columns, _pack(flat[:, columns], kind)) for columns in (slice(s, s + (safe_columns or width)) for s in stops)
    ]

    def product(codes: np.ndarray, scale_N: np.ndarray, out_QN: np.ndarray) -> None:
        total_NQ = np.zeros((len(codes), n_queries))
        term_NQ = np.empty_like(total_NQ)
        for columns, matrix in packed:
            part = np.asarray(numkong.dots_packed(_tensor(codes[:, columns], kind), matrix))
            for digit in range(n_digits):
                np.multiply(part[:, digit * n_queries : (digit + 1) * n_queries], weights_GQ[digit], out=term_NQ)
                total_NQ += term_NQ
        total_NQ *= scale_N[:, None]
        out_QN[...] = total_NQ.T

    return product


def _pack(rows: np.ndarray, kind: Kind) -> "numkong.PackedMatrix":
    return numkong.dots_pack(_tensor(rows, kind), dtype=kind)


def _tensor(rows: np.ndarray, kind: Kind) -> "numkong.Tensor | np.ndarray":
    """Rows as numkong accepts them: numpy has no type for two numbers per byte."""
    if kind != "int4":
        return rows
    return numkong.from_pointer(rows.ctypes.data, rows.shape, kind, strides=rows.strides, owner=rows)


PRODUCTS: dict[str, ProductOf] = {
    "int8": int8_product,
    "int4": _int4_product,
    "1bit": _bit_product,
    "fp16": _half_product,
    "fp32": _float_product,
}
