"""The exact scan against decoded rows in float64, one product at a time, whatever the rows are stored as."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

import gradstore
from gradstore.engine.searching import products, scan
from gradstore.engine.searching.query import score_rows
from gradstore.engine.searching.ranking import best
from gradstore.engine.searching.scan import scan_best, scan_rows
from gradstore.layout import DTYPES

N, CHUNK = 130, 16


@pytest.fixture
def make_view(tmp_path):
    """N problems; every third measured again at each of three later steps, every seventh without signal."""

    def make(dtype: str, dim: int, steps: int = 4) -> gradstore.View:
        random = np.random.default_rng(dim)
        store = gradstore.create(tmp_path / f"{dtype}-{dim}", dim=dim, fingerprint={}, dtype=dtype, chunk_rows=CHUNK)
        store.add_problems("pool", [{"id": f"p{i}", "prompt": "?"} for i in range(N)])
        for step in range(steps):
            chosen = [i for i in range(N) if step == 0 or i % 3 == step - 1]
            rows = random.standard_normal((len(chosen), dim)) * random.gamma(0.5, 1.0, (len(chosen), dim))
            rows[[i % 7 == 5 for i in chosen]] = 0
            with store.writer("pool", step=step) as writer:
                writer.append([f"p{i}" for i in chosen], rows.astype(np.float32))
        store.delete("pool", ["p3", "p64"])
        return store.view("pool")

    return make


def bound(query_D: np.ndarray, dtype: str) -> float:
    """What docs/methods.md promises: float32 rounding, and for fp16 rows that of a float32 accumulator."""
    return (4e-6 if dtype == "fp16" else 3e-7) * float(np.linalg.norm(query_D))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 64, 1031])
def test_scores_equal_decoded_rows(make_view, dtype: str, dim: int) -> None:
    """Codes misread, digits weighed wrongly or rows mixed up between chunks give another number."""
    view = make_view(dtype, dim)
    random = np.random.default_rng(1)
    queries = random.standard_normal((19, dim)) * random.gamma(0.3, 1.0, (19, dim)) + 1e-20
    queries[3] *= 1e-25
    queries[4] *= 1e25
    queries[5, 1:] = 0
    queries = queries.astype(np.float32)
    got_QP = scan_rows(view, queries)
    rows = view.rows(np.arange(len(view))).astype(np.float64)
    for query, got in zip(queries.astype(np.float64), got_QP, strict=True):
        np.testing.assert_allclose(got, rows @ query, atol=bound(query, dtype), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "int4", "1bit"])
def test_only_the_rows_asked_for(make_view, dtype: str) -> None:
    """A superseded, deleted or filtered row that is scored, or a wanted one left out, changes the answer."""
    view = make_view(dtype, 48)
    query = np.random.default_rng(0).standard_normal(48).astype(np.float32)
    expected = view.rows(np.arange(len(view))).astype(np.float64) @ query
    random = np.random.default_rng(2)
    for share in (0.0, 0.02, 0.1, 0.3, 0.9, 1.0):
        positions = np.flatnonzero(random.random(len(view)) < share)
        random.shuffle(positions)
        got = score_rows(view, query, "cosine", positions)
        assert set(np.flatnonzero(~np.isnan(got))) == set(positions)
        np.testing.assert_allclose(got[positions], expected[positions], atol=bound(query, dtype))
    dots = score_rows(view, np.stack([query, -query]), "dot", np.arange(len(view)))
    np.testing.assert_allclose(dots[0], expected * view.norms, rtol=1e-5, atol=1e-5)
    assert np.array_equal(dots[1], -dots[0])


def test_the_largest_products_do_not_wrap_around(make_view, monkeypatch) -> None:
    """Products of int8 are added in int32: very wide rows are taken in parts."""
    view = make_view("int8", 64)
    query = np.linspace(-1, 2, 64, dtype=np.float32)
    whole = scan_rows(view, query[None])
    monkeypatch.setattr(products, "SAFE_COLUMNS", 10)
    assert np.array_equal(scan_rows(view, query[None]), whole)
    assert 131072 <= (2**31 - 1) // 127**2


def test_more_queries_than_fit_in_a_pass(make_view) -> None:
    """The second pass must not overwrite the first."""
    view = make_view("int8", 24)
    queries = np.random.default_rng(0).standard_normal((2 * scan.QUERIES_AT_ONCE + 3, 24)).astype(np.float32)
    together = scan_rows(view, queries)
    for query, scores in zip(queries, together, strict=True):
        assert np.array_equal(scan_rows(view, query[None])[0], scores)


@pytest.mark.parametrize("n_queries", [1, 6, 19, 50])
@pytest.mark.parametrize("way", ["compiled", "plain", "sampled wrongly"])
def test_the_best_of_several_queries(make_view, n_queries: int, way: str, monkeypatch) -> None:
    """Rows whose order only the last digit tells must not be lost to those that the first puts before them, nor to a
    guess that few reach."""
    if way == "plain":
        monkeypatch.setattr(products, "_kernel", lambda: None)
    else:
        monkeypatch.setattr(products, "_has_tiles", lambda: False)
        monkeypatch.setattr(scan, "_SAMPLE", 5)
        monkeypatch.setattr(scan, "_RANKS_MORE", 2 if way == "compiled" else 0)
    view = make_view("int8", 48)
    random = np.random.default_rng(3)
    queries = random.standard_normal((n_queries, 48)).astype(np.float32)
    queries[-1] *= 1e-6
    queries[-1, 0] = 1e-30
    queries[0] = view.rows(np.array([7]))[0]
    for positions in (None, np.arange(3, 100, 2), random.permutation(len(view)), np.array([], np.int64)):
        scores_QP = scan_rows(view, queries, positions)
        for k, weights_P in product((1, 10, 200), (None, view.norms)):
            found = scan_best(view, queries, k, positions, weights_P)
            wanted_QP = scores_QP if weights_P is None else scores_QP * weights_P
            for (places, scores), scores_P in zip(found, wanted_QP, strict=True):
                expected = best(scores_P, k, view.ids_at)
                assert np.array_equal(places, expected)
                assert np.array_equal(scores, scores_P[expected])


def test_the_best_where_the_first_digit_tells_nothing(tmp_path, monkeypatch) -> None:
    """Rows without a share in a query's one large entry have the score 0 by the first digit, all of them."""
    monkeypatch.setattr(products, "_has_tiles", lambda: False)
    monkeypatch.setattr(scan, "_SAMPLE", 20)
    random = np.random.default_rng(0)
    store = gradstore.create(tmp_path / "store", dim=64, fingerprint={}, dtype="int8", chunk_rows=CHUNK)
    store.add_problems("pool", [{"id": f"p{i}", "prompt": "?"} for i in range(N)])
    rows = random.standard_normal((N, 64)).astype(np.float32)
    rows[:, 0] = 0
    with store.writer("pool", step=0) as writer:
        writer.append([f"p{i}" for i in range(N)], rows)
    view = store.view("pool")
    queries = (1e-5 * random.standard_normal((8, 64))).astype(np.float32)
    queries[:, 0] = 1
    exact = view.rows(np.arange(N)).astype(np.float64) @ queries.T.astype(np.float64)
    for q, (places, scores) in enumerate(scan_best(view, queries, 5)):
        assert np.array_equal(places, np.argsort(-exact[:, q])[:5])
        np.testing.assert_allclose(scores, exact[places, q], rtol=1e-2)


@pytest.mark.parametrize("way", ["tied", "best last"])
def test_the_best_where_a_sample_misleads(tmp_path, monkeypatch, way: str) -> None:
    """Rows all alike reach any bound, and are ranked by their ids; where a sample holds the best, too few others reach
    the bound, and every score is looked at."""
    monkeypatch.setattr(products, "_has_tiles", lambda: False)
    monkeypatch.setattr(scan, "_SAMPLE", 16)
    monkeypatch.setattr(scan, "_RANKS_MORE", 0)
    store = gradstore.create(tmp_path / "store", dim=8, fingerprint={}, dtype="int8", chunk_rows=CHUNK)
    ids = [f"p{i:03d}" for i in reversed(range(128))]
    store.add_problems("pool", [{"id": name, "prompt": "?"} for name in ids])
    rows = np.ones((128, 8), np.float32)
    if way == "best last":
        rows[::8, 1:] = np.random.default_rng(0).random((16, 7)) - 0.5  # what is sampled, and better than the rest
        rows[np.arange(128) % 8 > 0, 0] = -1
    with store.writer("pool", step=0) as writer:
        writer.append(ids, rows)
    view = store.view("pool")
    queries = np.zeros((7, 8), np.float32)
    queries[:, 0] = 1
    for places, scores in scan_best(view, queries, 12):
        every = scan_rows(view, queries[:1])[0]
        assert np.array_equal(places, best(every, 12, view.ids_at))
        assert np.array_equal(scores, every[places])


@pytest.mark.parametrize("at", [0, 1, 2, None])
def test_past_views(make_view, at: int | None) -> None:
    """A view at a step scores the rows of that step, wherever later rows lie."""
    view = make_view("int8", 16).store.view("pool", at)
    query = np.ones(16, np.float32)
    expected = view.rows(np.arange(len(view))) @ query
    np.testing.assert_allclose(scan_rows(view, query[None])[0], expected, atol=1e-5)


def test_an_empty_view(make_view) -> None:
    """Nothing to score is no error."""
    store = make_view("int8", 8).store
    store.add_problems("empty", [{"id": "a", "prompt": "?"}])
    assert scan_rows(store.view("empty"), np.ones((2, 8), np.float32)).shape == (2, 0)


def parts_of(piece) -> dict:
    return {name: getattr(piece, name) for name in ("positions", "at", "whole", "within", "scale", "codes")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, 300.0])
def test_rows_that_are_no_unit_rows_are_refused(make_view, monkeypatch, dtype: str, value: float) -> None:
    """A checksum does not tell who wrote the bytes: impossible codes, or a scale that is not theirs, are not ranked."""
    view = make_view(dtype, 64)
    floats = dtype in ("fp16", "fp32")
    wanted = int(np.flatnonzero(view.live)[17])
    original = type(view.stored).pieces

    def pieces(stored, positions=None):
        for piece in original(stored, positions):
            at = np.flatnonzero(piece.positions == wanted)
            if not len(at):
                yield piece
            elif floats:
                codes = piece.codes.copy()
                codes[piece.within[at[0]]] = value
                yield SimpleNamespace(**parts_of(piece) | {"codes": codes})
            else:
                scale = piece.scale.copy()
                scale[at[0]] *= value
                yield SimpleNamespace(**parts_of(piece) | {"scale": scale})

    monkeypatch.setattr(type(view.stored), "pieces", pieces)
    monkeypatch.setattr(scan, "_FEW", 0)
    query = view.rows(np.array([wanted]))
    with pytest.raises(gradstore.DamagedError, match=rf"'{view.ids[wanted]}' is no unit row"):
        scan_rows(view, query)
