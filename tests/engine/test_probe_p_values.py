"""The p-value of a probe never claims more than permuting its rollouts could."""

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from gradstore.engine.probing.statistics import correlation, t_test


def permuted(rewards_G: np.ndarray, derivatives_G: np.ndarray) -> float:
    """Share of all orders of the derivatives that correlate at least as well."""
    seen = correlation(rewards_G, derivatives_G) - 1e-12
    return float(np.mean([correlation(rewards_G, np.array(order)) >= seen for order in permutations(derivatives_G)]))


@pytest.mark.parametrize("n_right", [1, 2, 3, 5])
def test_two_responses_told_apart_perfectly(n_right: int) -> None:
    """Right and wrong are two texts, as a habitual slip makes them: t is infinite, the permutation test is not."""
    rewards_G = np.array([1.0] * n_right + [0.0] * (6 - n_right))
    assert t_test(rewards_G, 2 * rewards_G - 1)[1] == pytest.approx(permuted(rewards_G, rewards_G))


def test_never_below_what_permuting_equal_responses_can_give() -> None:
    """Against every order, for rewards sorted along the derivatives; Student alone would claim more."""
    random = np.random.default_rng(0)
    lower = 0
    for _ in range(60):
        derivatives_G = np.sort(random.choice(random.normal(size=3), 6))
        rewards_G = np.sort(random.random(6))
        if derivatives_G[0] == derivatives_G[-1]:
            continue
        smallest = 1 / len(set(permutations(derivatives_G)))
        t, p = t_test(rewards_G, derivatives_G)
        assert p >= smallest * (1 - 1e-9)
        lower += stats.t.sf(t, 4) < smallest
    assert lower > 5


def test_distinct_responses_keep_students_value() -> None:
    random = np.random.default_rng(1)
    rewards_G, derivatives_G = random.normal(size=(2, 32))
    derivatives_G += 2 * rewards_G
    t, p = t_test(rewards_G, derivatives_G)
    assert p == stats.t.sf(t, 30)
    assert 0 < p < 1e-6
