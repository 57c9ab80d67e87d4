"""Products with a second moment against a loop in float64."""

from collections.abc import Iterator

import numpy as np
import pytest

import gradstore
from gradstore import View
from gradstore.engine.searching import moment as moments
from gradstore.engine.searching.moment import Moment

_moment = pytest.importorskip("gradstore.engine.searching._moment", reason="built by a C compiler at installation")


@pytest.fixture(params=[True, False], ids=["AVX2", "plain"])
def kernel(request) -> Iterator[None]:
    """Both ways to multiply, where the processor has them; the first is in use again afterwards."""
    if _moment.avx2(request.param) != request.param:
        pytest.skip("a processor without AVX2")
    yield
    _moment.avx2(True)


def by_hand(codes: np.ndarray, weights: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The definition, row by row."""
    total = np.zeros(vectors.shape)
    for row, weight in zip(codes.astype(np.float64), weights, strict=True):
        total += np.outer(weight * (vectors @ row), row)
    return total


@pytest.mark.parametrize("dim", [1, 7, 8, 31, 32, 33, 100, 4099])
@pytest.mark.parametrize("n", [1, 3, 4, 70])
def test_the_compiled_product(kernel, dim: int, n: int) -> None:
    """Ends of rows, rows left over from a group and sums over many dimensions are where it may go wrong: the largest
    codes times the largest digits must not overflow."""
    random = np.random.default_rng(dim + n)
    codes = random.integers(-127, 128, (n, dim), dtype=np.int8)
    codes[0] = -128
    vectors = random.standard_normal((3, dim)) * np.array([[1.0], [1e-20], [0.0]])
    vectors[0] = -2.0
    digits, steps = moments._digits_of(vectors)
    weights = random.random(n)
    for places in (np.empty(0, np.int64), random.permutation(n)[: -(-n // 2)].astype(np.int64)):
        chosen = places if len(places) else np.arange(n)
        out = np.full((3, dim), 0.5)
        _moment.moment_int8(dim, codes, places, weights[chosen], digits, steps, out)
        expected = by_hand(codes[chosen], weights[chosen], vectors)
        for got, wanted in zip(out - 0.5, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max() + 1e-12)


@pytest.mark.parametrize("places", [[-1], [2], [0, 5]])
def test_rows_outside_are_refused(places: list[int]) -> None:
    """A wrong place would read memory that is not the row's."""
    digits, steps = moments._digits_of(np.ones((1, 4)))
    with pytest.raises(ValueError, match="sizes"):
        out = np.zeros((1, 4))
        _moment.moment_int8(4, np.zeros((2, 4), np.int8), np.array(places), np.ones(len(places)), digits, steps, out)
    with pytest.raises(ValueError, match="sizes"):
        _moment.moment_int8(4, np.zeros((2, 4), np.int8), np.empty(0, np.int64), np.ones(2), digits, steps, np.zeros(3))


def test_vectors_keep_thirty_bits() -> None:
    """An error of a vector is the same for every row and does not average out."""
    vectors = np.random.default_rng(0).standard_normal((4, 1000)) * np.array([[1.0], [1e-30], [1e30], [0.0]])
    digits, steps = moments._digits_of(vectors)
    again = steps[:, None] * (digits[:, 0] + digits[:, 1] / 65534)
    assert (np.abs(again - vectors) <= 2.0**-31 * np.abs(vectors).max(axis=1, keepdims=True)).all()


def some_view(path, dtype: str) -> View:
    """300 problems in chunks that later steps left gaps in, norms of four magnitudes, some rows without a gradient."""
    random = np.random.default_rng(0)
    store = gradstore.create(path, dim=24, fingerprint={}, dtype=dtype)
    ids = [f"p{i:03d}" for i in range(300)]
    store.add_problems("pool", [{"id": name, "prompt": "?"} for name in ids])
    for step in range(3):
        some = ids if not step else [ids[i] for i in np.sort(random.permutation(300)[:90])]
        rows = random.standard_normal((len(some), 24)) * random.lognormal(0, 2, (len(some), 1))
        rows[::17] = 0
        with store.writer("pool", step=step) as writer:
            writer.append(some, rows.astype(np.float32))
    return store.view("pool")


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "int4", "1bit", "fp16", "fp32"])
def test_of_a_view(tmp_path, dtype: str, compiled: bool, monkeypatch) -> None:
    """Rows of every kind, decoded or as stored, have the same moment; tiny norms must not vanish."""
    if not compiled:
        monkeypatch.setattr(moments, "_kernel", lambda: None)
        monkeypatch.setattr(moments, "_BLOCK_BYTES", 4 * 24 * 7)
    view = some_view(tmp_path / "s", dtype)
    vectors = np.random.default_rng(1).standard_normal((2, 24))
    for positions in (view.live_positions, view.live_positions[5::3], view.live_positions[:1]):
        unit = float(np.sqrt(np.mean(view.norms[positions].astype(np.float64) ** 2)))
        rows = view.rows(positions).astype(np.float64) * (view.norms[positions].astype(np.float64) / unit)[:, None]
        expected = vectors @ (rows.T @ rows) / len(rows)
        found = Moment(view, positions, unit).times(vectors)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        np.testing.assert_array_equal(Moment(view, positions, unit).times(vectors), found)


def test_the_sample_estimates_the_moment(tmp_path) -> None:
    """With norms over magnitudes, a sample in which every row counts alike would miss the rows that decide."""
    view = some_view(tmp_path / "s", "fp32")
    live = view.live_positions
    unit = float(np.sqrt(np.mean(view.norms[live].astype(np.float64) ** 2)))
    rows = view.rows(live).astype(np.float64) * (view.norms[live] / unit)[:, None]
    expected = rows.T @ rows / len(rows)
    found = Moment(view, live, unit).sampled(20_000)
    assert np.trace(found) == pytest.approx(1, rel=1e-5)
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)
    np.testing.assert_array_equal(Moment(view, live, unit).sampled(20_000), found)


@pytest.mark.parametrize("dim", [5, 16, 100])
@pytest.mark.parametrize("n", [1, 70, 130])
def test_the_compiled_sum(kernel, dim: int, n: int) -> None:
    """Factors over magnitudes, and runs of rows that end early."""
    random = np.random.default_rng(dim + n)
    codes = random.integers(-128, 128, (n, dim), dtype=np.int8)
    factors = random.standard_normal(n) * random.lognormal(0, 3, n)
    places = random.permutation(n)[: -(-n // 2)].astype(np.int64)
    for chosen, asked in ((np.arange(n), np.empty(0, np.int64)), (places, places)):
        out = np.zeros(dim)
        _moment.sum_int8(dim, codes, asked, factors[chosen], out)
        expected = factors[chosen] @ codes[chosen].astype(np.float64)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-7 * np.abs(factors).max() * 128)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "int4", "fp32"])
def test_sums_by_group(tmp_path, dtype: str, compiled: bool, monkeypatch) -> None:
    """Each row counts once, in its own group, with its norm."""
    if not compiled:
        monkeypatch.setattr(moments, "_kernel", lambda: None)
        monkeypatch.setattr(moments, "_BLOCK_BYTES", 8 * 24 * 7)
    view = some_view(tmp_path / "s", dtype)
    positions = view.live_positions[3:]
    groups = np.random.default_rng(2).integers(0, 4, len(positions))
    found = moments.sums_by_group(view, positions, groups, 6)
    rows = view.rows(positions).astype(np.float64) * view.norms[positions, None]
    for group in range(6):
        wanted = rows[groups == group].sum(axis=0)
        np.testing.assert_allclose(found[group], wanted, rtol=0, atol=1e-6 * np.abs(rows).max() * 10)
