"""Which candidates to roll out anew within a budget: pure functions of what is believed of each.

A measurement is worth what it is expected to add to the choice of the top n: much where a score may lie on either side
of the cut, because it is near, old, or was never measured; next to nothing where the problem is in or out anyway. Most
of the budget goes by that; a share goes to problems never measured, whatever is expected of them, and a share is kept
until the scores are in, for those that still straddle the cut. Problems that are expected to have no signal are left
out. Formulas and sources: docs/methods.md, Budgeted refresh.

Dimension letters: P candidates.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy.special import betaln  # type: ignore[import-untyped]
from scipy.stats import norm  # type: ignore[import-untyped]


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """What is believed of the candidates before anything is rolled out."""

    mean: np.ndarray
    """Expected score of each, float64 [P]; the prior's where never measured."""
    sd: np.ndarray
    """Its standard deviation, float64 [P]."""
    noise: np.ndarray
    """Standard deviation of one more measurement, float64 [P]."""
    signal: np.ndarray
    """Probability that a group of new rollouts has a signal, float64 [P]."""
    measured: np.ndarray
    """Which have a row, bool [P]."""
    pickable: np.ndarray
    """Which could be picked as they are: those whose newest row is live, bool [P]."""


def quantile(confidence: float) -> float:
    """Standard deviations on either side of a normal mean that hold this share."""
    return float(norm.ppf((1 + confidence) / 2))


def pass_rate_prior(history: pa.Table) -> float:
    """The symmetric Beta prior of a problem's pass rate, fitted to a collection's history; 1 (uniform) without any.

    The a = b that makes the right answers of all problems most probable, those of one problem together a beta-binomial
    draw, on a grid from 0.05 to 2. Where most problems are always solved or never it is small, and a few equal groups
    then say much.
    """
    rates, counts = history["pass_rate"].to_numpy().astype(float), history["n_rollouts"].to_numpy().astype(float)
    known = np.isfinite(rates) & (counts > 0)
    if not known.any():
        return 1.0
    problem = history["id"].combine_chunks().dictionary_encode().indices.to_numpy()[known]
    right, wrong = (np.bincount(problem, (share * counts)[known]) for share in (rates, 1 - rates))
    grid = np.geomspace(0.05, 2.0, 24)
    fits = [float(betaln(right + a, wrong + a).sum() - len(right) * betaln(a, a)) for a in grid]
    return float(grid[int(np.argmax(fits))])


def cut(scores_P: np.ndarray, n: int) -> float:
    """Halfway between the n-th and the next score; -inf where there are no more than n finite ones."""
    ranked = np.sort(scores_P[np.isfinite(scores_P)])[::-1]
    return float(ranked[n - 1 : n + 1].mean()) if len(ranked) > n else -np.inf


def worth(mean_P: np.ndarray, sd_P: np.ndarray, noise_P: np.ndarray, line: float) -> np.ndarray:
    """What one more measurement of each candidate is expected to add to the sum of the picks' scores, float64 [P].

    The knowledge gradient for a choice against a fixed alternative `line` (Frazier, Powell, Dayanik 2008):
    s (phi(u) - u Phi(-u)) with u = |mean - line| / s and s = sd^2 / sqrt(sd^2 + noise^2), the standard deviation of
    what the mean will be after it.
    """
    move_P = sd_P**2 / np.sqrt(sd_P**2 + noise_P**2 + 1e-300)
    u_P = np.abs(mean_P - line) / np.where(move_P > 0, move_P, 1.0)
    return move_P * (norm.pdf(u_P) - u_P * norm.sf(u_P))


def choose(
    outlook: Outlook, n: int, budget: int, explore: float, max_no_signal: float, random: np.random.Generator
) -> np.ndarray:
    """Places of the candidates to roll out for a choice of n, at most `budget`, int64, the most worth first.

    A share `explore` of the budget goes to candidates never measured, drawn at random; the rest by `worth` times the
    probability of a signal, ties at random. The cut is that of what could be picked now, or of all where that is too
    little. None whose probability of no signal exceeds max_no_signal; fewer than the budget when no more are left.
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
    """Places of the candidates whose interval holds the cut of the top n, the most worth measuring first, int64.

    NaN means are no candidates. Empty: the top n is settled at this confidence.
    """
    line = cut(mean_P, n)
    if not np.isfinite(line):
        return np.zeros(0, np.int64)
    open_P = np.abs(mean_P - line) < quantile(confidence) * sd_P
    worth_P = np.where(open_P, worth(np.nan_to_num(mean_P), sd_P, noise_P, line), -1.0)
    ranked = np.argsort(-worth_P, kind="stable")
    return ranked[: int(open_P.sum())]
