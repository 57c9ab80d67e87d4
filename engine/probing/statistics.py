"""Statistical errors and scores of a probe's dot products: pure functions of rewards and derivatives.

A problem's alignment is a covariance, dot = mean_j A_j d_j over its G rollouts, so it has a standard error. If the
reward is independent of the direction, the correlation of rewards and derivatives gives a t distribution.
Formulas: docs/methods.md.

Dimension letters: P problems, G rollouts of one problem.
"""

from collections.abc import Callable

import numpy as np
from scipy import special, stats  # type: ignore[import-untyped]

from gradstore.engine.gradients.objectives import Objective, advantages

PROBE_SCORES = ("dot", "corr", "snr", "lcb", "shrunk", "fdr")
"""Scores by which probed problems can be ranked."""


def dot_and_error(
    rewards_G: np.ndarray, derivatives_G: np.ndarray, lengths_G: np.ndarray, settings: Objective
) -> tuple[float, float]:
    """The dot product mean_j A_j d_j, and its standard error over draws of the rollouts; nan for fewer than two.

    rewards_G, derivatives_G: float64. lengths_G: tokens that the policy wrote. The error is the standard deviation
    (G - 1) of the rollouts' influences on the dot, divided by sqrt(G). The influence is A_j (d_j - mean d) - dot for
    the plain advantage; minus dot (A_j^2 - mean A^2) / 2 if the advantage is divided by the rewards' standard
    deviation; minus dot (T_j / mean T - 1) if the lengths of all rollouts normalise the sum.
    """
    dot_P, error_P = dots_and_errors(rewards_G[None], derivatives_G[None], lengths_G[None], settings)
    return float(dot_P[0]), float(error_P[0])


def dots_and_errors(
    rewards_PG: np.ndarray, derivatives_PG: np.ndarray, lengths_PG: np.ndarray, settings: Objective
) -> tuple[np.ndarray, np.ndarray]:
    """`dot_and_error` of several problems with equally many rollouts, float64 [P] each."""
    A_PG = advantages(rewards_PG, settings.advantage)
    dot_P1 = np.mean(A_PG * derivatives_PG, axis=1, keepdims=True)
    if rewards_PG.shape[1] < 2:
        return dot_P1[:, 0], np.full(len(dot_P1), np.nan)
    influence_PG = A_PG * (derivatives_PG - derivatives_PG.mean(axis=1, keepdims=True)) - dot_P1
    if settings.advantage == "mean_std":
        influence_PG = influence_PG - dot_P1 / 2 * (A_PG**2 - np.mean(A_PG**2, axis=1, keepdims=True))
    if settings.aggregation == "token-mean":
        mean_P1 = lengths_PG.mean(axis=1, keepdims=True)
        longer_PG = np.where(mean_P1 > 0, lengths_PG / np.where(mean_P1 > 0, mean_P1, 1.0) - 1, 0.0)
        influence_PG = influence_PG - dot_P1 * longer_PG
    return dot_P1[:, 0], influence_PG.std(axis=1, ddof=1) / np.sqrt(rewards_PG.shape[1])


def t_test(rewards_G: np.ndarray, derivatives_G: np.ndarray) -> tuple[float, float]:
    """t statistic of the correlation of reward and derivative, and its p-value against "not positive".

    t = r sqrt((G - 2) / (1 - r^2)) with G - 2 degrees of freedom (Student; exact if either variable is normal). The
    p-value is at least one over the number of distinct orders of the derivatives, the smallest value of a permutation
    test: if few responses are distinct, rewards may match them by chance. (0, 1) for fewer than three rollouts, equal
    rewards or equal derivatives.
    """
    t_P, p_P = t_tests(rewards_G[None], derivatives_G[None])
    return float(t_P[0]), float(p_P[0])


def t_tests(rewards_PG: np.ndarray, derivatives_PG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`t_test` of several problems with equally many rollouts, float64 [P] each."""
    n = rewards_PG.shape[1]
    r_P = correlations(rewards_PG, derivatives_PG)
    if n < 3:
        return np.zeros(len(r_P)), np.ones(len(r_P))
    t_P = r_P * np.sqrt((n - 2) / np.maximum(1 - r_P * r_P, 1e-12))
    ordered_PG = np.sort(derivatives_PG, axis=1)
    ends_PG = np.append(ordered_PG[:, 1:] != ordered_PG[:, :-1], np.ones((len(r_P), 1), bool), axis=1)
    # Counts of equal derivatives, at the last of each; G! / prod c! orders for c equal ones.
    places_PG = np.where(ends_PG, np.arange(n), -1)
    before_PG = np.maximum.accumulate(np.append(np.full((len(r_P), 1), -1), places_PG[:, :-1], axis=1), axis=1)
    counts_PG = np.where(ends_PG, np.arange(n) - before_PG, 0)
    log_orders_P = special.gammaln(n + 1) - special.gammaln(counts_PG + 1.0).sum(axis=1)
    p_P = np.maximum(special.stdtr(n - 2, -t_P), np.exp(-log_orders_P))
    return np.where(r_P == 0, 0.0, t_P), np.where(r_P == 0, 1.0, p_P)


def correlation(rewards_G: np.ndarray, derivatives_G: np.ndarray) -> float:
    """Pearson's correlation; 0 if either variable is constant."""
    return float(correlations(rewards_G[None], derivatives_G[None])[0])


def correlations(rewards_PG: np.ndarray, derivatives_PG: np.ndarray) -> np.ndarray:
    """`correlation` of several problems with equally many rollouts, float64 [P]."""
    r_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    d_PG = derivatives_PG - derivatives_PG.mean(axis=1, keepdims=True)
    scale_P = np.sqrt((r_PG**2).sum(axis=1)) * np.sqrt((d_PG**2).sum(axis=1))
    r_P = (r_PG * d_PG).sum(axis=1) / np.where(scale_P > 0, scale_P, 1.0)
    return np.where(scale_P > 0, np.clip(r_P, -1, 1), 0.0)


def correlation_of_t(t_P: np.ndarray, n_P: np.ndarray) -> np.ndarray:
    """The correlation that gives a t statistic, float64 [P]."""
    return t_P / np.sqrt(t_P**2 + np.maximum(n_P - 2, 1))


def signal_to_noise(dots_P: np.ndarray, errors_P: np.ndarray) -> np.ndarray:
    """dot / SE, float64 [P]; the SE is at least a hundredth of the pool's median."""
    return dots_P / _floored(errors_P)


def lower_bound(dots_P: np.ndarray, errors_P: np.ndarray, n_errors: float = 1.0) -> np.ndarray:
    """dot - n_errors SE, float64 [P]."""
    return dots_P - n_errors * errors_P


def shrunk(dots_P: np.ndarray, errors_P: np.ndarray) -> np.ndarray:
    """Empirical Bayes: each dot's posterior mean under a normal prior fitted to the pool, float64 [P]."""
    mean, variance = normal_prior(dots_P, errors_P)
    return mean + variance / (variance + _floored(errors_P) ** 2) * (dots_P - mean)


def shrunk_error(dots_P: np.ndarray, errors_P: np.ndarray) -> np.ndarray:
    """Standard deviation of the posterior in `shrunk`, s SE / sqrt(s^2 + SE^2), float64 [P]."""
    _, variance = normal_prior(dots_P, errors_P)
    variances_P = _floored(errors_P) ** 2
    return np.sqrt(variance * variances_P / (variance + variances_P))


def normal_prior(dots_P: np.ndarray, errors_P: np.ndarray) -> tuple[float, float]:
    """Mean m and variance s^2 of the pool's true dots.

    dot_i ~ N(true_i, SE_i^2) and true_i ~ N(m, s^2), with m and s^2 by iterated moments (DerSimonian and Laird 1986;
    Paule and Mandel 1982): m is the mean weighted by 1 / (s^2 + SE_i^2), s^2 makes the weighted squares sum to P - 1.
    """
    variances_P = _floored(errors_P) ** 2
    low, high = 0.0, float(np.var(dots_P)) * 4 + 1e-300
    for _ in range(100):
        s2 = (low + high) / 2
        weights_P = 1 / (s2 + variances_P)
        m = float(weights_P @ dots_P / weights_P.sum())
        if weights_P @ (dots_P - m) ** 2 > len(dots_P) - 1:
            low = s2
        else:
            high = s2
    return m, s2


def false_discovery_cut(p_values_P: np.ndarray, level: float = 0.1) -> np.ndarray:
    """Mask of problems that pass the Benjamini-Hochberg cut (1995) at this false-discovery rate, bool [P]."""
    return stats.false_discovery_control(p_values_P, method="bh") <= level if len(p_values_P) else np.zeros(0, bool)


def _floored(errors_P: np.ndarray) -> np.ndarray:
    """Standard errors with a floor, safe to divide by: equal responses can make one zero by chance."""
    positive_P = errors_P[errors_P > 0]
    return np.maximum(errors_P, 0.01 * np.median(positive_P) if len(positive_P) else 1.0)


def scores(
    kind: str, dots_P: np.ndarray, errors_P: np.ndarray, t_P: np.ndarray, p_values_P: np.ndarray, n_P: np.ndarray
) -> np.ndarray:
    """Scores of live problems by one of PROBE_SCORES, float64 [P]; `fdr` gives -inf to problems below the cut."""
    table: dict[str, Callable[[], np.ndarray]] = {
        "dot": lambda: dots_P,
        "corr": lambda: correlation_of_t(t_P, n_P),
        "snr": lambda: signal_to_noise(dots_P, errors_P),
        "lcb": lambda: lower_bound(dots_P, errors_P),
        "shrunk": lambda: shrunk(dots_P, errors_P),
        "fdr": lambda: np.where(false_discovery_cut(p_values_P), dots_P, -np.inf),
    }
    return np.asarray(table[kind](), dtype=np.float64)


def intervals(
    kind: str, dots_P: np.ndarray, errors_P: np.ndarray, t_P: np.ndarray, n_P: np.ndarray, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of each score's interval over draws of the rollouts, float64 [P]; nan for too few rollouts.

    dot, fdr: dot -+ q SE, with q Student's quantile at n - 1 degrees of freedom; lcb: the same around dot - SE; snr:
    dot / SE -+ q. shrunk: interval of the normal posterior. corr: Fisher's, tanh(atanh r -+ z / sqrt(n - 3)).
    """
    if kind == "shrunk":
        middle_P = shrunk(dots_P, errors_P)
        half_P = stats.norm.ppf((1 + confidence) / 2) * shrunk_error(dots_P, errors_P)
    elif kind == "corr":
        bounded_P = np.clip(correlation_of_t(t_P, n_P), -1 + 1e-12, 1 - 1e-12)
        spread_P = stats.norm.ppf((1 + confidence) / 2) / np.sqrt(np.where(n_P > 3, n_P - 3, np.nan))
        return np.tanh(np.arctanh(bounded_P) - spread_P), np.tanh(np.arctanh(bounded_P) + spread_P)
    else:
        n_U, which_P = np.unique(n_P, return_inverse=True)
        quantile_P = stats.t.ppf((1 + confidence) / 2, np.maximum(n_U - 1, 1))[which_P]
        middle_P = {"snr": signal_to_noise, "lcb": lower_bound}.get(kind, lambda dots, _: dots)(dots_P, errors_P)
        half_P = quantile_P * (errors_P / _floored(errors_P) if kind == "snr" else errors_P)
    return middle_P - half_P, middle_P + half_P
