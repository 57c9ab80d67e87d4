"""The choice of dimensions and bits: it fits, no other fits better, and its error is the one measured."""

import numpy as np
import pytest

import gradstore
from gradstore.budget import INFLATION
from gradstore.layout import DTYPES, row_arrays
from gradstore.quantise import decode, encode


@pytest.mark.parametrize("code_bytes", [1, 9, 512, 1024, 4096])
@pytest.mark.parametrize("max_dim", [None, 1, 100, 1024, 4096, 6000])
def test_the_choice_fits(code_bytes: int, max_dim: int | None) -> None:
    """A row larger than the budget, or wider than the sketch can be, is of no use."""
    choice = gradstore.row_format(code_bytes, max_dim)
    assert choice.code_bytes == row_arrays(choice.dim, choice.dtype)[0].row_bytes <= code_bytes
    assert max_dim is None or choice.dim <= max_dim
    assert choice.row_bytes == choice.code_bytes + 31


def test_dimensions_before_bits() -> None:
    """Bits are spent only where dimensions have run out."""
    assert gradstore.row_format(4096).dtype == "1bit"
    assert gradstore.row_format(4096).dim == 32768
    chosen = [gradstore.row_format(4096, dim) for dim in (32768, 8192, 4096, 2048, 1024)]
    assert [c.dtype for c in chosen] == ["1bit", "int4", "int8", "fp16", "fp32"]
    assert [c.dim for c in chosen] == [32768, 8192, 4096, 2048, 1024]


@pytest.mark.parametrize("dtype", ["1bit", "int4", "int8"])
def test_the_error_is_the_one_measured(dtype: str) -> None:
    """The rule rests on these numbers: what storing adds to the variance of a cosine between normal rows."""
    dim = 512
    random = np.random.default_rng(0)
    rows = random.standard_normal((2000, dim)).astype(np.float32)
    query = random.standard_normal(dim)
    query /= np.linalg.norm(query)
    codes, scale, *_ = encode(rows, dtype)
    units = np.empty_like(rows)
    decode(codes, scale, dtype, units)
    # A decoded row, scaled to be unbiased, is the row and an error across it.
    kept = np.einsum("pd,pd->p", units, rows) / np.linalg.norm(rows, axis=1)
    error = (units @ query) / kept - (rows @ query) / np.linalg.norm(rows, axis=1)
    added = np.var(error) * dim
    assert added == pytest.approx(INFLATION[dtype], rel=0.35)


@pytest.mark.parametrize(("code_bytes", "max_dim"), [(0, None), (-1, None), (1.5, None), (True, None), (8, 0)])
def test_impossible_budgets_are_refused(code_bytes, max_dim) -> None:
    """A budget of nothing has no answer."""
    with pytest.raises(gradstore.RequestError, match="must be a whole number"):
        gradstore.row_format(code_bytes, max_dim)


def test_every_type_has_its_number() -> None:
    """A type that is added must be weighed too."""
    assert set(INFLATION) == set(DTYPES)
