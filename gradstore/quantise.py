"""Quantisation of rows: encodes a row as codes of its direction, a scale to unit length and a norm; and decodes it.

    int8   codes = rint(127 row / max|row|)
    int4   codes = clip(rint(row / step), -7, 7), two per byte, the first in the low four bits, two's complement
    1bit   one bit per dimension, 1 where row > 0, eight per byte, the first in the lowest bit; its value is 2 bit - 1
    fp16   codes = row / |row|        (raw rows would underflow: gradients are small)
    fp32   codes = row / |row|

For every dtype `scale = 1 / |codes|`, so a decoded row `codes * scale` has length 1, and quantisation of the length
does not bias a cosine. A row of zeros has codes, scale and norm 0.

D sketch dimensions, P rows (problems), W bytes or elements of codes per row.
"""

import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from gradstore.durable import PAGE
from gradstore.layout import row_arrays

log = logging.getLogger(__name__)

GAUSS_STEP = 0.3534
"""Step of the uniform quantiser with 15 levels that is optimal for a Gaussian, in units of its standard
deviation: J. Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6 (1960), table II, N = 15."""

_INT4_BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""int4 steps tried per row, as positions on a log scale from the Gaussian step to max/7. Rows of real gradients have
heavier tails than a Gaussian, and the weight of the tails differs from row to row."""

_BLOCK_BYTES = 1 << 19
"""Size of a block of rows: all passes over a block stay in the processor's cache."""

_TINY = np.float32(1e-30)
"""For a peak above this, 127 / peak is finite."""
_TASK_BLOCKS = 8
"""Blocks per task of a thread."""

_NIBBLES = np.array([value - 16 if value > 7 else value for value in range(16)], dtype=np.float32)
_PAIRS = np.stack([np.tile(_NIBBLES, 16), np.repeat(_NIBBLES, 16)], axis=1).copy().view(np.uint64).ravel()
"""Lookup table: byte -> its two int4 values as float32, in one 8-byte entry."""


def encode(rows_P_D: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Encode float32 rows: codes [P, W], scale float32 [P], L2 norm float64 [P] and peak float32 [P].

    rows_P_D is contiguous. The peak is a row's largest absolute value. It is not finite exactly if the row is not; such
    a row gets codes and scale 0, like a row of zeros. Rows are first scaled to a common peak, so huge rows do not
    overflow and tiny rows do not underflow. With many rows, all cores work.
    """
    n_rows, dim = rows_P_D.shape
    array = row_arrays(dim, dtype)[0]
    codes = _aligned_empty(array.shape(n_rows), array.dtype)
    scale = np.zeros(n_rows, dtype=np.float32)
    norm = np.zeros(n_rows, dtype=np.float64)
    peaks_P = np.zeros(n_rows, dtype=np.float32)
    compiled = _compiled() if dtype == "int8" else None
    encode_block = {"int8": _int8, "int4": _int4, "1bit": _sign, "fp16": _unit, "fp32": _unit}[dtype]
    largest = np.float32(127 if dtype == "int8" else 1)
    block_rows = max(1, _BLOCK_BYTES // (4 * dim))

    def encode_rows(start: int, stop: int) -> None:
        if compiled is not None:
            part = slice(start, stop)
            compiled(rows_P_D[part], codes[part], scale[part], norm[part], peaks_P[part], dim)
            return
        scratch = np.empty((min(block_rows, stop - start), dim), dtype=np.float32)
        for first in range(start, stop, block_rows):
            block = slice(first, min(first + block_rows, stop))
            rows = rows_P_D[block]
            peak = peaks_P[block] = np.maximum(rows.max(axis=1), np.abs(rows.min(axis=1)))
            some = np.isfinite(peak) & (peak > 0)
            scaled = scratch[: len(peak)]
            if np.all(some & (peak > _TINY)):
                np.multiply(rows, (largest / peak)[:, None], out=scaled)
            else:
                scaled[...] = 0
                scaled[some] = rows[some] / peak[some, None] * largest
            length = _lengths(scaled)
            norm[block] = np.where(some, peak, 0) / np.float64(largest) * length
            code_length = encode_block(scaled, np.where(some, length, 1), codes[block])
            scale[block] = np.where(some, 1 / np.where(some, code_length, 1), 0)

    task_rows = _TASK_BLOCKS * block_rows
    starts = range(0, n_rows, task_rows)
    stops = [min(start + task_rows, n_rows) for start in starts]
    if len(starts) < 2:
        list(map(encode_rows, starts, stops))
    else:
        list(_threads(os.getpid()).map(encode_rows, starts, stops))
    return codes, scale, norm, peaks_P


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Like np.empty, but page-aligned, as direct writes past the page cache require."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + PAGE, dtype=np.uint8)
    start = -memory.ctypes.data % PAGE
    return memory[start : start + size].view(dtype).reshape(shape)


@cache
def _threads(_process: int) -> ThreadPoolExecutor:
    """Thread pool with one thread per core, reused between calls; a forked process makes its own."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), "encode")


@cache
def _compiled() -> Callable[..., None] | None:
    """The compiled encoder of `_encode.c`; None if it was not built: then numpy does the same work."""
    try:
        from gradstore._encode import encode_int8
    except ImportError:
        log.warning("gradstore was installed without a C compiler: rows are encoded by numpy, three times slower")
        return None
    return encode_int8


def decode(codes: np.ndarray, scale: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Decode codes [P, W] and scale [P] to unit rows, written to `out`, float32 [P, D]."""
    if dtype == "int4":
        dim = out.shape[1]
        pairs = _PAIRS[codes].view(np.float32)
        np.multiply(pairs[:, :dim], scale[:, None], out=out)
    elif dtype == "1bit":
        bits = np.unpackbits(codes, axis=1, count=out.shape[1], bitorder="little")
        np.multiply(bits, 2 * scale[:, None], out=out)
        out -= scale[:, None]
    else:
        np.multiply(codes, scale[:, None], out=out)


def _lengths(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.vecdot(rows, rows).astype(np.float64))


def _int8(scaled: np.ndarray, _length: np.ndarray, codes: np.ndarray) -> np.ndarray:
    np.rint(scaled, out=scaled)
    codes[...] = scaled
    return _lengths(scaled)


def _unit(scaled: np.ndarray, length: np.ndarray, codes: np.ndarray) -> np.ndarray:
    scaled /= length.astype(np.float32)[:, None]
    codes[...] = scaled
    if codes.dtype != scaled.dtype:
        scaled[...] = codes
    return _lengths(scaled)


def _sign(scaled: np.ndarray, _length: np.ndarray, codes: np.ndarray) -> np.ndarray:
    codes[...] = np.packbits(scaled > 0, axis=1, bitorder="little")
    return np.full(len(scaled), np.sqrt(scaled.shape[1]))


def _int4(scaled: np.ndarray, length: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """int4 codes; tries several steps per row and keeps the one whose codes have the largest cosine with the row."""
    dim = scaled.shape[1]
    narrow = np.maximum(GAUSS_STEP * length / np.sqrt(dim), 1e-30)
    best = np.zeros_like(scaled)
    best_cosine = np.full(len(scaled), -1.0)
    trial = np.empty_like(scaled)
    for blend in _INT4_BLENDS:
        per_step = 1 / (narrow ** (1 - blend) * (1 / 7) ** blend)
        np.multiply(scaled, per_step.astype(np.float32)[:, None], out=trial)
        np.rint(trial, out=trial)
        np.clip(trial, -7, 7, out=trial)
        squared = np.einsum("pd,pd->p", trial, trial).astype(np.float64)
        cosine = np.einsum("pd,pd->p", trial, scaled) / np.sqrt(np.maximum(squared, 1))
        better = cosine > best_cosine
        best[better] = trial[better]
        best_cosine[better] = cosine[better]
    nibbles = best.astype(np.int8).view(np.uint8)
    nibbles &= 15
    codes[...] = nibbles[:, 0::2]
    codes[:, : dim // 2] |= nibbles[:, 1::2] << 4
    return _lengths(best)
