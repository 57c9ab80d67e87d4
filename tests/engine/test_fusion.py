"""Combined rankings against loops over problems and benchmarks."""

import numpy as np
import pytest

from gradstore.engine import fuse_scores, search, search_each, search_fused
from gradstore.errors import RequestError

SCORES = np.array([[3.0, 1.0, 2.0, 2.0], [0.0, 4.0, 1.0, -1.0], [1.0, 1.0, 5.0, 0.0]])


def slow(how: str, weights: list[float], constant: float) -> list[float]:
    fused = []
    for i in range(SCORES.shape[1]):
        column = SCORES[:, i].tolist()
        if how == "minimum":
            fused.append(min(column))
        elif how == "mean":
            fused.append(sum(w * s for w, s in zip(weights, column, strict=True)) / sum(weights))
        else:
            ranks = [1 + sum(other > s for other in row) for row, s in zip(SCORES.tolist(), column, strict=True)]
            fused.append(sum(w / (constant + r) for w, r in zip(weights, ranks, strict=True)) / sum(weights))
    return fused


@pytest.mark.parametrize("constant", [60.0, 0.0])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 0.5]])
@pytest.mark.parametrize("how", ["mean", "minimum", "rrf"])
def test_formulas(how: str, weights, constant: float) -> None:
    """Equal scores have equal ranks: else the order of storage would decide."""
    if how == "minimum" and weights is not None:
        with pytest.raises(RequestError, match="takes no weights"):
            fuse_scores(SCORES, how, weights)
        return
    found = fuse_scores(SCORES, how, weights, constant)
    np.testing.assert_allclose(found, slow(how, weights or [1.0, 1.0, 1.0], constant))


@pytest.mark.parametrize("how", ["mean", "minimum", "rrf"])
def test_what_is_not_ranked_stays_so(how: str) -> None:
    """A problem without a gradient must not take a place from one that has."""
    gap = np.insert(SCORES, 2, np.nan, axis=1)
    found = fuse_scores(gap, how)
    assert np.isnan(found[2])
    np.testing.assert_allclose(np.delete(found, 2), fuse_scores(SCORES, how))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("metric", ["cosine", "dot", "fisher"])
def test_each_target_has_its_own_search(make_store, metric: str, dtype: str, largest: bool) -> None:
    """Many targets at once give what each gives alone."""
    view = make_store(dtype=dtype).view("pool")
    queries = np.random.default_rng(0).normal(size=(5, 24))
    for query, hits in zip(queries, search_each(view, queries, 7, metric=metric, largest=largest), strict=True):
        alone = search(view, query, 7, metric=metric, largest=largest)
        assert hits.ids.tolist() == alone.ids.tolist()
        np.testing.assert_allclose(hits.scores, alone.scores, rtol=1e-5)
        assert hits.n_eligible == alone.n_eligible


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("how", ["mean", "minimum", "rrf"])
def test_fused_search(make_store, how: str, largest: bool) -> None:
    """The combined ranking is that of the combined scores, best first, with every benchmark's own score beside it."""
    view = make_store(dtype="int8").view("pool")
    queries = np.random.default_rng(0).normal(size=(3, 24))
    hits = search_fused(view, queries, 9, how=how, largest=largest)
    every = [search(view, query, len(view)) for query in queries]
    of = [dict(zip(found.ids.tolist(), found.scores.tolist(), strict=True)) for found in every]
    ids = sorted(of[0])
    sign = 1 if largest else -1
    fused = fuse_scores(sign * np.array([[scores[i] for i in ids] for scores in of]), how)
    ranked = sorted(range(len(ids)), key=lambda i: (-fused[i], ids[i]))[:9]
    assert hits.ids.tolist() == [ids[i] for i in ranked]
    np.testing.assert_allclose(hits.scores, (1 if how == "rrf" else sign) * fused[ranked], rtol=1e-5)
    np.testing.assert_allclose(hits.scores_QK, [[scores[i] for i in hits.ids] for scores in of], rtol=1e-5)


def test_the_mean_of_cosines_is_one_query(make_store) -> None:
    """It equals the cosine with the sum of the unit targets, up to a factor: a check from the other side."""
    view = make_store().view("pool")
    queries = np.random.default_rng(0).normal(size=(3, 24))
    units = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    assert search_fused(view, queries, 10).ids.tolist() == search(view, units.sum(axis=0), 10).ids.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"how": "median"}, "'median' is not one of"),
        ({"weights": [1.0]}, "1 weights for 3"),
        ({"weights": [1.0, -1.0, 1.0]}, "none negative"),
        ({"weights": [0.0, 0.0, 0.0]}, "not all zero"),
        ({"weights": [1.0, float("nan"), 1.0]}, "finite"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    """A negative weight would push a benchmark down in silence."""
    with pytest.raises(RequestError, match=message):
        fuse_scores(SCORES, **settings)


def test_no_target_is_refused(make_store) -> None:
    """The mean over nothing ranks by id."""
    with pytest.raises(RequestError, match="no target"):
        search_fused(make_store().view("pool"), [], 3)
