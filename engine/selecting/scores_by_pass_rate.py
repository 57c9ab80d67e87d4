"""Selectors without gradients: random, by the last pass rate, or by the Beta posterior of the pass rate."""

import re

import numpy as np

from gradstore.engine.selecting.candidates import Candidates, Selector
from gradstore.errors import RequestError


def _uniform(candidates: Candidates) -> np.ndarray:
    return candidates.random.random(len(candidates))


def _accgreedy(candidates: Candidates) -> np.ndarray:
    return -np.abs(candidates.pass_rates - 0.5)  # Unknown pass rates are NaN.


def acc(low: float = 0.2, high: float = 0.8, name: str | None = None) -> Selector:
    """The selector `acc(LOW..HIGH)`: uniform among pass rates in a window (GradAlign's acc_low, acc_high)."""
    if not 0 <= low <= high <= 1:
        raise RequestError(f"selector acc({low:g}..{high:g}): expected pass rates, 0 <= LOW <= HIGH <= 1")

    def score(candidates: Candidates) -> np.ndarray:
        p = candidates.pass_rates
        return np.where((p >= low) & (p <= high), _uniform(candidates), np.nan)

    formula = f"uniform over {low:g} <= p <= {high:g}"
    return Selector(name or f"acc({low!r}..{high!r})", score, formula, live_only=False)


def acc_of(text: str) -> Selector | None:
    """The selector that a text such as `acc(0.3..0.7)` names; None for a text of another form."""
    match = re.fullmatch(r"acc\(\s*([0-9.]*[0-9])\s*\.\.\s*([0-9.]+)\s*\)", text)
    try:
        return None if match is None else acc(float(match[1]), float(match[2]))
    except ValueError as error:
        if isinstance(error, RequestError):
            raise
        return None


def _thompson(candidates: Candidates) -> np.ndarray:
    history = candidates.history
    return -np.abs(candidates.random.beta(history.a, history.b) - 0.5)


BY_PASS_RATE: list[Selector] = [
    Selector("accgreedy", _accgreedy, "-|p - 1/2|", live_only=False),
    acc(name="acc"),
    Selector("rand", _uniform, "uniform", live_only=False, whole_pool=True),
    Selector("dynamic", _uniform, "uniform over problems with signal"),
    Selector("thompson", _thompson, "-|q - 1/2|, q ~ Beta(a, b)", live_only=False, whole_pool=True),
]
