"""Agreement of two rankings of the same problems, and the agreement that noise alone would leave; pure functions.

Dimension letters: P problems, D depth.
"""

import numpy as np

_CALIBRATION = 1 << 20
"""Seed component that separates the calibration's draws from the simulations'."""
LEAST_RANKED = 3
"""Fewest scores that have a rank correlation."""
SIMULATED = 40_000
"""Most problems that a simulated second measurement takes: the agreement of more differs in the third digit."""


def spearman(a_P: np.ndarray, b_P: np.ndarray) -> float:
    """Spearman rank correlation; ties get their mean rank. nan for fewer than three scores, or constant scores."""
    return pearson(centred_ranks(a_P), centred_ranks(b_P)) if len(a_P) >= LEAST_RANKED else float("nan")


def centred_ranks(scores_P: np.ndarray) -> np.ndarray:
    """Ranks less their mean, ties with their mean rank: float64 [P]; all nan if a score is."""
    n, order_P = len(scores_P), np.argsort(scores_P)
    sorted_P = scores_P[order_P]
    if n and np.isnan(sorted_P[-1]):
        return np.full(n, np.nan)
    ranks_P = np.empty(n)
    differs_P = sorted_P[1:] != sorted_P[:-1]
    if differs_P.all():
        ranks_P[order_P] = np.arange(n) - (n - 1) / 2
        return ranks_P
    first = np.flatnonzero(np.r_[True, differs_P])  # of each run of equal scores
    sizes = np.diff(first, append=n)
    ranks_P[order_P] = np.repeat(first + (sizes - 1) / 2, sizes) - (n - 1) / 2
    return ranks_P


def pearson(x_P: np.ndarray, y_P: np.ndarray) -> float:
    """Cosine of two centred vectors; nan where one is zero."""
    scale = np.sqrt((x_P @ x_P) * (y_P @ y_P))
    return float(x_P @ y_P / scale) if scale > 0 else float("nan")


def order(scores_P: np.ndarray) -> np.ndarray:
    """Positions sorted from the largest score to the smallest, ties in their given order: int64 [P]."""
    return np.argsort(-scores_P, kind="stable")


def jaccard(a_P: np.ndarray, b_P: np.ndarray, k: int) -> float:
    """Jaccard index of the two top-k sets: size of the intersection over size of the union."""
    return jaccard_of_orders(order(a_P), order(b_P), k)


def jaccard_of_orders(a_P: np.ndarray, b_P: np.ndarray, k: int) -> float:
    """`jaccard` of two rankings by their orders, int64 [P]."""
    among_P = np.zeros(len(a_P), bool)
    among_P[a_P[:k]] = True
    both = int(among_P[b_P[:k]].sum())
    size = min(k, len(a_P))
    return both / (2 * size - both) if size else float("nan")


def rank_biased_overlap(a_P: np.ndarray, b_P: np.ndarray, k: int) -> float:
    """Rank-biased overlap of two orders: top-d overlap averaged over depths d with weights p^d, p = 1 - 1/k.

    Such a reader looks at k problems on average. Extrapolated beyond depth 20 k: RBO_ext of Webber, Moffat and Zobel,
    TOIS 2010, equation 32.
    """
    return overlap_of_orders(order(a_P), order(b_P), k)


def overlap_of_orders(a_P: np.ndarray, b_P: np.ndarray, k: int) -> float:
    """`rank_biased_overlap` of two rankings by their orders, int64 [P]."""
    n = len(a_P)
    if not n:
        return float("nan")
    p = 1 - 1 / max(k, 2)
    depth = min(n, 20 * max(k, 2))
    place_a, place_b = np.empty(n, np.int64), np.empty(n, np.int64)
    place_a[a_P], place_b[b_P] = np.arange(n), np.arange(n)
    meet_P = np.maximum(place_a, place_b)
    overlap_D = np.cumsum(np.bincount(meet_P[meet_P < depth], minlength=depth)) / np.arange(1, depth + 1)
    weights_D = p ** np.arange(1, depth + 1)
    return float(overlap_D[-1] * weights_D[-1] + (1 - p) / p * (overlap_D @ weights_D))


def calibrated(scores_P: np.ndarray, noise_P: np.ndarray, reliability: float, *, seed: int = 0) -> np.ndarray:
    """Scale the noise so that two measurements have the given reliability (Spearman): float64 [P].

    noise_P: standard deviations up to a common factor; bisection finds the factor, on at most SIMULATED problems. nan
    for a reliability of nan.
    """
    if not np.isfinite(reliability) or len(scores_P) < 3:
        return np.full(len(scores_P), np.nan)
    low, high = -12.0, 12.0
    scale = float(scores_P.std() / np.sqrt(np.mean(noise_P**2)))
    drawn = _drawn(len(scores_P), seed)
    some_P, proportions_P = scores_P[drawn], noise_P[drawn] * scale
    for _ in range(30):
        middle = (low + high) / 2
        again_P = _measured_again(some_P, proportions_P * np.exp(middle), np.random.default_rng([seed, _CALIBRATION]))
        low, high = (middle, high) if spearman(some_P, again_P) > reliability else (low, middle)
    return noise_P * scale * np.exp((low + high) / 2)


def _drawn(n: int, seed: int) -> np.ndarray | slice:
    """At most SIMULATED of n problems, drawn at random, in their order."""
    if n <= SIMULATED:
        return slice(None)
    return np.sort(np.random.default_rng([seed, _CALIBRATION, n]).choice(n, SIMULATED, replace=False))


def chance(
    scores_P: np.ndarray, noise_P: np.ndarray, anew_P: np.ndarray, k: int, *, seed: int = 0
) -> tuple[float, float, float]:
    """Noise floor (Spearman, Jaccard of the top k, rank-biased overlap): scores against a second measurement.

    It is the agreement with other rollouts if the policy has not changed: a mean over seeded simulations, at most
    eight, of at most SIMULATED problems (k is then reduced in proportion). nan if the noise is unknown. noise_P:
    standard deviation of each score. anew_P: bool, problems that are measured again; the others keep their score.
    """
    if not len(scores_P) or not np.isfinite(noise_P).all():
        return (float("nan"),) * 3
    if len(scores_P) > SIMULATED:
        drawn = _drawn(len(scores_P), seed)
        k = max(1, round(k * SIMULATED / len(scores_P)))
        scores_P, noise_P, anew_P = scores_P[drawn], noise_P[drawn], anew_P[drawn]
    found, order_P = [], order(scores_P)
    for repeat in range(int(np.clip(SIMULATED // len(scores_P), 1, 8))):
        again_P = _measured_again(scores_P, noise_P, np.random.default_rng([seed, repeat]))
        other_P = np.where(anew_P, again_P, scores_P)
        other = order(other_P)
        overlaps = jaccard_of_orders(order_P, other, k), overlap_of_orders(order_P, other, k)
        found.append((spearman(scores_P, other_P), *overlaps))
    means = np.mean(found, axis=0)
    return float(means[0]), float(means[1]), float(means[2])


def _measured_again(scores_P: np.ndarray, noise_P: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Simulate a second measurement given the first. The true scores are normal around the pool's mean; their variance
    is the scores' variance minus the noise's (at least a hundredth of it)."""
    mean, variance = scores_P.mean(), scores_P.var()
    truth = max(float(variance - np.mean(noise_P**2)), 0.01 * float(variance))
    kept_P = truth / (truth + noise_P**2)
    spread_P = noise_P * np.sqrt(1 + kept_P)
    again_P: np.ndarray = mean + kept_P * (scores_P - mean) + spread_P * random.normal(size=len(scores_P))
    return again_P
