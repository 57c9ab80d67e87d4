"""Selectors without gradients: random, by the last pass rate, or by the Beta posterior of the pass rate."""

import numpy as np

from gradstore.engine.selecting.candidates import Candidates, Selector


def _uniform(candidates: Candidates) -> np.ndarray:
    return candidates.random.random(len(candidates))


def _accgreedy(candidates: Candidates) -> np.ndarray:
    return -np.abs(candidates.pass_rates - 0.5)  # Unknown pass rates are NaN.


def _acc(candidates: Candidates) -> np.ndarray:
    p = candidates.pass_rates
    return np.where((p >= 0.2) & (p <= 0.8), _uniform(candidates), np.nan)


def _thompson(candidates: Candidates) -> np.ndarray:
    history = candidates.history
    return -np.abs(candidates.random.beta(history.a, history.b) - 0.5)


BY_PASS_RATE: list[Selector] = [
    Selector("accgreedy", _accgreedy, "-|p - 1/2|", live_only=False),
    Selector("acc", _acc, "uniform over 0.2 <= p <= 0.8", live_only=False),
    Selector("rand", _uniform, "uniform", live_only=False, whole_pool=True),
    Selector("dynamic", _uniform, "uniform over problems with signal"),
    Selector("thompson", _thompson, "-|q - 1/2|, q ~ Beta(a, b)", live_only=False, whole_pool=True),
]
