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
    """The dot product mean_j A_j d_j, and its standard error over draws of the rollouts.

    rewards_G, derivatives_G: float64. lengths_G: tokens that the policy wrote. The error is the standard deviation
    (G - 1) of the rollouts' influences on the dot, divided by sqrt(G). The influence is A_j (d_j - mean d) - dot for
    the plain advantage; minus dot (A_j^2 - mean A^2) / 2 if the advantage is divided by the rewards' standard
    deviation; minus dot (T_j / mean T - 1) if the lengths of all rollouts normalise the sum.
    nan for fewer than two rollouts.
    """
    A_G = advantages(rewards_G, settings.advantage)
    dot = float(np.mean(A_G * derivatives_G))
    influence_G = A_G * (derivatives_G - derivatives_G.mean()) - dot
    if settings.advantage == "mean_std":
        influence_G = influence_G - dot / 2 * (A_G**2 - np.mean(A_G**2))
    if settings.aggregation == "token-mean" and lengths_G.sum():
        influence_G = influence_G - dot * (lengths_G / lengths_G.mean() - 1)
    if len(rewards_G) < 2:
        return dot, float("nan")
    return dot, float(influence_G.std(ddof=1) / np.sqrt(len(rewards_G)))


def t_test(rewards_G: np.ndarray, derivatives_G: np.ndarray) -> tuple[float, float]:
    """t statistic of the correlation of reward and derivative, and its p-value against "not positive".

    t = r sqrt((G - 2) / (1 - r^2)) with G - 2 degrees of freedom (Student; exact if either variable is normal). The
    p-value is at least one over the number of distinct orders of the derivatives, the smallest value of a permutation
    test: if few responses are distinct, rewards may match them by chance. (0, 1) for fewer than three rollouts, equal
    rewards or equal derivatives.
    """
    n = len(rewards_G)
    r = correlation(rewards_G, derivatives_G)
    if n < 3 or r == 0.0:
        return 0.0, 1.0
    t = r * np.sqrt((n - 2) / max(1 - r * r, 1e-12))
    counts = np.unique(derivatives_G, return_counts=True)[1]
    log_orders = special.gammaln(n + 1) - special.gammaln(counts + 1).sum()  # G! / prod c! for c equal ones
    return float(t), float(max(special.stdtr(n - 2, -t), np.exp(-log_orders)))


def correlation(rewards_G: np.ndarray, derivatives_G: np.ndarray) -> float:
    """Pearson's correlation; 0 if either variable is constant."""
    r_G, d_G = rewards_G - rewards_G.mean(), derivatives_G - derivatives_G.mean()
    scale = np.linalg.norm(r_G) * np.linalg.norm(d_G)
    return float(np.clip(r_G @ d_G / scale, -1, 1)) if scale > 0 else 0.0


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
        quantile_P = stats.t.ppf((1 + confidence) / 2, np.maximum(n_P - 1, 1))
        middle_P = {"snr": signal_to_noise, "lcb": lower_bound}.get(kind, lambda dots, _: dots)(dots_P, errors_P)
        half_P = quantile_P * (errors_P / _floored(errors_P) if kind == "snr" else errors_P)
    return middle_P - half_P, middle_P + half_P
