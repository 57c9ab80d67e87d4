"""Model of how pass rates change between measurements, also for problems that are not trained on.

With rewards 0 and 1, a problem's policy gradient is the gradient of its pass rate p: p (1 - p) times a contrast. The
contrast is the mean score of right responses minus that of wrong ones. A training step along the unit direction G
therefore adds about eta <contrast, G> to log p / (1 - p). eta and the random drift are fitted to problems whose rate
was measured twice. Formulas: docs/methods.md, Budgeted refresh.

Dimension letters: P problems, M measurements in the order of their steps, N pairs of successive ones of a problem.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(16)
_DRIFTS = np.geomspace(1e-3, 0.3, 13)
"""Grid for the drift: variance of log odds per step."""
_PRIOR_DRIFT, _DRIFT_SPREAD = 0.02, 1.5
"""Log-normal prior of the drift: its median, and the standard deviation of its logarithm."""
_NEWTON = 8


@dataclass(frozen=True, slots=True, eq=False)
class Rates:
    """Measured pass rates: M rows in the order of their steps, at most one row per problem and step."""

    places: np.ndarray
    """Index of each row's problem, int64 [M]."""
    steps: np.ndarray
    """int64 [M]."""
    rates: np.ndarray
    """Shares of right answers, float64 [M]."""
    rollouts: np.ndarray
    """float64 [M]."""

    def log_odds(self) -> tuple[np.ndarray, np.ndarray]:
        """Log odds of each row and their variance, float64 [M]; half a right and half a wrong answer are added."""
        right_M, wrong_M = (share * self.rollouts + 0.5 for share in (self.rates, 1 - self.rates))
        return np.log(right_M / wrong_M), 1 / right_M + 1 / wrong_M


@dataclass(frozen=True, slots=True)
class Motion:
    """Parameters of the pass-rate model: the pool's mean and variance of log odds, drift and pull."""

    mean: float
    variance: float
    drift: float
    """Variance of log odds added per step."""
    pull: float
    """Change of log odds per unit of push: eta."""

    def describe(self) -> dict[str, Any]:
        """The parameters as a dict for JSON."""
        return asdict(self)


def fit_motion(rates: Rates, pushes_M: np.ndarray) -> Motion:
    """Fit mean and variance to the problems' first rows, drift and pull to pairs of successive rows.

    pushes_M: the push on each row's problem from step 0 to the row's step. The pull is the weighted least-squares slope
    of the change of log odds on the push between; a negative one becomes 0. A pull of z standard errors is multiplied
    by 1 - 1 / z^2, or by 0 for z below 1 (James and Stein 1961, in one dimension with a known sign).
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
    """Filter the rows step by step; returns each problem's normal distribution of log odds now (Laplace updates).

    pushes_M: the push on each row's problem up to the row's step. pushes_P: the push on each problem up to now.
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
    """Laplace approximation of the posterior: mode and variance, for a normal prior and n answers with a pass rate."""
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
    """p (1 - p), float64; nan where the rate is unknown or outside [0, 1]."""
    sound = (rates >= 0) & (rates <= 1)
    return np.where(sound, rates * (1 - rates), np.nan)


def effective(rollouts: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Effective rollouts 4 n p (1 - p): as many at pass rate 1/2 measure a contrast equally well; n if p is unknown.

    Also n where p is 0 or 1.
    """
    weight = 4 * slack(rates)
    return rollouts * np.where(weight > 0, weight, 1.0)
