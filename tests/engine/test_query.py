"""Search against a slow loop over the rows: every metric, direction, filter and index."""

import numpy as np
import pytest

from gradstore import State
from gradstore.engine import Index, Where, layer_contributions, search, target
from gradstore.engine.searching.ranking import best
from gradstore.errors import RequestError


def slow_hits(view, query: np.ndarray, k: int, metric: str, largest: bool, allowed=lambda i: True) -> list:
    """One row at a time, in float64, sorted by (score, id)."""
    scored = []
    for i, problem_id in enumerate(view.ids):
        if view.states[i] != State.LIVE or not allowed(i):
            continue
        unit = view.take([problem_id])[0].astype(np.float64)
        score = float(unit @ query)
        score = score * float(view.norms[i]) if metric == "dot" else score / float(np.linalg.norm(query))
        scored.append((-score if largest else score, problem_id, score))
    return [(problem_id, score) for _, problem_id, score in sorted(scored)[:k]]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4", "1bit"])
@pytest.mark.parametrize("index", ["scan", "flat"])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_search_equals_a_loop(make_store, metric: str, largest: bool, index: str, dtype: str) -> None:
    """The one answer the product is asked for."""
    store = make_store(dtype=dtype)
    view = store.view("pool")
    query = np.random.default_rng(5).normal(size=24).astype(np.float32)
    built = Index.build(view, "flat", metric) if index == "flat" else None
    for k in (1, 7, 1000):
        hits = search(view, query, k, metric=metric, largest=largest, index=built)
        expected = slow_hits(view, query.astype(np.float64), k, metric, largest)
        assert hits.ids.tolist() == [problem_id for problem_id, _ in expected]
        np.testing.assert_allclose(hits.scores, [score for _, score in expected], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("index", ["scan", "flat"])
@pytest.mark.parametrize(
    ("terms", "allowed"),
    [
        (["source=s1"], lambda view, i: i % 3 == 1),
        (["source=s1", "source=s2"], lambda view, i: i % 3 in (1, 2)),
        (["tag=even"], lambda view, i: i % 2 == 0),
        (["tag=nowhere"], lambda view, i: False),
        (["pass_rate=0.25..0.75"], lambda view, i: 0.25 <= view.pass_rates[i] <= 0.75),
        (["source=s0", "tag=even", "pass_rate=0..0.5"], lambda v, i: i % 6 == 0 and v.pass_rates[i] <= 0.5),
    ],
)
def test_filters(make_store, terms, allowed, index: str) -> None:
    """A filter that lets one problem through too many shows what the user excluded."""
    view = make_store().view("pool")
    query = np.ones(24, np.float32)
    built = Index.build(view) if index == "flat" else None
    hits = search(view, query, 10, where=Where.parse(terms), index=built)
    expected = slow_hits(view, query.astype(np.float64), 10, "cosine", True, lambda i: allowed(view, i))
    assert hits.ids.tolist() == [problem_id for problem_id, _ in expected]


@pytest.mark.parametrize("term", ["source", "source=", "colour=red", "pass_rate=low..high", ""])
def test_bad_filters_are_refused(term: str) -> None:
    """A filter misread is a wrong answer."""
    with pytest.raises(RequestError, match="filter"):
        Where.parse([term])


def test_ties_are_broken_by_id() -> None:
    """Equal scores must give the same answer in any order of storage, also at the cut."""
    ids = np.array([f"p{i}" for i in np.random.default_rng(0).permutation(50)], object)
    scores = np.array([int(name[1:]) % 3 for name in ids], np.float64)
    scores[5] = np.nan
    for k in (1, 10, 20, 50):
        for largest in (True, False):
            found = [ids[i] for i in best(scores, k, lambda rows: ids[rows], largest)]
            ranked = sorted((s if not largest else -s, i) for s, i in zip(scores, ids, strict=True) if s == s)
            assert found == [i for _, i in ranked[:k]]


def test_layer_contributions_sum_to_the_score(make_store) -> None:
    """Shares that do not add up to the score explain something else."""
    view = make_store(dtype="int8").view("pool")
    query = np.random.default_rng(2).normal(size=24).astype(np.float32)
    for metric in ("cosine", "dot"):
        hits = search(view, query, 9, metric=metric)
        terms = layer_contributions(view, hits.positions, query, metric)
        assert terms.shape == (9, 3)
        np.testing.assert_allclose(terms.sum(axis=1), hits.scores, rtol=1e-4, atol=1e-5)
        rows = view.take(hits.ids) * (view.norms[hits.positions, None] if metric == "dot" else 1)
        unit = query if metric == "dot" else query / np.linalg.norm(query)
        np.testing.assert_allclose(terms[:, 1], (rows * unit)[:, 10:16].sum(axis=1), rtol=1e-4, atol=1e-5)


def test_target_is_the_mean_gradient(make_store) -> None:
    """Mean over every measured problem, or of unit rows; failed problems are left out."""
    store = make_store()
    view = store.view("pool")
    rows = view.take(view.ids).astype(np.float64)
    live = view.states == State.LIVE
    mean = (rows * view.norms[:, None])[live].sum(axis=0) / (view.states != State.FAILED).sum()
    np.testing.assert_allclose(target(store, "pool").vector, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(target(store, "pool", aggregate="unit_mean").vector, rows[live].mean(axis=0), rtol=1e-5)


def test_targets_and_views_at_a_step(make_store) -> None:
    """A past moment can be asked again after the benchmark and the pool were measured anew."""
    store = make_store()
    before, hits = target(store, "bench"), search(store.view("pool"), target(store, "bench"), 5)
    random = np.random.default_rng(9)
    for name in ("bench", "pool"):
        ids = store.view(name).ids
        with store.writer(name, step=10) as writer:
            writer.append(list(ids), random.normal(size=(len(ids), 24)).astype(np.float32))
    after = target(store, "bench")
    assert after.steps == (10, 10)
    assert not np.allclose(after.vector, before.vector)
    again = target(store, "bench", at=9)
    assert np.array_equal(again.vector, before.vector)
    assert search(store.view("pool", 9), again, 5).ids.tolist() == hits.ids.tolist()


@pytest.mark.parametrize(
    ("query", "k", "metric", "message"),
    [
        (np.ones(23), 5, "cosine", "24 dimensions"),
        (np.zeros(24), 5, "cosine", "length is 0.0"),
        (np.full(24, np.nan), 5, "dot", "length is nan"),
        (np.ones(24), 0, "cosine", "k is 0"),
        (np.ones(24), 5, "euclid", "metric 'euclid'"),
    ],
)
def test_bad_queries_are_refused(make_store, query, k, metric, message: str) -> None:
    """A NaN query would return something; it must return an error."""
    with pytest.raises(RequestError, match=message):
        search(make_store().view("pool"), query, k, metric=metric)


def test_a_benchmark_without_signal_has_no_target(make_store) -> None:
    """Ranking against a zero vector would be ranking by id."""
    store = make_store()
    store.add_problems("flat", [{"id": "x", "prompt": "?"}])
    with store.writer("flat", step=0) as writer:
        writer.append(["x"], np.zeros((1, 24), np.float32))
    with pytest.raises(RequestError, match="'flat' has no gradient"):
        target(store, "flat")
