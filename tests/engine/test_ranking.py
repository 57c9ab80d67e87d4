"""The k best of many scores against sorting them all."""

import numpy as np
import pytest

from gradstore.engine.searching.ranking import best, kth_smallest

SHAPES = ("random", "few values", "sorted", "one in a sample", "mostly unknown", "all unknown", "infinite")


def scores_of(shape: str, n: int) -> np.ndarray:
    """Scores, NaN for those that must not be ranked; a sample of some tells nothing about the rest."""
    random = np.random.default_rng(n)
    scores = random.standard_normal(n).astype(np.float32)
    if shape == "few values":
        scores = random.integers(0, 5, n).astype(np.float32)
    elif shape == "sorted":
        scores.sort()
    elif shape == "one in a sample":
        scores[:: max(1, n // 4096)] += 100
    elif shape == "mostly unknown":
        scores[random.random(n) < 0.999] = np.nan
    elif shape == "all unknown":
        scores[:] = np.nan
    elif shape == "infinite":
        scores[: n // 2] = np.inf
    return scores


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [0, 1, 50, 4096, 30_011])
@pytest.mark.parametrize("largest", [True, False])
def test_best_is_sorting(shape: str, n: int, largest: bool) -> None:
    """A bound guessed from a sample may cost time, never a problem that belongs among the best."""
    scores = scores_of(shape, n)
    ids = np.array([f"p{i * 7919 % 100_003}" for i in range(n)], dtype=object)
    ranked = sorted(
        (i for i in range(n) if not np.isnan(scores[i])), key=lambda i: (-scores[i] if largest else scores[i], ids[i])
    )
    for k in (1, 2, 7, 100, n + 1):
        assert best(scores, k, lambda chosen: ids[chosen], largest).tolist() == ranked[:k]
        bound = kth_smallest(scores, k)
        known = np.sort(scores[~np.isnan(scores)])
        assert bound == known[min(k, len(known)) - 1] if len(known) else np.isnan(bound)
