"""The compiled products of bytes against whole numbers in numpy and against numkong, which serves without them."""

import numkong
import numpy as np
import pytest

from engine.searching import products

pytestmark = pytest.mark.skipif(not numkong.get_capabilities()["icelake"], reason="a processor without AVX512-VNNI")


def rows_and_queries(n: int, dim: int, n_queries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes with the largest and smallest values, scales, and queries with a zero and a dominated one among them."""
    random = np.random.default_rng(n + 100 * dim + n_queries)
    codes = random.integers(-127, 128, (n, dim), dtype=np.int8)
    codes[0], codes[-1] = 127, -127
    queries = random.standard_normal((n_queries, dim)).astype(np.float32)
    queries[0] = -3.5
    queries[n_queries // 2, 0] = 1e6
    queries[-1] *= 0 if n_queries > 2 else 1
    return codes, random.random(n).astype(np.float32), queries


def by_hand(codes: np.ndarray, scale: np.ndarray, queries: np.ndarray, n_digits: int) -> np.ndarray:
    """The definition: exact whole numbers, weighed and added in float64 from the first digit on."""
    digits, weights = products.digits_of(queries, 127, n_digits)
    scores = np.empty((len(queries), len(codes)), np.float32)
    for q in range(len(queries)):
        for r in range(len(codes)):
            total = np.float64(0)
            for g in range(n_digits):
                total += np.float64(int(codes[r].astype(np.int64) @ digits[g, q].astype(np.int64))) * weights[g, q]
            scores[q, r] = total * np.float64(scale[r])
    return scores


@pytest.mark.parametrize("n_digits", [2, 3])
@pytest.mark.parametrize("dim", [1, 3, 4, 63, 64, 65, 130, 1031])
def test_the_compiled_products_are_the_same_numbers(dim: int, n_digits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan must not depend on whether a C compiler was there, nor on how many queries are asked together: ends of
    rows that fill no register, rows left over from a group and queries that fill no register are where it may."""
    assert products._kernel() is not None, "the kernel was not built: a C compiler is needed at installation"
    monkeypatch.setattr(products, "_has_tiles", lambda: False)
    for n_queries in range(1, 17):
        n = (1, 2, 3, 5, 6, 7, 13, 24)[n_queries % 8]
        codes, scale, queries = rows_and_queries(n, dim, n_queries)
        whole = np.full((n_queries, n + 4), 7, np.float32)
        products.int8_product(queries, n_digits)(codes, scale, whole[:, 2:-2])
        plain = np.empty((n_queries, n), np.float32)
        with monkeypatch.context() as without:
            without.setattr(products, "_kernel", lambda: None)
            products.int8_product(queries, n_digits)(codes, scale, plain)
        assert np.array_equal(whole[:, 2:-2], plain)
        assert np.array_equal(plain, by_hand(codes, scale, queries, n_digits))
        assert (whole[:, [0, 1, -2, -1]] == 7).all(), "written beside its place"


@pytest.mark.parametrize("dim", [1, 64, 100])
def test_pairs_are_the_same_numbers(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row scored anew must have the score that a scan of all rows gives it."""
    monkeypatch.setattr(products, "_has_tiles", lambda: False)
    codes, scale, queries = rows_and_queries(9, dim, 8)
    random = np.random.default_rng(dim)
    places, asked = random.integers(0, 9, 50), random.integers(0, 8, 50)
    pair_product = products.pair_product(queries)
    assert pair_product is not None
    found = pair_product(codes, places, asked, scale[places])
    assert np.array_equal(found, by_hand(codes, scale, queries, 3)[asked, places])


def test_wide_rows_do_not_wrap_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the most columns one pass takes, with the largest products, sums reach the end of int32 and no further."""
    monkeypatch.setattr(products, "_has_tiles", lambda: False)
    dim = products.SAFE_COLUMNS
    codes = np.full((2, dim), 127, np.int8)
    codes[1] = -127
    for n_queries in (1, 6):
        queries = np.ones((n_queries, dim), np.float32)
        scores = np.empty((n_queries, 2), np.float32)
        products.int8_product(queries)(codes, np.ones(2, np.float32), scores)
        np.testing.assert_allclose(scores, np.tile([127.0 * dim, -127.0 * dim], (n_queries, 1)), rtol=1e-6)


def test_buffers_that_disagree_are_refused() -> None:
    """Reading or writing past a buffer's end would corrupt memory in silence."""
    from engine.searching._products import score_int8, score_pairs

    codes, scale, out = np.zeros((5, 70), np.int8), np.ones(5, np.float32), np.zeros((1, 5), np.float32)
    digits, starts, weights = np.zeros((3, 128), np.int8), np.zeros(3, np.int32), np.ones((3, 1))
    score_int8(codes, 70, digits, starts, weights, scale, out)
    for wrong in [
        (codes[:4], 70, digits, starts, weights, scale, out),
        (codes, 71, digits, starts, weights, scale, out),
        (codes, 0, digits, starts, weights, scale, out),
        (codes, 70, digits[:, :64].copy(), starts, weights, scale, out),
        (codes, 70, digits, starts[:2], weights, scale, out),
        (codes, 70, digits, starts, np.ones((4, 1)), scale, out),
        (codes, 70, digits, starts, weights, scale[:4], out),
        (codes, 70, digits, starts, weights, scale, out[:, :4]),
        (codes, 70, digits, starts, weights, scale, out.astype(np.float64)),
        (codes, 70, digits, starts, weights, scale, np.zeros((1, 10), np.float32)[:, ::2]),
    ]:
        with pytest.raises(ValueError, match="do not agree"):
            score_int8(*wrong)
    places, asked, found = np.zeros(2, np.int64), np.zeros(2, np.int64), np.zeros(2, np.float32)
    score_pairs(codes, 70, places, asked, digits, starts, weights, scale[:2], found)
    for wrong_pairs in [
        (codes, 70, places + 5, asked, digits, starts, weights, scale[:2], found),
        (codes, 70, places - 1, asked, digits, starts, weights, scale[:2], found),
        (codes, 70, places, asked + 1, digits, starts, weights, scale[:2], found),
        (codes, 70, places[:1], asked, digits, starts, weights, scale[:2], found),
        (codes, 70, places, asked, digits[:2], starts, weights, scale[:2], found),
        (codes, 70, places, asked, digits, starts[:2], weights, scale[:2], found),
        (codes, 70, places, asked, digits, starts, weights, scale[:1], found),
    ]:
        with pytest.raises(ValueError, match="do not agree"):
            score_pairs(*wrong_pairs)
