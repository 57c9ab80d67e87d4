"""Diverse picks against slow loops over the same formula."""

import numpy as np
import pytest

from gradstore.engine import select, target
from gradstore.engine.selecting.diversity import Diversity, in_turn, kmeans_strata, mmr
from gradstore.errors import RequestError


def candidates(n: int = 40, dim: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), -np.sort(-random.normal(size=n))


@pytest.mark.parametrize("relevance", [0.0, 0.3, 0.5, 1.0])
def test_mmr_equals_a_loop(relevance: float) -> None:
    """The incremental nearest cosine must be the largest over all picks, not over the last one."""
    units, scores = candidates()
    scaled = (scores - scores.min()) / (scores.max() - scores.min())
    picked = [0]
    while len(picked) < 12:
        values = {
            i: relevance * scaled[i] - (1 - relevance) * max(float(units[i] @ units[j]) for j in picked)
            for i in range(len(units))
            if i not in picked
        }
        picked.append(max(values, key=lambda i: (values[i], -i)))
    assert mmr(units, scores, 12, relevance).tolist() == picked
    if relevance == 1.0:
        assert picked == list(range(12))


def test_mmr_leaves_copies_for_last() -> None:
    """Ten copies of the best problem are one problem."""
    units, scores = candidates(20)
    units[1:10] = units[0]
    assert set(mmr(units, scores, 5).tolist()) & set(range(1, 10)) == set()


def test_strata_are_taken_in_turn() -> None:
    """Each stratum's best before any stratum's second best."""
    strata = np.array([2, 2, 2, 0, 0, 1, 2, 1])
    assert in_turn(strata, 8).tolist() == [0, 3, 5, 1, 4, 7, 2, 6]
    assert in_turn(strata, 2).tolist() == [0, 3]


def test_kmeans_finds_separate_groups() -> None:
    """Three tight groups of gradients are three strata, and the same seed gives the same ones."""
    random = np.random.default_rng(1)
    group = random.integers(0, 3, 60)
    units = np.eye(8, dtype=np.float32)[group] + random.normal(scale=0.01, size=(60, 8)).astype(np.float32)
    strata = kmeans_strata(units, 3)
    assert len(set(zip(group.tolist(), strata.tolist(), strict=True))) == 3
    assert np.array_equal(strata, kmeans_strata(units, 3))


@pytest.mark.parametrize("method", ["mmr", "kmeans"])
@pytest.mark.parametrize("n", [1, 7, 40, 100])
def test_every_pick_is_another_candidate(method: str, n: int) -> None:
    """A problem picked twice is a batch one problem short."""
    units, scores = candidates()
    picks = Diversity(method).pick(units, scores, n)
    assert len(picks) == min(n, 40)
    assert len(set(picks.tolist())) == len(picks)
    assert picks[0] == 0


@pytest.mark.parametrize(
    "settings", [{"method": "dpp"}, {"relevance": 1.5}, {"candidates": 0}, {"strata": -1, "method": "kmeans"}]
)
def test_bad_settings_are_refused(settings: dict) -> None:
    """A setting outside its range would be clipped by somebody somewhere."""
    with pytest.raises(RequestError):
        Diversity(**settings)


@pytest.mark.parametrize("method", ["mmr", "kmeans"])
def test_a_diverse_selection(make_store, method: str) -> None:
    """The picks are among the best few times n, have gradients, and the record says how they were made."""
    store = make_store()
    goal = target(store, "bench")
    plain = select(store, "pool", goal, 24)
    diverse = select(store, "pool", goal, 6, diversity=Diversity(method))
    assert len(set(diverse.ids)) == 6
    assert set(diverse.ids) <= set(plain.ids)
    assert diverse.ids[0] == plain.ids[0]
    scores = dict(zip(plain.ids, plain.scores, strict=True))
    np.testing.assert_array_equal(diverse.scores, [scores[name] for name in diverse.ids])
    assert diverse.describe()["diversity"]["method"] == method
    assert plain.describe()["diversity"] is None
    view = store.view("pool")
    random_picks = select(store, "pool", None, 8, "rand", diversity=Diversity(method))
    assert view.live[view.positions(random_picks.ids)].all()
