"""Fisher scores against the formula written out with a dense inverse."""

import numpy as np
import pytest

import gradstore
from gradstore.engine.searching import fisher, moment
from gradstore.errors import GradstoreError, RequestError


def dense(view, query: np.ndarray, damping: float) -> np.ndarray:
    """(M/n + lambda I)^-1 q with a float64 inverse."""
    live = np.flatnonzero(view.live)
    rows = view.rows(live).astype(np.float64) * view.norms[live, None]
    moment = rows.T @ rows / len(rows)
    return np.linalg.inv(moment + damping * np.trace(moment) / view.dim * np.eye(view.dim)) @ query


@pytest.fixture(params=["moment", "gram", "conjugate gradients"])
def way(request, monkeypatch) -> str:
    """The ways to solve without a sample, on rows that are few or many beside the dimensions."""
    monkeypatch.setattr(fisher, "_BLOCK_BYTES", 4 * 24 * 7)  # Several blocks, the last one not full.
    monkeypatch.setattr(moment, "_BLOCK_BYTES", 4 * 24 * 7)
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
    together = fisher.preconditioned(view, queries, damping)[1]
    np.testing.assert_allclose(together, found, rtol=1e-5, atol=1e-6 * np.abs(found).max())
    np.testing.assert_array_equal(fisher.preconditioned(view, queries, damping)[1], together)


@pytest.fixture
def by_passes(monkeypatch) -> None:
    """Conjugate gradients with a sample, as for many rows, on few."""
    monkeypatch.setattr(fisher, "_MANY", 10)
    monkeypatch.setattr(fisher, "_SAMPLE", 400)
    monkeypatch.setattr(fisher, "_PASSES_PER_DIM", 20)


def hard_rows(kind: str, n: int = 3000, dim: int = 24) -> np.ndarray:
    """Rows whose second moment is far from that of a sample, or nearly singular."""
    random = np.random.default_rng(5)
    rows = random.standard_normal((n, dim))
    if kind == "few strong directions":
        rows += 300 * random.standard_normal((n, 2)) @ random.standard_normal((2, dim))
    elif kind == "duplicates":
        rows[100:] = rows[random.integers(0, 5, n - 100)]
    elif kind == "less than full rank":
        rows[:, 10:] = rows[:, :10] @ random.standard_normal((10, dim - 10))
    elif kind == "a direction of few rows":
        rows[:, -1] = 0
        rows[:4, -1] = 50
    elif kind == "heavy norms":
        rows *= random.lognormal(0, 4, (n, 1))
    return rows.astype(np.float32)


@pytest.mark.parametrize("dtype", ["int8", "fp32"])
@pytest.mark.parametrize("damping", [1e-4, 0.1])
@pytest.mark.parametrize(
    "kind",
    ["few strong directions", "duplicates", "less than full rank", "a direction of few rows", "heavy norms"],
)
def test_hard_spectra(tmp_path, by_passes, caplog, monkeypatch, kind: str, damping: float, dtype: str) -> None:
    """A solution that stops early is wrong in the weak directions, the ones that fisher is there for: the scores of all
    rows must be those of the explicit solve, to the tolerance that is stated."""
    monkeypatch.setattr(fisher, "_moment", None)  # The whole matrix must not be needed.
    store = gradstore.create(tmp_path / "s", dim=24, fingerprint={}, dtype=dtype)
    rows = hard_rows(kind)
    store.add_problems("pool", [{"id": str(i), "prompt": "?"} for i in range(len(rows))])
    with store.writer("pool", step=0) as writer:
        writer.append([str(i) for i in range(len(rows))], rows)
    view = store.view("pool")
    queries = np.random.default_rng(3).normal(size=(3, 24)).astype(np.float32)
    found = fisher.preconditioned(view, queries, damping)
    expected = dense(view, queries.T, damping).T
    for got, wanted, query in zip(found, expected, queries, strict=True):
        assert np.linalg.norm(got - wanted) <= 5 * fisher.TOLERANCE * np.linalg.norm(wanted)
        scores = np.stack([view.rows(np.arange(len(view))).astype(np.float64) @ vector for vector in (got, wanted)])
        scores *= view.norms
        assert np.sqrt(np.mean((scores[0] - scores[1]) ** 2)) <= 5 * fisher.TOLERANCE * np.sqrt(wanted @ query)


def test_passes_that_do_not_converge_are_said(make_store, by_passes, monkeypatch, caplog) -> None:
    """A ranking by an unsolved system would look like any other."""
    view = make_store(n=90).view("pool")
    query = np.ones(view.dim, np.float32)
    monkeypatch.setattr(fisher, "_PASSES_PER_DIM", 1)
    monkeypatch.setattr(fisher, "_EXPECTED", 1)
    monkeypatch.setattr(fisher, "TOLERANCE", 1e-30)
    found = fisher.preconditioned(view, query, 0.1)
    np.testing.assert_allclose(found, dense(view, query, 0.1), rtol=2e-4, atol=1e-6)
    assert "the whole second moment is computed instead" in caplog.text
    monkeypatch.setattr(fisher, "LARGEST_MATRIX", 10)
    monkeypatch.setattr(fisher, "_MOST_STEPS", 3)
    with pytest.raises(GradstoreError, match="larger damping"):
        fisher.preconditioned(view, query, 0.1)


def test_the_matrix_serves_once_the_passes_have_cost_as_much(make_store, by_passes, monkeypatch) -> None:
    """Many queries by passes would cost many times the matrix that answers all of them. A matrix there serves."""
    store = make_store(n=90)
    made, view, query = [], store.view("pool"), np.ones(24, np.float32)
    whole = fisher._moment
    monkeypatch.setattr(fisher, "_moment", lambda *given: made.append(1) or whole(*given))
    monkeypatch.setattr(fisher, "_PASSES_PER_DIM", 2)  # 48 passes
    monkeypatch.setattr(fisher, "_EXPECTED", 20)
    first = fisher.preconditioned(view, query)
    assert not made
    several = [fisher.preconditioned(view, query) for _ in range(10)]
    assert len(made) == 1
    np.testing.assert_allclose(several, np.tile(first, (10, 1)), rtol=1e-4, atol=1e-6)
    again = gradstore.open(store.path).view("pool")
    monkeypatch.setattr(fisher, "solve", None)
    np.testing.assert_array_equal(fisher.preconditioned(again, query), several[-1])


def test_a_query_that_is_unknown_stays_unknown(make_store, by_passes) -> None:
    """A basis in which a target was not measured has NaN: it must not keep the others from an answer."""
    view = make_store(n=90).view("pool")
    queries = np.ones((2, 24), np.float32)
    queries[0] = np.nan
    found = fisher.preconditioned(view, queries, 0.1)
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1], dense(view, queries[1], 0.1), rtol=2e-4, atol=1e-6)


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
