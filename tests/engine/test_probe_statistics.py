"""How sure a probe is: its statistics against direct formulas and simulation, and what is kept of it."""

import math

import numpy as np
import pytest
from scipy import stats

from gradstore.engine import Objective, ProbeBatch, objective
from gradstore.engine.probing.statistics import (
    correlation,
    correlations,
    dot_and_error,
    dots_and_errors,
    false_discovery_cut,
    lower_bound,
    shrunk,
    signal_to_noise,
    t_test,
    t_tests,
)
from gradstore.engine.rollouts import Group
from gradstore.errors import RequestError


def draws(n: int, size: int, seed: int, slope: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards (coin flips), derivatives that rise with the reward by `slope`, and lengths; [n, size] each."""
    random = np.random.default_rng(seed)
    rewards = random.integers(0, 2, (n, size)).astype(float)
    lengths = random.integers(5, 60, (n, size))
    return rewards, slope * rewards + random.normal(size=(n, size)) * (1 + rewards), lengths


@pytest.mark.parametrize(
    "settings",
    [
        Objective("mean", "seq-mean-token-mean"),
        Objective("mean_std", "seq-mean-token-mean"),
        Objective("rloo", "seq-mean-token-sum"),
        Objective("mean_std", "token-mean"),
    ],
    ids=lambda s: f"{s.advantage}-{s.aggregation}",
)
def test_standard_error_is_that_of_repeated_draws(settings: Objective) -> None:
    """A standard error that ignores the advantage's own normalisation is off by a factor where signal is strong."""
    rewards, values, lengths = draws(4000, 64, 0, slope=3.0)
    if settings.aggregation == "token-mean":  # sums that grow with the length, over the group's mean length
        values = values * lengths / lengths.mean(1, keepdims=True)
    found = [dot_and_error(r, d, t, settings) for r, d, t in zip(rewards, values, lengths, strict=True)]
    dots, errors = np.array(found).T
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(dots.std(), rel=0.08)


def test_standard_error_of_the_plain_advantage_is_the_simple_formula() -> None:
    """std_j(A_j (d_j - mean d)) / sqrt(G), as published beside the method."""
    rewards, values, lengths = (x[0] for x in draws(1, 16, 3, slope=1.0))
    dot, error = dot_and_error(rewards, values, lengths, objective("gradalign"))
    centred = rewards - rewards.mean()
    assert dot == pytest.approx(np.cov(rewards, values, ddof=0)[0, 1])
    assert error == pytest.approx(np.std(centred * (values - values.mean()), ddof=1) / 4)


def test_p_values_are_those_of_a_correlation_test() -> None:
    """Against scipy's own test, one-sided."""
    rewards, values, _ = draws(20, 12, 1, slope=0.7)
    for r_G, d_G in zip(rewards, values, strict=True):
        expected = stats.pearsonr(r_G, d_G, alternative="greater")
        t, p = t_test(r_G, d_G)
        assert p == pytest.approx(expected.pvalue, rel=1e-6)
        assert t == pytest.approx(expected.statistic * np.sqrt(10 / (1 - expected.statistic**2)))


@pytest.mark.parametrize("size", [8, 16, 64])
def test_type_one_error_under_coin_flips(size: int) -> None:
    """Under rewards that look at nothing, p < 0.05 must occur in one problem of twenty, or no cut holds its rate."""
    random = np.random.default_rng(size)
    p_values = []
    while len(p_values) < 8000:
        r_G = random.integers(0, 2, size).astype(float)
        if r_G.max() > r_G.min():
            p_values.append(t_test(r_G, random.normal(size=size))[1])
    for level in (0.01, 0.05, 0.2):
        share = np.mean(np.array(p_values) < level)
        assert share == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 8000))


def test_degenerate_statistics() -> None:
    """Two rollouts, equal derivatives, a perfect split: numbers, not nan."""
    assert t_test(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == (0.0, 1.0)
    assert t_test(np.array([0.0, 1.0, 1.0]), np.ones(3)) == (0.0, 1.0)
    t, p = t_test(np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert np.isfinite(t)
    assert p == pytest.approx(1 / 6)
    assert correlation(np.zeros(4), np.arange(4.0)) == 0.0
    assert np.isfinite(signal_to_noise(np.array([1.0, 2.0]), np.zeros(2))).all()
    assert np.isfinite(shrunk(np.array([1.0, 2.0]), np.zeros(2))).all()
    assert np.isnan(dot_and_error(np.ones(1), np.ones(1), np.ones(1), objective("gradalign"))[1])


def test_shrinkage_comes_closer_to_the_truth() -> None:
    """Empirical Bayes must beat the raw dots in squared error, and leave certain ones alone."""
    random = np.random.default_rng(0)
    true_P, errors_P = random.normal(0.3, 1.0, 3000), random.uniform(0.1, 2.0, 3000)
    dots_P = true_P + errors_P * random.normal(size=3000)
    found_P = shrunk(dots_P, errors_P)
    best_P = 0.3 + (dots_P - 0.3) / (1 + errors_P**2)  # the posterior mean under the prior the draws came from
    assert np.mean((found_P - true_P) ** 2) < 0.6 * np.mean((dots_P - true_P) ** 2)
    assert np.mean((found_P - true_P) ** 2) < 1.02 * np.mean((best_P - true_P) ** 2)
    assert np.abs(found_P - dots_P)[errors_P < 0.15].max() < 0.15
    np.testing.assert_allclose(lower_bound(dots_P, errors_P), dots_P - errors_P)


def test_false_discovery_cut_holds_its_rate() -> None:
    """Of the problems that pass at level 0.1 about a tenth or fewer may be noise; the step-up rule of the paper."""
    random = np.random.default_rng(1)
    shares = []
    for _ in range(200):
        z_P = random.normal(size=400)
        z_P[:80] += 3.5
        p_P = stats.norm.sf(z_P)
        passed = false_discovery_cut(p_P, 0.1)
        order = np.sort(p_P)
        below = np.flatnonzero(order <= 0.1 * np.arange(1, 401) / 400)
        assert passed.sum() == (below[-1] + 1 if len(below) else 0)
        shares.append(passed[80:].sum() / max(passed.sum(), 1))
    assert np.mean(shares) < 0.1


def test_a_batch_can_be_made_from_derivatives_alone(make_groups) -> None:
    """Derivatives that were stored give the same statistics again."""
    groups = make_groups(5, n_rollouts=6)
    random = np.random.default_rng(0)
    derivatives = [random.normal(size=6) for _ in groups]
    batch = ProbeBatch.of(groups, derivatives, objective("grpo"))
    for i, (group, d_G) in enumerate(zip(groups, derivatives, strict=True)):
        scaled_G = (group.rewards - group.rewards.mean()) / (np.std(group.rewards, ddof=1) + 1e-6)
        assert batch.dots[i] == pytest.approx(np.mean(scaled_G * d_G))
        assert batch.scores("corr")[i] == pytest.approx(correlation(group.rewards, d_G))


def test_a_batch_is_kept_beside_the_rows(make_store, make_groups) -> None:
    """Rescoring months later needs what was measured, not what was made of it."""
    store, groups = make_store(), make_groups(3, n_rollouts=6)
    groups = [Group(f"p{i:03d}", g.prompt_ids, g.responses, g.rewards) for i, g in enumerate(groups)]
    random = np.random.default_rng(0)
    settings = Objective("mean_std", "token-mean")
    batch = ProbeBatch.of(groups, [random.normal(size=6).astype(np.float32) for _ in groups], settings)
    batch.save(store, "pool", step=3, target="bench", target_commit=store.commit("bench"))
    again = ProbeBatch.load(store, "pool", step=3, target="bench")
    assert again.ids == batch.ids
    assert again.settings == settings
    np.testing.assert_allclose(again.dots, batch.dots)
    np.testing.assert_allclose(again.standard_errors, batch.standard_errors)
    with pytest.raises(RequestError, match="no probes at step 4"):
        ProbeBatch.load(store, "pool", step=4, target="bench")


@pytest.mark.parametrize("preset", ["gradalign", "grpo", "dr_grpo", "dapo"])
def test_statistics_of_many_are_those_of_each(preset: str) -> None:
    """To the last bit, whatever the batch: a probe's statistics must not depend on when it was read."""
    random = np.random.default_rng(0)
    for size in (1, 2, 3, 8, 9, 40):
        rewards = random.integers(0, 3, (50, size)) / 2.0
        values = random.normal(size=(50, size)).round(random.integers(0, 3))
        lengths = random.integers(0, 4, (50, size))
        settings = objective(preset)
        dots, errors = dots_and_errors(rewards, values, lengths, settings)
        t, p = t_tests(rewards, values)
        for i in range(50):
            found = (*dot_and_error(rewards[i], values[i], lengths[i], settings), *t_test(rewards[i], values[i]))
            np.testing.assert_array_equal(found, (dots[i], errors[i], t[i], p[i]))
            assert correlations(rewards, values)[i] == correlation(rewards[i], values[i])
            if size > 2 and np.ptp(rewards[i]) and np.ptp(values[i]):
                assert correlation(rewards[i], values[i]) == pytest.approx(np.corrcoef(rewards[i], values[i])[0, 1])
                counts = np.unique(values[i], return_counts=True)[1]
                orders = math.factorial(size) / math.prod(map(math.factorial, counts.tolist()))
                assert p[i] == pytest.approx(max(stats.t.sf(t[i], size - 2), 1 / orders)) or t[i] == 0
