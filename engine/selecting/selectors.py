"""The selectors by name: each scores the candidates, higher is better, NaN is not to be picked.

A selector is a function of `Candidates` registered with what it needs. Users add their own from another package
through the entry-point group `gradstore.selectors`, naming a `Selector`. Formulas with sources: docs/methods.md.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points

import numpy as np

from engine.searching.scan import scan_rows
from gradstore import View
from gradstore.errors import RequestError


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a selector sees: problems, their stored gradients, and the target's direction."""

    view: View
    ids: np.ndarray
    """str [P]."""
    positions: np.ndarray
    """Places of the candidates in the view, int64 [P]; -1 for a problem never measured (whole-pool selectors)."""
    target_D: np.ndarray | None
    """float32 [D]; None for a selector that needs no target."""
    random: np.random.Generator

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def norms(self) -> np.ndarray:
        """Length of each gradient, float64 [P]; NaN where never measured."""
        return self._at(self.view.norms)

    @cached_property
    def pass_rates(self) -> np.ndarray:
        """float64 [P]; NaN where unknown or never measured."""
        return self._at(self.view.pass_rates)

    def cosines(self, query_D: np.ndarray | None) -> np.ndarray:
        """Cosine of every candidate with a direction, float64 [P]; all zero for a direction of length zero, NaN where
        never measured."""
        if query_D is None:
            raise RequestError("this selector needs a target")
        length = np.linalg.norm(query_D.astype(np.float64))
        query_D = (query_D / (length or 1.0)).astype(np.float32)
        measured = self.positions[self.positions >= 0]
        return self._at(scan_rows(self.view, query_D[None], measured)[0])

    def _at(self, column: np.ndarray) -> np.ndarray:
        """The view's column at the candidates, float64 [P]; NaN at position -1."""
        return np.append(column, np.float32(np.nan))[self.positions].astype(np.float64)

    def weighted_sum(self, weights_P: np.ndarray) -> np.ndarray:
        """Sum of the candidates' unit gradients times their weights, float64 [D]; those never measured add nothing."""
        measured_P = self.positions >= 0
        weights_P = weights_P[measured_P]
        total_D, done = np.zeros(self.view.dim), 0
        for _, units_PD in self.view.scan(self.positions[measured_P]):
            total_D += weights_P[done : done + len(units_PD)] @ units_PD
            done += len(units_PD)
        return total_D


@dataclass(frozen=True, slots=True)
class Selector:
    """A named way to score candidates."""

    name: str
    score: Callable[[Candidates], np.ndarray]
    """Candidates -> float64 [P]; higher is better, NaN is not to be picked."""
    formula: str
    needs_target: bool = False
    live_only: bool = True
    """False: problems without signal may be picked too."""
    whole_pool: bool = False
    """True: every problem of the collection is a candidate, measured or not."""


def _known_pass_rate(candidates: Candidates, scores_P: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(candidates.pass_rates), np.nan, scores_P)


def _cosine(candidates: Candidates) -> np.ndarray:
    return candidates.cosines(candidates.target_D)


def _dot(candidates: Candidates) -> np.ndarray:
    assert candidates.target_D is not None
    length = float(np.linalg.norm(candidates.target_D.astype(np.float64)))
    return candidates.norms * candidates.cosines(candidates.target_D) * length


def _fisher(candidates: Candidates) -> np.ndarray:
    from engine.searching.fisher import preconditioned

    assert candidates.target_D is not None
    query_D = preconditioned(candidates.view, candidates.target_D)
    length = float(np.linalg.norm(query_D.astype(np.float64)))
    return candidates.norms * candidates.cosines(query_D) * length


def _simacc(candidates: Candidates) -> np.ndarray:
    p = candidates.pass_rates
    return _cosine(candidates) * 4 * p * (1 - p)


def _acc(candidates: Candidates) -> np.ndarray:
    p = candidates.pass_rates
    return np.where((p >= 0.2) & (p <= 0.8), candidates.random.random(len(p)), np.nan)


def _chunk_mean(candidates: Candidates) -> np.ndarray:
    return candidates.cosines(candidates.weighted_sum(candidates.norms))


def _learnalign(candidates: Candidates) -> np.ndarray:
    value_P = candidates.pass_rates * (1 - candidates.pass_rates)
    mean_D = candidates.weighted_sum(value_P) / len(candidates)
    return value_P * candidates.cosines(mean_D) * np.linalg.norm(mean_D)


_BUILT_IN = [
    Selector("cosine", _cosine, "cos(g, t)", needs_target=True),
    Selector("dot", _dot, "<g, t>", needs_target=True),
    Selector("fisher", _fisher, "<g, (M/n + lambda I)^-1 t>", needs_target=True),
    Selector("norm", lambda c: c.norms, "|g|"),
    Selector("negsim", lambda c: -_cosine(c), "-cos(g, t)", needs_target=True),
    Selector("simacc", _simacc, "cos(g, t) 4 p (1 - p)", needs_target=True),
    Selector("accgreedy", lambda c: _known_pass_rate(c, -np.abs(c.pass_rates - 0.5)), "-|p - 1/2|", live_only=False),
    Selector("acc", _acc, "uniform over 0.2 <= p <= 0.8", live_only=False),
    Selector("rand", lambda c: c.random.random(len(c)), "uniform", live_only=False, whole_pool=True),
    Selector("chunk_mean", _chunk_mean, "cos(g, sum of the candidates' g)"),
    Selector("learnalign", _learnalign, "V <u, mean of V u over the candidates>, V = p (1 - p)"),
]

ALIASES = {"sim": "cosine", "align": "chunk_mean", "random": "rand"}
"""GradAlign's mode names; those not listed are the same here."""


class Registry(Mapping[str, Selector]):
    """The built-in selectors, then those other packages register; found by name or alias."""

    def __init__(self) -> None:
        self._selectors = {selector.name: selector for selector in _BUILT_IN}

    @cached_property
    def _all(self) -> dict[str, Selector]:
        found = dict(self._selectors)
        for entry in entry_points(group="gradstore.selectors"):
            if entry.name in found:
                raise RequestError(f"selector {entry.name!r} of {entry.value} is already registered")
            found[entry.name] = entry.load()
        return found

    def __getitem__(self, name: str) -> Selector:
        selector = self._all.get(ALIASES.get(name, name))
        if selector is None:
            raise RequestError(f"selector {name!r} is not one of {', '.join(self._all)}")
        return selector

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


SELECTORS = Registry()
