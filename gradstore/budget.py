"""How many dimensions, in how many bits each, for the bytes one can spend on a row.

What a stored row says about a gradient's cosine has two errors, both falling with the number of dimensions d:

    of the sketch        variance 1 / d              (a random projection to d dimensions)
    of the stored bits   variance INFLATION / d      (a quantiser for normal numbers)

So the variance is (1 + INFLATION) / d. A bit a dimension has 1.57 / d, and for the same bytes eight times the
dimensions of int8: many dimensions of few bits win as long as a gradient has dimensions to give.
"""

from dataclasses import dataclass
from math import pi

from gradstore.errors import RequestError
from gradstore.layout import row_arrays

INFLATION = {"1bit": pi / 2 - 1, "int4": 0.0120, "int8": 8e-5, "fp16": 2e-7, "fp32": 0.0}
"""Variance that quantising adds, as a share of the sketch's own. One bit: the cosine of a normal row with its signs
is sqrt(2/pi). int4: distortion 0.0118 of the 15-level quantiser (J. Max 1960, table II). int8, fp16: measured."""
_BITS = {"1bit": 1, "int4": 4, "int8": 8, "fp16": 16, "fp32": 32}
_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class RowFormat:
    """`dim` and `dtype` for `gradstore.create`."""

    dim: int
    dtype: str
    code_bytes: int
    """Bytes of a row's codes."""
    row_bytes: int
    """Bytes of a row in all arrays."""
    cosine_error: float
    """Expected standard deviation of a cosine from the unsketched one, where that is small."""


def row_format(code_bytes: int, max_dim: int | None = None) -> RowFormat:
    """The dimensions and the type with the smallest error of a cosine whose codes fit in `code_bytes` bytes a row.

    max_dim: dimensions the sketch can have at most (what the projection can afford, or the model's gradient has);
    None: any number. Dimensions are a multiple of 64 where they are more than 64.
    """
    for name, value in (("code_bytes", code_bytes), ("max_dim", 1 if max_dim is None else max_dim)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RequestError(f"{name} must be a whole number of at least 1, not {value!r}")
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
