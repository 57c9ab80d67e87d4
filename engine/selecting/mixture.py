"""Mixtures of selectors: in `cosine:0.7+rand:0.3`, cosine makes 70% of the picks and rand 30%.

The parts pick in the order of their names in the text. Each part takes its best problems among those not yet picked, so
no problem is picked twice and each part gets its number of picks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradstore.engine.selecting.candidates import Selector
from gradstore.engine.selecting.selectors import SELECTORS
from gradstore.errors import RequestError


@dataclass(frozen=True, slots=True)
class Part:
    """A selector and its share of the picks."""

    selector: Selector
    share: float


def parts_of(selector: str | Selector | Sequence[Part]) -> list[Part]:
    """Parse a mixture into parts with shares that sum to 1; a sequence of parts is returned unchanged.

    A plain name or a Selector gives one part. A text is `NAME` or `NAME:WEIGHT+NAME:WEIGHT+...`; the default weight is
    1. RequestError for an unknown or repeated name, or a weight that is not a number above 0.
    """
    if isinstance(selector, Selector):
        return [Part(selector, 1.0)]
    if not isinstance(selector, str):
        return list(selector)
    terms = [term.partition(":") for term in selector.split("+")]
    weights = [_weight(selector, weight) if colon else 1.0 for _, colon, weight in terms]
    selectors = [SELECTORS[name.strip()] for name, _, _ in terms]
    names = [found.name for found in selectors]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"mixture {selector!r} names {twice!r} twice: give it once, with the sum of the weights")
    return [Part(found, weight / float(np.sum(weights))) for found, weight in zip(selectors, weights, strict=True)]


def sums_to_one(selector: str) -> bool:
    """Whether the weights that a mixture's text states sum to 1; True where it states none."""
    weights = [
        _weight(selector, weight) for _, colon, weight in (term.partition(":") for term in selector.split("+")) if colon
    ]
    return not weights or abs(sum(weights) - 1) < 1e-6


def mixture_name(parts: list[Part]) -> str:
    """The mixture as text, with names instead of aliases and shares that sum to 1."""
    if len(parts) == 1:
        return parts[0].selector.name
    return "+".join(f"{part.selector.name}:{part.share:g}" for part in parts)


def _weight(mixture: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = float("nan")
    if not 0 < weight < np.inf:
        raise RequestError(f"mixture {mixture!r}: weight {text!r}, expected NAME:WEIGHT+... with numbers above 0")
    return weight
