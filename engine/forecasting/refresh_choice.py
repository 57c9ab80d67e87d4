"""Choice of the candidates to measure again (new rollouts) within a budget: pure functions of the forecast.

A measurement's value is its expected gain for the choice of the top n. It is large where the score may lie on either
side of the cut: near the cut, old, or never measured. It is almost zero where the problem is clearly in or out. Most of
the budget follows this value. One share goes to random problems never measured. Another share waits until the scores
are in, for problems that still straddle the cut. Problems that probably have no signal are left out. Formulas and
sources: docs/methods.md, Budgeted refresh.

Dimension letters: P candidates.
"""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy.special import betaln, ndtr, ndtri  # type: ignore[import-untyped]


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
    return float(ndtri((1 + confidence) / 2))


def pass_rate_prior(right: np.ndarray, wrong: np.ndarray) -> float:
    """Parameter a = b of a Beta prior for pass rates, fitted to a collection's problems; 1 (uniform) without any.

    right, wrong: numbers of answers of each problem, float64.

    Maximum likelihood on a grid from 0.05 to 2; the right answers of one problem together are a beta-binomial draw.
    The result is small if most problems are always or never solved. Then a few all-right or all-wrong groups are strong
    evidence.
    """
    if not (right + wrong).any():
        return 1.0
    table = pa.table({"right": right, "wrong": wrong})
    pairs = table.group_by(["right", "wrong"], use_threads=False).aggregate([([], "count_all")])  # few are different
    right, wrong, times = (pairs[name].to_numpy().astype(float) for name in ("right", "wrong", "count_all"))
    grid = np.geomspace(0.05, 2.0, 24)
    fits = [float(times @ (betaln(right + a, wrong + a) - betaln(a, a))) for a in grid]
    return float(grid[int(np.argmax(fits))])


def cut(scores_P: np.ndarray, n: int) -> float:
    """Midpoint between the n-th and the next best score; -inf with at most n finite scores."""
    known = scores_P[np.isfinite(scores_P)]
    if len(known) <= n:
        return -np.inf
    place = len(known) - n  # of the n-th best, ascending
    return float(np.partition(known, (place - 1, place))[place - 1 : place + 1].mean())


def worth(mean_P: np.ndarray, sd_P: np.ndarray, noise_P: np.ndarray, line: float) -> np.ndarray:
    """Knowledge gradient: expected gain in the sum of the picks' scores from one more measurement, float64 [P].

    For a choice against a fixed alternative `line` (Frazier, Powell, Dayanik 2008): s (phi(u) - u Phi(-u)) with
    u = |mean - line| / s. s = sd^2 / sqrt(sd^2 + noise^2) is the standard deviation of the mean after the measurement.
    """
    move_P = sd_P**2 / np.sqrt(sd_P**2 + noise_P**2 + 1e-300)
    u_P = np.abs(mean_P - line) / np.where(move_P > 0, move_P, 1.0)
    return move_P * (np.exp(-(u_P**2) / 2) / math.sqrt(2 * math.pi) - u_P * ndtr(-u_P))


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
    explored = shuffled_P[(open_P & ~outlook.measured)[shuffled_P]][: round(explore * budget)]
    line = cut(np.where(outlook.pickable, outlook.mean, np.nan), n)
    line = line if np.isfinite(line) else cut(outlook.mean, n)
    line = line if np.isfinite(line) else float(np.median(outlook.mean))
    worth_P = outlook.signal * worth(outlook.mean, outlook.sd, outlook.noise, line)
    open_P[explored] = False
    rest = shuffled_P[open_P[shuffled_P]]
    return np.concatenate([rest[_best(worth_P[rest], budget - len(explored))], explored])


def _best(values: np.ndarray, n: int) -> np.ndarray:
    """Places of the n largest values, largest first, equal ones in their order: those of a stable sort, int64."""
    values = np.where(np.isnan(values), -np.inf, values)
    if n < len(values):
        least = np.partition(values, len(values) - n)[len(values) - n] if n else np.inf
        above, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
        among = np.sort(np.append(above, equal[: n - len(above)]))
        return among[np.argsort(-values[among], kind="stable")]
    return np.argsort(-values, kind="stable")


def straddling(mean_P: np.ndarray, sd_P: np.ndarray, noise_P: np.ndarray, n: int, confidence: float) -> np.ndarray:
    """Places of the candidates whose interval contains the cut of the top n, int64, most valuable to measure first.

    A NaN mean excludes a candidate. Empty: the top n is settled at this confidence.
    """
    line = cut(mean_P, n)
    if not np.isfinite(line):
        return np.zeros(0, np.int64)
    unsure = np.flatnonzero(np.abs(mean_P - line) < quantile(confidence) * sd_P)
    return unsure[np.argsort(-worth(mean_P[unsure], sd_P[unsure], noise_P[unsure], line), kind="stable")]
