"""The exact scan against decoded rows in float64, one product at a time, whatever the rows are stored as."""

import numpy as np
import pytest

import gradstore
from engine.searching import scan
from engine.searching.query import score_rows
from engine.searching.scan import scan_rows
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
    monkeypatch.setattr(scan, "_SAFE_COLUMNS", 10)
    assert np.array_equal(scan_rows(view, query[None]), whole)
    assert 131072 <= (2**31 - 1) // 127**2


def test_more_queries_than_fit_in_a_pass(make_view) -> None:
    """The second pass must not overwrite the first."""
    view = make_view("int8", 24)
    queries = np.random.default_rng(0).standard_normal((2 * scan.QUERIES_AT_ONCE + 3, 24)).astype(np.float32)
    together = scan_rows(view, queries)
    for query, scores in zip(queries, together, strict=True):
        assert np.array_equal(scan_rows(view, query[None])[0], scores)


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
