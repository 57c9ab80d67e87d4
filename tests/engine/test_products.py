"""The compiled products of bytes against whole numbers in numpy and against numkong, which serves without them."""

from collections.abc import Iterator

import numkong
import numpy as np
import pytest

from gradstore.engine.searching import products

CAPABLE = numkong.get_capabilities()


@pytest.fixture(params=[512, 256])
def registers(request) -> Iterator[int]:
    """Both ways to multiply, where the processor has them; the widest is in use again afterwards."""
    if not CAPABLE["icelake" if request.param == 512 else "haswell"]:
        pytest.skip(f"a processor without registers of {request.param} bits")
    kernel = products._kernel()
    assert kernel is not None, "the kernel was not built: a C compiler is needed at installation"
    assert kernel.registers(request.param) == request.param
    yield request.param
    kernel.registers(512)


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


def by_hand(codes: np.ndarray, scale: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The definition: exact whole numbers, weighed and added in float64 from the first digit on."""
    digits, weights = products.digits_of(queries, 127, 3)
    scores = np.empty((len(queries), len(codes)), np.float32)
    for q in range(len(queries)):
        for r in range(len(codes)):
            total = np.float64(0)
            for g in range(3):
                total += np.float64(int(codes[r].astype(np.int64) @ digits[g, q].astype(np.int64))) * weights[g, q]
            scores[q, r] = total * np.float64(scale[r])
    return scores


@pytest.mark.parametrize("dim", [1, 3, 4, 63, 64, 65, 130, 1031])
def test_the_compiled_products_are_the_same_numbers(dim: int, registers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan must not depend on whether a C compiler was there, nor on how many queries are asked together: ends of
    rows that fill no register, rows left over from a group and queries that fill no register are where it may."""
    monkeypatch.setattr(products, "_has_tiles", lambda: False)
    for n_queries in range(1, 17):
        n = (1, 2, 3, 5, 6, 7, 13, 24)[n_queries % 8]
        codes, scale, queries = rows_and_queries(n, dim, n_queries)
        whole = np.full((n_queries, n + 4), 7, np.float32)
        products.int8_product(queries)(codes, scale, whole[:, 2:-2])
        plain = np.empty((n_queries, n), np.float32)
        with monkeypatch.context() as without:
            without.setattr(products, "_kernel", lambda: None)
            products.int8_product(queries)(codes, scale, plain)
        assert np.array_equal(whole[:, 2:-2], plain)
        assert np.array_equal(plain, by_hand(codes, scale, queries))
        apart = products.int8_product_apart(queries)
        assert apart is not None
        which = np.random.default_rng(n).permutation(n)[: n - n // 4]
        arrays, scores = [codes[n // 2 :], codes[:0], codes[: n // 2]], np.full((n_queries, n + 4), 7, np.float32)
        array_of, within = np.where(which < n // 2, 2, 0), np.where(which < n // 2, which, which - n // 2)
        apart(arrays, array_of, within, scale[which], scores[:, 2 : 2 + len(which)])
        assert np.array_equal(scores[:, 2 : 2 + len(which)], plain[:, which])
        assert (scores[:, [0, 1]] == 7).all()
        assert (scores[:, 2 + len(which) :] == 7).all(), "written beside its place"
        assert (whole[:, [0, 1, -2, -1]] == 7).all(), "written beside its place"
        of_pairs = products.int8_product_of_pairs(queries)
        assert of_pairs is not None
        query = np.random.default_rng(dim).integers(0, n_queries, len(which))
        own = np.full(len(which) + 2, 7, np.float32)
        of_pairs(arrays, array_of, within, query, scale[which], own[1:-1])
        assert np.array_equal(own[1:-1], plain[query, which])
        assert (own[[0, -1]] == 7).all(), "written beside its place"


@pytest.mark.parametrize("n_queries", [1, 2, 5, 6, 16, 17, 48])
@pytest.mark.parametrize("dim", [1, 31, 64, 100, 128, 193])
def test_picked_rows_are_those_that_reach_the_least(
    dim: int, n_queries: int, registers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row may be lost to what the first digit leaves out, and scores are those of a scan of all rows."""
    monkeypatch.setattr(products, "_has_tiles", lambda: False)
    codes, scale, queries = rows_and_queries(60, dim, n_queries)
    scale /= np.maximum(1, np.linalg.norm(codes.astype(np.float64), axis=1)).astype(np.float32)
    random = np.random.default_rng(dim)
    places, weights = np.sort(random.choice(60, 40, replace=False)), (random.random(40) + 0.1).astype(np.float32)
    scores_QN = (by_hand(codes[places], scale[places], queries) * weights).astype(np.float32)
    pick = products.picking(queries)
    assert pick is not None
    for rank in (0, 5, 39):
        least_Q = np.sort(scores_QN, axis=1)[:, rank]
        query, number, score = pick(codes, places, scale[places], weights, least_Q)
        assert list(zip(number.tolist(), query.tolist(), strict=True)) == sorted(
            (n, q) for q, n in np.argwhere(scores_QN >= least_Q[:, None]).tolist()
        )
        assert np.array_equal(score, scores_QN[query, number])
    none = pick(codes, places, scale[places], weights, np.full(n_queries, np.inf, np.float32))
    assert [len(part) for part in none] == [0, 0, 0]
    every = pick(codes, None, scale, None, np.full(n_queries, -np.inf, np.float32))
    assert np.array_equal(every[2].reshape(60, n_queries).T, by_hand(codes, scale, queries))


def test_wide_rows_do_not_wrap_around(registers: int, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_codes_that_no_writer_makes(registers: int) -> None:
    """-128 has no positive counterpart in a byte."""
    codes, queries = np.full((5, 70), -128, np.int8), np.linspace(-1, 1, 70, dtype=np.float32)[None] + 0.3
    scores = np.empty((1, 5), np.float32)
    products.int8_product(queries)(codes, np.ones(5, np.float32), scores)
    assert np.array_equal(scores, by_hand(codes, np.ones(5, np.float32), queries))


def test_buffers_that_disagree_are_refused(registers: int) -> None:
    """Reading or writing past a buffer's end would corrupt memory in silence."""
    from gradstore.engine.searching._products import pick_int8, score_apart_int8, score_int8, score_pairs_int8

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
    asked, array_of, within = (70, digits, starts, weights, scale, out), np.array([0, 2, 2, 0, 2]), np.arange(5) % 3
    arrays = [codes[:3], codes[:0], codes[2:]]
    score_apart_int8(arrays, array_of, within, *asked)
    for wrong_rows in [
        (arrays[:2], array_of, within),
        ([], array_of, within),
        (arrays, np.array([0, 1, 2, 0, 2]), within),
        (arrays, array_of - 1, within),
        (arrays, array_of, within + 1),
        (arrays, array_of, within - 1),
        (arrays, array_of[:4], within),
        (arrays, array_of, within[:4]),
        ([arrays[0], arrays[1], arrays[2][:2]], array_of, within),
    ]:
        with pytest.raises(ValueError, match="do not agree"):
            score_apart_int8(*wrong_rows, *asked)
    with pytest.raises(ValueError, match="do not agree"):
        score_apart_int8(arrays, array_of, within, 70, digits, starts, weights, scale[:4], out)
    for no_arrays in (3, [codes[:3], None, codes[2:]], [codes[:3], codes[:0], codes[2:, ::2]]):
        with pytest.raises((TypeError, ValueError, BufferError)):
            score_apart_int8(no_arrays, array_of, within, *asked)  # type: ignore[arg-type]
    sizes = {
        "rows": np.zeros(5 * 70, np.int8),
        "places": np.zeros(2, np.int64),
        "scale": np.zeros(2, np.float32),
        "weights": np.zeros(2, np.float32),
        "first": np.zeros(16 * 72 if registers == 512 else 0, np.int8),
        "digits": np.zeros(7 * 3 * 128, np.int8),
        "starts": np.zeros(21, np.int32),
        "steps": np.zeros(21),
        "left": np.zeros(7, np.float32),
        "least": np.zeros(7, np.float32),
        "queries": np.zeros(14, np.uint8),
        "numbers": np.zeros(14, np.int32),
        "scores": np.zeros(14, np.float32),
    }
    assert pick_int8(70, *sizes.values()) == 14
    wrong_pick = [{"places": np.array([0, 5])}, {"places": np.array([-1, 0])}]
    wrong_pick += [{name: sizes[name][:-1]} for name in sizes if len(sizes[name])]
    wrong_pick += [{"places": np.zeros(0, np.int64)}, {"first": np.zeros(5, np.int8)}]
    every = sizes | {name: sizes[name][:0] for name in ("places", "weights")}
    every |= {"scale": np.zeros(5, np.float32)}
    every |= {name: np.resize(sizes[name], 35) for name in ("queries", "numbers", "scores")}
    assert pick_int8(70, *every.values()) == 35
    query_of = np.array([0, 6, 1, 0, 2])
    paired = (70, sizes["digits"], sizes["starts"], sizes["steps"], scale, np.zeros(5, np.float32))
    score_pairs_int8(arrays, array_of, within, query_of, *paired)
    for place, other in enumerate(paired):
        with pytest.raises(ValueError, match="do not agree"):
            changed = 129 if place == 0 else other[:-1]  # type: ignore[index]
            score_pairs_int8(arrays, array_of, within, query_of, *paired[:place], changed, *paired[place + 1 :])
    for wrong_query in (query_of[:4], query_of - 1, query_of + 1):
        with pytest.raises(ValueError, match="do not agree"):
            score_pairs_int8(arrays, array_of, within, wrong_query, *paired)
    with pytest.raises(ValueError, match="do not agree"):
        score_pairs_int8(arrays, array_of, within + 1, query_of, *paired)
    wrong_pick += [{"rows": sizes["rows"][:70], "places": np.array([0, 1])}]
    for changed in wrong_pick:
        with pytest.raises(ValueError, match="do not agree"):
            pick_int8(70, *(sizes | changed).values())
    with pytest.raises(ValueError, match="do not agree"):
        pick_int8(0, *sizes.values())
