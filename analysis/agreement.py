"""How alike two rankings of the same problems are, and how alike chance alone lets them be: pure functions.

Dimension letters: P problems, K the first few of them, B simulations.
"""

import numpy as np
from scipy.stats import rankdata  # type: ignore[import-untyped]


def spearman(a_P: np.ndarray, b_P: np.ndarray) -> float:
    """Correlation of the ranks, equal scores sharing their mean rank; nan for fewer than three, or no variation."""
    if len(a_P) < 3:
        return float("nan")
    x_P, y_P = rankdata(a_P) - (len(a_P) + 1) / 2, rankdata(b_P) - (len(b_P) + 1) / 2
    scale = np.sqrt((x_P @ x_P) * (y_P @ y_P))
    return float(x_P @ y_P / scale) if scale > 0 else float("nan")


def order(scores_P: np.ndarray) -> np.ndarray:
    """Places from the largest score to the smallest, equal ones in the order they are in: int64 [P]."""
    return np.argsort(-scores_P, kind="stable")


def jaccard(a_P: np.ndarray, b_P: np.ndarray, k: int) -> float:
    """Share of the union of the two best k that is in both."""
    both = len(np.intersect1d(order(a_P)[:k], order(b_P)[:k]))
    size = min(k, len(a_P))
    return both / (2 * size - both) if size else float("nan")


def rank_biased_overlap(a_P: np.ndarray, b_P: np.ndarray, k: int) -> float:
    """Overlap of the two orders, averaged over depths d with weights p^d, p = 1 - 1/k (a reader who looks at k on
    average), extrapolated beyond depth 20 k: RBO_ext of Webber, Moffat and Zobel, TOIS 2010, equation 32."""
    n = len(a_P)
    if not n:
        return float("nan")
    p = 1 - 1 / max(k, 2)
    depth = min(n, 20 * max(k, 2))
    place_a, place_b = np.empty(n, np.int64), np.empty(n, np.int64)
    place_a[order(a_P)], place_b[order(b_P)] = np.arange(n), np.arange(n)
    meet_P = np.maximum(place_a, place_b)
    overlap_D = np.cumsum(np.bincount(meet_P[meet_P < depth], minlength=depth)) / np.arange(1, depth + 1)
    weights_D = p ** np.arange(1, depth + 1)
    return float(overlap_D[-1] * weights_D[-1] + (1 - p) / p * (overlap_D @ weights_D))


def chance(
    n: int, k: int, reliability: float, refreshed: float = 1.0, *, seed: int = 0, repeats: int = 8
) -> tuple[float, float, float]:
    """(Spearman, Jaccard of the best k, rank-biased overlap) of two noisy rankings of problems that did not change.

    reliability: Spearman of two separate measurements of the same problems. refreshed: share of the problems measured
    anew in between; the others keep their score. By simulation: score = truth + noise, both normal, their variances
    such that the Pearson correlation is 2 sin(pi reliability / 6). At most 20,000 problems are simulated, k with them.
    """
    if not n or not np.isfinite(reliability):
        return (float("nan"),) * 3
    size = min(n, 20_000)
    k = max(1, round(k * size / n))
    correlation = float(np.clip(2 * np.sin(np.pi * reliability / 6), 0, 1))
    found = []
    for repeat in range(repeats):
        random = np.random.default_rng([seed, repeat])
        truth_P, first_P, second_P = random.normal(size=(3, size))
        again_P = random.random(size) < refreshed
        a_P = np.sqrt(correlation) * truth_P + np.sqrt(1 - correlation) * first_P
        b_P = np.sqrt(correlation) * truth_P + np.sqrt(1 - correlation) * np.where(again_P, second_P, first_P)
        found.append((spearman(a_P, b_P), jaccard(a_P, b_P, k), rank_biased_overlap(a_P, b_P, k)))
    means = np.mean(found, axis=0)
    return float(means[0]), float(means[1]), float(means[2])
