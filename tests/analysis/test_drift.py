"""Drift of targets and rankings, noise floors and half-lives: against loops, and planted ones found again."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata, spearmanr

from gradstore.analysis import agreement
from gradstore.analysis.agreement import calibrated, chance, jaccard, rank_biased_overlap, spearman
from gradstore.analysis.drift import half_life, ranking_drift, staleness, target_drift
from gradstore.analysis.noise import half_dots, rank_reliability
from gradstore.errors import RequestError


def slow_overlap(a: list[int], b: list[int], p: float, depth: int) -> float:
    """Webber's RBO_ext, prefix by prefix."""
    total = 0.0
    for d in range(1, depth + 1):
        shared = len(set(a[:d]) & set(b[:d]))
        total += shared / d * p**d
    return shared / depth * p**depth + (1 - p) / p * total


def test_agreement_is_that_of_slow_definitions() -> None:
    random = np.random.default_rng(0)
    for n, k in ((3, 1), (17, 5), (120, 12)):
        a, b = random.normal(size=n), random.normal(size=n)
        b = 0.6 * a + b
        first, second = np.argsort(-a).tolist(), np.argsort(-b).tolist()
        assert spearman(a, b) == pytest.approx(spearmanr(a, b)[0])
        common = set(first[:k]) & set(second[:k])
        assert jaccard(a, b, k) == pytest.approx(len(common) / len(set(first[:k]) | set(second[:k])))
        expected = slow_overlap(first, second, 1 - 1 / max(k, 2), min(n, 20 * max(k, 2)))
        assert rank_biased_overlap(a, b, k) == pytest.approx(expected)
        assert rank_biased_overlap(a, a, k) == pytest.approx(1)


def test_chance_leaves_the_reliability_it_is_given() -> None:
    """Two measurements of reliability r agree by r; what is not measured again agrees wholly."""
    random = np.random.default_rng(0)
    truth, noise = random.normal(size=5000), random.choice([0.2, 1.0], 5000)
    scores, again = (truth + noise * random.normal(size=5000) for _ in range(2))
    reliability = spearman(scores, again)
    found = calibrated(scores, 7 * noise, reliability)
    np.testing.assert_allclose(found, noise, rtol=0.1)
    everyone = np.ones(5000, bool)
    left = chance(scores, found, everyone, 100)
    assert left[0] == pytest.approx(reliability, abs=0.02)
    assert left[1] == pytest.approx(jaccard(scores, again, 100), abs=0.07)
    assert left[2] == pytest.approx(rank_biased_overlap(scores, again, 100), abs=0.07)
    assert chance(scores, found, ~everyone, 100) == pytest.approx((1, 1, 1))
    assert chance(scores, found, random.random(5000) < 0.3, 100)[0] > left[0] + 0.02
    assert np.isnan(chance(scores, calibrated(scores, noise, float("nan")), everyone, 10)).all()


def test_noise_of_a_large_pool_is_that_of_a_sample(monkeypatch) -> None:
    """Simulations of a million problems take a minute, and tell no more than those of some ten thousand."""
    random = np.random.default_rng(7)  # 0 would draw the numbers of the simulations
    truth = random.normal(size=20_000)
    scores, proportions = truth + 0.5 * random.normal(size=20_000), random.lognormal(0, 0.3, 20_000)
    anew = random.random(20_000) < 0.7
    whole = calibrated(scores, proportions, 0.8)
    of_whole = chance(scores, whole, anew, 2000)
    monkeypatch.setattr(agreement, "SIMULATED", 4000)
    sampled = calibrated(scores, proportions, 0.8)
    np.testing.assert_allclose(sampled, whole, rtol=0.05)
    np.testing.assert_allclose(chance(scores, whole, anew, 2000), of_whole, atol=0.03)


def test_ranks_are_the_mean_ranks_of_ties() -> None:
    """Ranks in the order of the array would make agreement out of equal scores."""
    for scores in ([], [3.0], [2.0, 2.0], [1.0, 3.0, 1.0, 1.0, 2.0, 3.0], [0.5, -1.0, 4.0]):
        expected = rankdata(scores) - (len(scores) + 1) / 2
        np.testing.assert_array_equal(agreement.centred_ranks(np.array(scores)), expected)
    assert np.isnan(agreement.centred_ranks(np.array([1.0, np.nan, 2.0]))).all()


def test_target_drift_is_the_cosine_and_finds_the_planted_angle(make_history) -> None:
    """A target that turns by 0.02 radians a step has turned by 0.2 after ten."""
    history = make_history(np.zeros((4, 20)), rotation=0.02, noise=0.05)
    frame = target_drift(history.store, "bench").set_index(["step", "other"])
    assert len(frame) == 10
    for (step, other), row in frame.iterrows():
        a, b = (history.target(history.steps.index(each)) for each in (step, other))
        assert row["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
        assert row["cosine"] == pytest.approx(np.cos(0.02 * (other - step)), abs=0.02)
        assert row["length"] == pytest.approx(np.linalg.norm(b), rel=1e-5)
        assert row["consecutive"] == (other == step + 10)


def test_target_noise_is_what_an_unchanged_target_shows(make_history) -> None:
    """Without drift the cosine between two measurements is the noise floor; with drift it falls below."""
    history = make_history(np.zeros((6, 5)), noise=1.5)
    still = target_drift(history.store, "bench")
    still = still[still["step"] < still["other"]]
    assert still["cosine"].mean() == pytest.approx(still["noise"].mean(), abs=0.1)
    assert 0.3 < still["noise"].mean() < 0.9


def test_target_noise_is_that_of_a_loop(history) -> None:
    """Half the mean of the variances of the mean change, to the step before and to the one after."""
    frame = target_drift(history.store, "bench").set_index(["step", "other"])
    variances = []
    for s in range(3):
        change = history.bench_SVD[s + 1] - history.bench_SVD[s]
        variances.append(change.var(axis=0, ddof=1).sum() / len(change))
    energy = [variances[0] / 2, *(np.mean(variances[s - 1 : s + 1]) / 2 for s in (1, 2)), variances[2] / 2]
    for (step, other), row in frame.iterrows():
        a, b = history.steps.index(step), history.steps.index(other)
        x, y = np.linalg.norm(history.target(a)), np.linalg.norm(history.target(b))
        expected = (x**2 + y**2 - energy[a] - energy[b]) / (2 * x * y) if a < b else 1.0
        assert row["noise"] == pytest.approx(min(1, expected), abs=1e-5)


def test_turning_targets_fall_below_their_noise(make_history) -> None:
    history = make_history(np.zeros((4, 5)), rotation=0.03, noise=0.3)
    far = target_drift(history.store, "bench").set_index(["step", "other"]).loc[(0, 30)]
    assert far["cosine"] < far["noise"] - 0.2 < 0.8


def test_ranking_drift_is_that_of_a_loop(history) -> None:
    frame = ranking_drift(history.store, "pool", "bench", k=5, reliability=0.8)
    assert frame["against"].tolist() == ["previous"] * 3 + ["first"] * 3
    for row in frame.itertuples():
        a, b = history.steps.index(row.other), history.steps.index(row.step)
        both = [p for p in range(60) if np.isfinite(history.rows_SPD[[a, b], p]).all()]
        x, y = (np.array([history.cosine(s, p) for p in both]) for s in (a, b))
        assert row.n == len(both)
        assert row.spearman == pytest.approx(spearmanr(x, y)[0], abs=1e-4)
        assert row.jaccard == pytest.approx(jaccard(x, y, 5))
        assert row.rbo == pytest.approx(rank_biased_overlap(x, y, 5), abs=1e-4)
        anew = np.mean([history.measured_SP[a + 1 : b + 1, p].any() for p in both])
        assert row.refreshed == pytest.approx(anew)
        assert row.noise_from == "given"


def test_without_drift_the_ranking_agrees_as_well_as_noise_lets_it(make_history) -> None:
    """The floor is estimated from the store alone, from how rows of several steps agree."""
    along = np.tile(np.random.default_rng(1).normal(size=400), (5, 1))
    history = make_history(along, noise=0.6, source_strength=0.0)
    frame = ranking_drift(history.store, "pool", "bench")
    assert set(frame["noise_from"]) == {"repeats"}
    np.testing.assert_allclose(frame["spearman"], frame["noise_spearman"], atol=0.08)
    np.testing.assert_allclose(frame["jaccard"], frame["noise_jaccard"], atol=0.2)
    assert half_life(history.store, "pool", "bench")["half_life"].iloc[0] > 100


def decaying(n_steps: int, n: int, lives: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Values that keep their variance and whose correlation halves every `lives` tens of steps."""
    keep = 0.5 ** (1 / lives)
    values = [random.normal(size=n)]
    for _ in range(n_steps - 1):
        values.append(keep * values[-1] + np.sqrt(1 - keep**2) * random.normal(size=n))
    return np.array(values)


def test_planted_half_life_and_reliability_are_found(make_history) -> None:
    """Half of the agreement is gone after 30 steps; what remains at age 0 is the noise of two measurements."""
    random = np.random.default_rng(2)
    along = decaying(10, 900, np.full(900, 3.0), random)
    history = make_history(along, noise=0.5, source_strength=0.0)
    row = half_life(history.store, "pool", "bench", metric="dot").iloc[0]
    assert row["half_life"] == pytest.approx(30, rel=0.2)
    assert row["low"] < 30 < row["high"]
    pearson = 1 / (1 + 0.25)  # variance of the truth over that of a measurement; the target is nearly exact
    assert row["reliability"] == pytest.approx(6 / np.pi * np.arcsin(pearson / 2), abs=0.07)
    assert (row["n_problems"], row["n_pairs"], row["longest"]) == (900, 45, 90)


def test_half_lives_of_sources_differ_where_they_were_planted_to(make_history) -> None:
    lives = np.array([2.0, 8.0])[np.arange(800) % 2]
    along = decaying(8, 800, lives, np.random.default_rng(4))
    history = make_history(along, noise=0.3, source_strength=0.0, n_sources=2)
    found = half_life(history.store, "pool", "bench", by="source", metric="dot").set_index("group")["half_life"]
    assert found["s0"] == pytest.approx(20, rel=0.35)
    assert found["s1"] == pytest.approx(80, rel=0.5)


def test_staleness_scores_old_rows_with_the_new_target(history) -> None:
    frame = staleness(history.store, "pool", "bench")
    for row in frame.itertuples():
        a, b = history.steps.index(row.stale_step), history.steps.index(row.step)
        both = [
            p
            for p in range(60)
            if history.measured_SP[[a, b], p].all() and np.isfinite(history.rows_SPD[[a, b], p]).all()
        ]
        stale, fresh = [history.cosine(a, p, at=b) for p in both], [history.cosine(b, p) for p in both]
        assert row.n == len(both)
        assert row.spearman == pytest.approx(spearmanr(stale, fresh)[0], abs=1e-4)
        assert row.age == row.step - row.stale_step
    by_source = staleness(history.store, "pool", "bench", by="source")
    assert set(by_source["group"]) <= {"s0", "s1", "s2"}
    with pytest.raises(RequestError, match="tag"):
        half_life(history.store, "pool", "bench", by="tag")


def test_probes_tell_the_reliability_by_halves(make_history) -> None:
    """The Spearman of halves, carried to all rollouts, is that of two separate sets of rollouts."""
    random = np.random.default_rng(5)
    n, G = 1500, 16
    history = make_history(np.zeros((1, n)))
    slopes = random.normal(size=n)

    def measured() -> tuple[list, list]:
        rewards = [np.float32(random.permutation(np.arange(G) % 2)) for _ in range(n)]
        noise = [random.normal(size=G) * 2 for _ in range(n)]
        return rewards, [slope * r + e for slope, r, e in zip(slopes, rewards, noise, strict=True)]

    dots = []
    for _ in range(2):
        rewards, derivatives = measured()
        dots.append([np.mean((r - r.mean()) * d) for r, d in zip(rewards, derivatives, strict=True)])
    objective = {"advantage": "mean", "aggregation": "seq-mean-token-mean"}
    history.store.probes("pool").add(
        history.ids, derivatives, rewards, [np.full(G, 5)] * n, step=0, target="bench", objective=objective
    )
    table = half_dots(history.store, "pool", "bench")
    r, d = rewards[7], np.float32(derivatives[7])
    expected = np.mean((r[::2] - r[::2].mean()) * d[::2])
    assert table["even"][7] == pytest.approx(expected, abs=1e-6)
    assert table["dot"].to_numpy() == pytest.approx(np.array(dots[1]), abs=1e-5)
    trust = rank_reliability(history.store, "pool", "bench")
    assert trust.source == "probes"
    assert trust.value == pytest.approx(spearmanr(*dots)[0], abs=0.08)


def test_a_store_that_cannot_tell_says_so(make_history) -> None:
    """One step has no pair, so no half-life and no floor: nan, never a made-up number."""
    history = make_history(np.random.default_rng(0).normal(size=(1, 30)))
    assert half_life(history.store, "pool", "bench").empty
    assert ranking_drift(history.store, "pool", "bench").empty
    assert rank_reliability(history.store, "pool", "bench").source == "none"
    assert isinstance(target_drift(history.store, "bench"), pd.DataFrame)
