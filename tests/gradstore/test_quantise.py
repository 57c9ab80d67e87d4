"""Codes against a slow loop, and how far a decoded row may be from the row that was stored."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradstore import quantise
from gradstore.layout import DTYPES
from gradstore.quantise import GAUSS_STEP, decode, encode


def decoded(rows: np.ndarray, dtype: str) -> np.ndarray:
    codes, scale, *_ = encode(rows, dtype)
    out = np.empty(rows.shape, np.float32)
    decode(codes, scale, dtype, out)
    return out


def slow_codes(row: np.ndarray, dtype: str) -> np.ndarray:
    """One row's codes, unpacked, straight from the definitions, in float64."""
    row = row.astype(np.float64)
    peak, rms = np.abs(row).max(), np.sqrt(np.mean(row**2))
    if dtype == "int8":
        return np.rint(row * 127 / peak)
    if dtype == "int4":
        steps = [(GAUSS_STEP * rms) ** (1 - t) * (peak / 7) ** t for t in (0, 0.25, 0.5, 0.75, 1)]
        trials = [np.clip(np.rint(row / step), -7, 7) for step in steps]
        return max(trials, key=lambda codes: codes @ row / np.linalg.norm(codes))
    if dtype == "1bit":
        return np.where(row > 0, 1.0, -1.0)
    return (row / np.linalg.norm(row)).astype({"fp16": np.float16, "fp32": np.float32}[dtype]).astype(float)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 7, 64, 1031])
def test_decoded_rows_equal_a_slow_loop(dtype: str, dim: int) -> None:
    """A vectorised encoder that mixes up rows, blocks or nibbles gives other numbers than one row at a time."""
    rng = np.random.default_rng(dim)
    rows = (rng.standard_normal((150, dim)) * rng.gamma(0.5, 1e-3, (150, 1))).astype(np.float32)
    got = decoded(rows, dtype)
    for row, unit in zip(rows, got, strict=True):
        codes = slow_codes(row, dtype)
        slow = codes / np.linalg.norm(codes)
        # A value at the boundary of two codes may round either way in float32: then the cosines agree.
        assert np.allclose(unit, slow, atol=2e-6) or np.isclose(unit @ row, slow @ row, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "least"), [("int8", 0.9999), ("int4", 0.992), ("fp16", 0.999999), ("fp32", 0.999999)]
)
def test_cosine_of_decoded_gaussian_rows(dtype: str, least: float) -> None:
    """A worse step or a wrong scale shows as a lower cosine than the quantiser can give."""
    rows = np.random.default_rng(0).standard_normal((200, 4096)).astype(np.float32)
    cosine = np.einsum("pd,pd->p", decoded(rows, dtype).astype(np.float64), rows) / np.linalg.norm(rows, axis=1)
    assert cosine.min() > least


def test_int4_adapts_to_heavy_tails() -> None:
    """One spike and a small rest: a step from the rms alone clips the spike and loses the direction."""
    rows = np.full((3, 1000), 1e-3, np.float32)
    rows[:, 5] = [1, 10, 100]
    cosine = np.einsum("pd,pd->p", decoded(rows, "int4"), rows) / np.linalg.norm(rows, axis=1)
    assert cosine.min() > 0.99


@given(
    rows=hnp.arrays(np.float32, (5, 9), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=200, deadline=None)
def test_any_finite_row_decodes_to_unit_length(rows: np.ndarray, dtype: str) -> None:
    """A row whose decoded length is not 1 gets a biased cosine; tiny, huge and one-hot rows must not break it."""
    got = decoded(rows, dtype).astype(np.float64)
    _, _, norm, _ = encode(rows, dtype)
    wide = rows.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1)
    some = lengths > 0
    assert np.allclose(np.linalg.norm(got, axis=1), some, atol=2e-6)
    assert np.allclose(norm, lengths, rtol=1e-5)
    unit = wide[some] / lengths[some, None]
    bound = {"int8": 0.01, "int4": 0.25, "1bit": 0.65, "fp16": 1e-3, "fp32": 1e-5}[dtype]
    assert np.all(np.linalg.norm(got[some] - unit, axis=1) < bound * 3)


@pytest.mark.parametrize("dim", [1, 7, 63, 64, 1024, 1100, 4097])
def test_the_compiled_encoder_equals_numpy(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store written on a machine with a C compiler must hold the same rows as one written without."""
    assert quantise._compiled() is not None, "the C encoder was not built: a C compiler is needed at installation"
    rows = np.random.default_rng(dim).standard_normal((40, dim)).astype(np.float32)
    rows[0], rows[1, 0], rows[2, -1], rows[3, dim // 2] = 0, np.nan, np.inf, -np.inf
    rows[4] *= np.float32(1e-38)
    rows[5] *= np.float32(1e-44)
    rows[6] *= np.float32(1e37)
    rows[7] = 2.5  # halves round to even
    rows[7, 0] = 127
    compiled = encode(rows, "int8")
    monkeypatch.setattr(quantise, "_compiled", lambda: None)
    for ours, plain in zip(compiled, encode(rows, "int8"), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-6)
    np.testing.assert_array_equal(compiled[0], encode(rows, "int8")[0])


def test_the_compiled_encoder_refuses_buffers_that_disagree() -> None:
    """Writing past a buffer's end would corrupt memory in silence."""
    from gradstore._encode import encode_int8

    rows, codes = np.ones((3, 8), np.float32), np.zeros((3, 8), np.int8)
    scale, norm, peak = np.zeros(3, np.float32), np.zeros(3), np.zeros(3, np.float32)
    for wrong in [
        (rows[:2], codes, scale, norm, peak, 8),
        (rows, codes[:2], scale, norm, peak, 8),
        (rows, codes, scale, norm[:2], peak, 8),
        (rows, codes, scale, norm, peak[:2], 8),
        (rows, codes, scale, norm, peak, 7),
        (rows, codes, scale, norm, peak, 0),
    ]:
        with pytest.raises(ValueError, match="do not agree"):
            encode_int8(*wrong)
