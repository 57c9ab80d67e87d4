"""What a pass rate says of a row: p (1 - p), and how many rollouts it counts as."""

import numpy as np


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
