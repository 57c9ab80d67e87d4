"""How pass rates move between measurements, those of problems that are not trained on too.

The policy gradient of a problem with rewards of 0 and 1 is the gradient of its pass rate p: p (1 - p) times a contrast,
the mean score of right responses less that of wrong ones. A training step along the unit direction G therefore adds
about eta <contrast, G> to log p / (1 - p). eta, and how much else moves pass rates, are fitted to problems whose rate
was measured twice. Formulas: docs/methods.md, Budgeted refresh.

Dimension letters: P problems, M measurements in the order of their steps, N pairs of successive ones of a problem.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(16)
_DRIFTS = np.geomspace(1e-3, 0.3, 13)
"""Variances a step that are tried, of log odds."""
_PRIOR_DRIFT, _DRIFT_SPREAD = 0.02, 1.5
"""Median, and standard deviation of the logarithm, of the prior of the drift."""
_NEWTON = 8


@dataclass(frozen=True, slots=True, eq=False)
class Rates:
    """Pass rates as they were measured, M rows in the order of their steps, at most one a problem and step."""

    places: np.ndarray
    """Of the problems, int64 [M]."""
    steps: np.ndarray
    """int64 [M]."""
    rates: np.ndarray
    """Shares of right answers, float64 [M]."""
    rollouts: np.ndarray
    """float64 [M]."""

    def log_odds(self) -> tuple[np.ndarray, np.ndarray]:
        """Each row's own estimate and its variance, half an answer added on either side, float64 [M]."""
        right_M, wrong_M = (share * self.rollouts + 0.5 for share in (self.rates, 1 - self.rates))
        return np.log(right_M / wrong_M), 1 / right_M + 1 / wrong_M


@dataclass(frozen=True, slots=True)
class Motion:
    """How log odds are spread over the pool and how they move."""

    mean: float
    variance: float
    drift: float
    """Variance that a step adds."""
    pull: float
    """What a unit of push adds: eta."""

    def describe(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def fit_motion(rates: Rates, pushes_M: np.ndarray) -> Motion:
    """Spread from the problems' first rows, drift and pull from pairs of successive rows.

    pushes_M: the push on each row's problem from step 0 to the row's step. The pull is weighted least squares of the
    change of log odds on the push between, 0 if it is negative, and times 1 - 1 / z^2 for a pull of z standard errors,
    0 for z below 1 (James and Stein 1961, of one dimension with a known sign).
    """
    odds_M, variance_M = rates.log_odds()
    if not len(odds_M):
        return Motion(0.0, 1.0, _PRIOR_DRIFT, 0.0)
    _, first = np.unique(rates.places, return_index=True)
    weights = 1 / (variance_M[first] + 1.0)
    mean = float(weights @ odds_M[first] / weights.sum())
    spread = float(weights @ ((odds_M[first] - mean) ** 2 - variance_M[first]) / weights.sum())
    spread = max(spread, 0.1)
    order = np.lexsort((rates.steps, rates.places))
    later, earlier = order[1:], order[:-1]
    same = rates.places[later] == rates.places[earlier]
    later, earlier = later[same], earlier[same]
    age_N = (rates.steps[later] - rates.steps[earlier]).astype(np.float64)
    change_N, noise_N = odds_M[later] - odds_M[earlier], variance_M[later] + variance_M[earlier]
    push_N = pushes_M[later] - pushes_M[earlier]
    best, found = -np.inf, (_PRIOR_DRIFT, 0.0)
    for drift in _DRIFTS.tolist():
        weight_N = 1 / (noise_N + drift * age_N)
        lever = float(weight_N @ push_N**2)
        pull = float(weight_N @ (push_N * change_N)) / lever if lever > 0 else 0.0
        z2 = pull**2 * lever
        pull = max(pull, 0.0) * max(1 - 1 / z2, 0.0) if z2 > 0 else 0.0
        fits = 0.5 * float(np.log(weight_N).sum() - weight_N @ (change_N - pull * push_N) ** 2)
        fits -= 0.5 * (np.log(drift / _PRIOR_DRIFT) / _DRIFT_SPREAD) ** 2
        if fits > best:
            best, found = fits, (drift, pull)
    return Motion(mean, spread, *found)


def forecast(motion: Motion, rates: Rates, pushes_M: np.ndarray, pushes_P: np.ndarray, now: int) -> "Forecast":
    """Log odds of every problem now: normal with drift between rows, each row taken in at its most probable value.

    pushes_M, pushes_P: the push on each row's problem up to the row's step, and on each problem up to now.
    """
    n = len(pushes_P)
    mean_P, variance_P = np.full(n, motion.mean), np.full(n, motion.variance)
    step_P, push_P, seen_P = np.zeros(n), np.zeros(n), np.zeros(n, bool)
    for step in np.unique(rates.steps).tolist():
        rows = np.flatnonzero(rates.steps == step)
        at = rates.places[rows]
        prior = mean_P[at] + motion.pull * (pushes_M[rows] - push_P[at])
        spread = variance_P[at] + motion.drift * np.where(seen_P[at], step - step_P[at], 0.0)
        mean_P[at], variance_P[at] = _updated(prior, spread, rates.rates[rows], rates.rollouts[rows])
        step_P[at], push_P[at], seen_P[at] = step, pushes_M[rows], True
    mean_P = mean_P + motion.pull * (pushes_P - push_P)
    return Forecast(mean_P, variance_P + motion.drift * np.where(seen_P, now - step_P, 0.0))


def _updated(prior: np.ndarray, spread: np.ndarray, rate: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mode and curvature of a normal prior times n answers of which a share is right (Laplace)."""
    value = prior.copy()
    for _ in range(_NEWTON):
        p = 1 / (1 + np.exp(-value))
        value = value - np.clip(((value - prior) / spread + n * (p - rate)) / (1 / spread + n * p * (1 - p)), -2, 2)
    p = 1 / (1 + np.exp(-value))
    return value, 1 / (1 / spread + n * p * (1 - p))


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """Log odds of P problems now."""

    mean: np.ndarray
    """float64 [P]."""
    variance: np.ndarray
    """float64 [P]."""

    def slack(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of p (1 - p), float64 [P]."""
        odds_PK = self.mean[:, None] + np.sqrt(self.variance)[:, None] * _NODES
        p_PK = 1 / (1 + np.exp(-np.clip(odds_PK, -500, 500)))
        share_K = _WEIGHTS / _WEIGHTS.sum()
        slack_PK = p_PK * (1 - p_PK)
        mean_P = slack_PK @ share_K
        return mean_P, np.sqrt(np.maximum(slack_PK**2 @ share_K - mean_P**2, 0.0))


def slack(rates: np.ndarray) -> np.ndarray:
    """p (1 - p), float64; nan where the rate is unknown or no share."""
    sound = (rates >= 0) & (rates <= 1)
    return np.where(sound, rates * (1 - rates), np.nan)


def effective(rollouts: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Rollouts at a pass rate of 1/2 that tell as much of a contrast: 4 n p (1 - p); n where the rate is unknown."""
    weight = 4 * slack(rates)
    return rollouts * np.where(weight > 0, weight, 1.0)
