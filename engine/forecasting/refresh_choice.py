"""Choice of the candidates to measure again (new rollouts) within a budget: pure functions of the forecast.

A measurement's value is its expected gain for the choice of the top n. It is large where the score may lie on either
side of the cut: near the cut, old, or never measured. It is almost zero where the problem is clearly in or out. Most of
the budget follows this value. One share goes to random problems never measured. Another share waits until the scores
are in, for problems that still straddle the cut. Problems that probably have no signal are left out. Formulas and
sources: docs/methods.md, Budgeted refresh.

Dimension letters: P candidates.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy.special import betaln  # type: ignore[import-untyped]
from scipy.stats import norm  # type: ignore[import-untyped]


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """Forecast of the candidates before any new rollouts."""

    mean: np.ndarray
    """Expected score, float64 [P]; the prior mean where never measured."""
    sd: np.ndarray
    """Standard deviation of `mean`, float64 [P]."""
    noise: np.ndarray
    """Standard deviation of one more measurement, float64 [P]."""
    signal: np.ndarray
    """Probability that a group of new rollouts has a signal, float64 [P]."""
    measured: np.ndarray
    """True where the candidate has a row, bool [P]."""
    pickable: np.ndarray
    """True where the candidate can be picked without new rollouts: its newest row is live, bool [P]."""


def quantile(confidence: float) -> float:
    """Half-width, in standard deviations, of the central interval of a normal that holds this share."""
    return float(norm.ppf((1 + confidence) / 2))


def pass_rate_prior(history: pa.Table) -> float:
    """Parameter a = b of a Beta prior for pass rates, fitted to a collection's history; 1 (uniform) without any.

    Maximum likelihood on a grid from 0.05 to 2; the right answers of one problem together are a beta-binomial draw.
    The result is small if most problems are always or never solved. Then a few all-right or all-wrong groups are strong
    evidence.
    """
    rates, counts = history["pass_rate"].to_numpy().astype(float), history["n_rollouts"].to_numpy().astype(float)
    known = np.isfinite(rates) & (counts > 0)
    if not known.any():
        return 1.0
    if "problem" in history.column_names:
        problem = history["problem"].to_numpy()[known]
    else:
        problem = history["id"].combine_chunks().dictionary_encode().indices.to_numpy()[known]
    right, wrong = (np.bincount(problem, (share * counts)[known]) for share in (rates, 1 - rates))
    pairs, times = np.unique(right + 1j * wrong, return_counts=True)  # few are different
    grid = np.geomspace(0.05, 2.0, 24)
    fits = [float(times @ (betaln(pairs.real + a, pairs.imag + a) - betaln(a, a))) for a in grid]
    return float(grid[int(np.argmax(fits))])


def cut(scores_P: np.ndarray, n: int) -> float:
    """Midpoint between the n-th and the next best score; -inf with at most n finite scores."""
    ranked = np.sort(scores_P[np.isfinite(scores_P)])[::-1]
    return float(ranked[n - 1 : n + 1].mean()) if len(ranked) > n else -np.inf


def worth(mean_P: np.ndarray, sd_P: np.ndarray, noise_P: np.ndarray, line: float) -> np.ndarray:
    """Knowledge gradient: expected gain in the sum of the picks' scores from one more measurement, float64 [P].

    For a choice against a fixed alternative `line` (Frazier, Powell, Dayanik 2008): s (phi(u) - u Phi(-u)) with
    u = |mean - line| / s. s = sd^2 / sqrt(sd^2 + noise^2) is the standard deviation of the mean after the measurement.
    """
    move_P = sd_P**2 / np.sqrt(sd_P**2 + noise_P**2 + 1e-300)
    u_P = np.abs(mean_P - line) / np.where(move_P > 0, move_P, 1.0)
    return move_P * (norm.pdf(u_P) - u_P * norm.sf(u_P))


def choose(
    outlook: Outlook, n: int, budget: int, explore: float, max_no_signal: float, random: np.random.Generator
) -> np.ndarray:
    """Choose at most `budget` candidates to roll out, for a later choice of n; returns their places, int64.

    Most valuable first; a random share `explore` of the budget, of candidates never measured, comes last. The others
    are ranked by `worth` times the probability of a signal, ties at random. The cut is that of the pickable candidates,
    or of all candidates if at most n are pickable. Candidates whose probability of no signal exceeds max_no_signal are
    left out, so there may be fewer than the budget.
    """
    shuffled_P = random.permutation(len(outlook.mean))
    open_P = 1 - outlook.signal <= max_no_signal
    unknown = [place for place in shuffled_P.tolist() if open_P[place] and not outlook.measured[place]]
    explored = unknown[: round(explore * budget)]
    line = cut(np.where(outlook.pickable, outlook.mean, np.nan), n)
    line = line if np.isfinite(line) else cut(outlook.mean, n)
    line = line if np.isfinite(line) else float(np.median(outlook.mean))
    worth_P = outlook.signal * worth(outlook.mean, outlook.sd, outlook.noise, line)
    ranked = shuffled_P[np.argsort(-worth_P[shuffled_P], kind="stable")]
    taken = set(explored)
    best = [place for place in ranked.tolist() if open_P[place] and place not in taken][: budget - len(explored)]
    return np.array(best + explored, dtype=np.int64)


def straddling(mean_P: np.ndarray, sd_P: np.ndarray, noise_P: np.ndarray, n: int, confidence: float) -> np.ndarray:
    """Places of the candidates whose interval contains the cut of the top n, int64, most valuable to measure first.

    A NaN mean excludes a candidate. Empty: the top n is settled at this confidence.
    """
    line = cut(mean_P, n)
    if not np.isfinite(line):
        return np.zeros(0, np.int64)
    open_P = np.abs(mean_P - line) < quantile(confidence) * sd_P
    worth_P = np.where(open_P, worth(np.nan_to_num(mean_P), sd_P, noise_P, line), -1.0)
    ranked = np.argsort(-worth_P, kind="stable")
    return ranked[: int(open_P.sum())]
