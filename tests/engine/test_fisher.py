"""Fisher scores against the formula written out with a dense inverse."""

import numpy as np
import pytest

import gradstore
from gradstore.engine.searching import fisher
from gradstore.errors import RequestError


def dense(view, query: np.ndarray, damping: float) -> np.ndarray:
    """(M/n + lambda I)^-1 q with a float64 inverse."""
    live = np.flatnonzero(view.live)
    rows = view.rows(live).astype(np.float64) * view.norms[live, None]
    moment = rows.T @ rows / len(rows)
    return np.linalg.inv(moment + damping * np.trace(moment) / view.dim * np.eye(view.dim)) @ query


@pytest.fixture(params=["moment", "gram", "conjugate gradients"])
def way(request, monkeypatch) -> str:
    """Each of the three ways to solve, on rows that are few or many beside the dimensions."""
    monkeypatch.setattr(fisher, "_BLOCK_BYTES", 4 * 24 * 7)  # Several blocks, the last one not full.
    if request.param == "conjugate gradients":
        monkeypatch.setattr(fisher, "LARGEST_MATRIX", 10)
    return request.param


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_equals_the_dense_formula(make_store, way: str, damping: float) -> None:
    """A preconditioner that is only nearly the inverse reorders exactly the close calls it is there for."""
    view = make_store(n=18 if way == "gram" else 90).view("pool")
    assert (view.live.sum() < view.dim) == (way == "gram")
    queries = np.random.default_rng(3).normal(size=(2, view.dim)).astype(np.float32)
    for query in queries:
        expected = dense(view, query, damping)
        found = fisher.preconditioned(view, query, damping)
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(fisher.preconditioned(view, queries, damping)[1], found)


def test_tiny_gradients(tmp_path) -> None:
    """Squares of norms around 1e-25 are zero in float32: the second moment would vanish."""
    store = gradstore.create(tmp_path / "s", dim=6, fingerprint={}, dtype="fp32")
    store.add_problems("pool", [{"id": str(i), "prompt": "?"} for i in range(40)])
    rows = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    with store.writer("pool", step=0) as writer:
        writer.append([str(i) for i in range(40)], rows * np.float32(1e-18))
    view = store.view("pool")
    query = np.arange(1, 7, dtype=np.float32) * np.float32(1e-18)
    np.testing.assert_allclose(fisher.preconditioned(view, query, 0.1), dense(view, query, 0.1), rtol=1e-4)


def test_damping_is_an_argument_and_nothing_else(make_store) -> None:
    """A call must not leave anything behind that changes the next one's answer."""
    store = make_store()
    view = store.view("pool")
    query = np.ones(view.dim, np.float32)
    first = fisher.preconditioned(view, query, 0.3)
    other = fisher.preconditioned(view, query, 30.0)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(fisher.preconditioned(view, query, 0.3), first)
    np.testing.assert_array_equal(fisher.preconditioned(gradstore.open(store.path).view("pool"), query, 0.3), first)


def test_the_kept_moment_follows_the_rows(make_store) -> None:
    """A moment kept from an earlier publication would precondition with gradients that are no longer there."""
    store = make_store(n=90)
    query = np.ones(24, np.float32)
    before = fisher.preconditioned(store.view("pool"), query)
    with store.writer("pool", step=3) as writer:
        writer.append([f"p{i:03d}" for i in range(40)], np.random.default_rng(8).normal(size=(40, 24)) * 5)
    view = store.view("pool")
    after = fisher.preconditioned(view, query)
    np.testing.assert_allclose(after, dense(view, query, fisher.DAMPING), rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(fisher.preconditioned(store.view("pool", 0), query), before)
    store.delete("pool", ["p001"])
    view = store.view("pool")
    np.testing.assert_allclose(
        fisher.preconditioned(view, query), dense(view, query, fisher.DAMPING), rtol=2e-4, atol=1e-5
    )


def test_a_damaged_file_is_not_believed(make_store) -> None:
    """What is kept beside a collection is a saving of time; a flipped byte must cost that time, not the answer."""
    store = make_store(n=90)
    query = np.ones(24, np.float32)
    expected = fisher.preconditioned(store.view("pool"), query)
    (kept,) = (store.path / "collections/pool/indexes/fisher").glob("moment-*.f64")
    data = bytearray(kept.read_bytes())
    data[100] ^= 0x10
    kept.write_bytes(data)
    (kept.parent / "writing-0").write_bytes(b"half a matrix")
    again = gradstore.open(store.path).view("pool")
    np.testing.assert_array_equal(fisher.preconditioned(again, query), expected)
    assert store.verify().ok
    assert store.verify().notes == []


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_damping_is_refused(make_store, damping: float) -> None:
    """Without damping a moment of fewer rows than dimensions has no inverse."""
    with pytest.raises(RequestError, match="damping"):
        fisher.preconditioned(make_store().view("pool"), np.ones(24), damping)
