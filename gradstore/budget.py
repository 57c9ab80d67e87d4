"""Row budget: chooses dimensions and dtype for a given number of bytes per row.

A cosine computed from stored rows has two errors. Both fall with the number of dimensions d:

    of the sketch        variance 1 / d              (a random projection to d dimensions)
    of the stored bits   variance INFLATION / d      (a quantiser for normal numbers)

The total variance is (1 + INFLATION) / d. One bit per dimension has 1.57 / d, but for the same bytes eight times the
dimensions of int8. Many dimensions of few bits are better, as long as the gradient has enough dimensions.
"""

from dataclasses import dataclass
from math import pi

from gradstore.header import whole_number
from gradstore.layout import row_arrays

INFLATION = {"1bit": pi / 2 - 1, "int4": 0.0120, "int8": 8e-5, "fp16": 2e-7, "fp32": 0.0}
"""Variance added by quantisation, relative to the sketch's own. 1bit: the cosine of a normal row with its signs is
sqrt(2/pi). int4: distortion 0.0118 of the 15-level quantiser (J. Max 1960, table II). int8, fp16: measured."""
_BITS = {"1bit": 1, "int4": 4, "int8": 8, "fp16": 16, "fp32": 32}
_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class RowFormat:
    """Result of `row_format`: `dim` and `dtype` for `gradstore.create`, with their sizes and error."""

    dim: int
    dtype: str
    code_bytes: int
    """Bytes of a row's codes."""
    row_bytes: int
    """Bytes of a row in all arrays."""
    cosine_error: float
    """Expected standard deviation of the error of a cosine, for small cosines."""


def row_format(code_bytes: int, max_dim: int | None = None) -> RowFormat:
    """Dimensions and dtype with the smallest cosine error whose codes fit in `code_bytes` bytes per row.

    max_dim: largest number of dimensions (limited by the cost of the projection, or the model's gradient); None: no
    limit. Above 64, dimensions are a multiple of 64. RequestError unless both are integers of at least 1.
    """
    for name, value in (("code_bytes", code_bytes), ("max_dim", 1 if max_dim is None else max_dim)):
        whole_number(name, value)
    found = []
    for dtype, bits in _BITS.items():
        dim = code_bytes * 8 // bits
        dim = dim if max_dim is None else min(dim, max_dim)
        dim = dim // _MULTIPLE * _MULTIPLE if dim > _MULTIPLE else dim
        if dim:
            arrays = row_arrays(dim, dtype)
            error = ((1 + INFLATION[dtype]) / dim) ** 0.5
            size = sum(array.row_bytes for array in arrays)
            found.append(RowFormat(dim, dtype, arrays[0].row_bytes, size, error))
    return min(found, key=lambda choice: choice.cosine_error)
