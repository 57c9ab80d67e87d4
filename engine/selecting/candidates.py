"""What a selector sees, what it answers, and how it says what it needs.

A selector is a function of `Candidates`: the problems it may choose among, with their stored gradients, the targets,
the probes and the history of their pass rates. It answers with one score a candidate, or with a `Scored` when it knows
more than that. docs/selectors.md shows how to write one.

P candidates, Q queries, D sketch dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from gradstore import View
from gradstore.engine.searching.blocks import lengths_at, lengths_of, scaled
from gradstore.engine.searching.scan import scan_rows
from gradstore.engine.searching.targets import Target
from gradstore.errors import RequestError

if TYPE_CHECKING:
    from gradstore.engine.probing.batch import ProbeBatch
    from gradstore.engine.selecting.history import History


@dataclass(frozen=True, eq=False)
class Candidates:
    """The problems a selector may choose among."""

    view: View
    ids: np.ndarray
    """str [P]."""
    positions: np.ndarray
    """Places of the candidates in the view, int64 [P]; -1 for a problem never measured (whole-pool selectors)."""
    target_D: np.ndarray | None
    """float32 [D]: the target; of several the sum of their unit vectors; None where none was given. In a store with
    several bases it has a block of dimensions for each, as every query may (engine/searching/blocks.py)."""
    random: np.random.Generator
    targets: tuple[Target, ...] = ()
    probes: "ProbeBatch | None" = None
    """Derivatives along the target, for some of the candidates and perhaps others; None unless asked for."""
    confidence: float = 0.95
    """Of the intervals."""
    forgetting: float = 1.0
    """What a rollout counts for less in the history with each step of the policy since."""

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

    @cached_property
    def history(self) -> "History":
        """Posterior of each candidate's pass rate, number and last step of its measurements, as of the view."""
        from gradstore.engine.selecting.history import History

        view = self.view
        table = view.store.history(view.collection, view.at)
        return History.of(table, self.ids, now=view.at, forgetting=self.forgetting)

    def cosines(self, query_D: np.ndarray | None) -> np.ndarray:
        """Cosine of every candidate with a direction, float64 [P]; all zero for a direction of length zero, NaN where
        never measured."""
        if query_D is None:
            raise RequestError("this selector needs a target")
        return self.cosines_with(query_D[None])[0]

    def cosines_with(self, queries_QD: np.ndarray) -> np.ndarray:
        """Cosines with several directions in one pass over the rows, float64 [Q, P]."""
        units_QD = scaled(queries_QD, lengths_of(queries_QD, self.view.dim))
        measured = self.positions[self.positions >= 0]
        scores_QP = scan_rows(self.view, units_QD, measured)
        return np.stack([self._at(scores_P) for scores_P in scores_QP])

    def lengths(self, query_D: np.ndarray) -> np.ndarray:
        """Length of a direction in the basis of each candidate's row, float64 [P]; NaN where never measured."""
        return self._at(lengths_at(self.view, query_D[None])[0])

    def weighted_sum(self, weights_P: np.ndarray) -> np.ndarray:
        """Sum of the candidates' unit gradients times their weights, float64 [D]; those never measured add nothing."""
        measured_P = self.positions >= 0
        weights_P = weights_P[measured_P]
        total_D, done = np.zeros(self.view.dim), 0
        for _, units_PD in self.view.scan(self.positions[measured_P]):
            total_D += weights_P[done : done + len(units_PD)] @ units_PD
            done += len(units_PD)
        return total_D

    def _at(self, column: np.ndarray) -> np.ndarray:
        """The view's column at the candidates, float64 [P]; NaN at position -1."""
        return np.append(column, np.float32(np.nan))[self.positions].astype(np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What a selector answers when it knows more than a score. Arrays of [P], in the candidates' order."""

    scores: np.ndarray
    """float64; higher is better, NaN is not to be picked."""
    low: np.ndarray | None = None
    """Interval of the score at `Candidates.confidence`, float64; NaN or None: unknown."""
    high: np.ndarray | None = None
    weights: np.ndarray | None = None
    """How much each should count in training, float64; None: all 1."""
    rollouts: np.ndarray | None = None
    """Rollouts each should get in training, int64; 0 or None: as many as the trainer is set to."""


@dataclass(frozen=True, slots=True)
class Selector:
    """A named way to score candidates."""

    name: str
    score: Callable[[Candidates], np.ndarray | Scored]
    """Candidates -> float64 [P], or Scored; higher is better, what is not finite is not to be picked."""
    formula: str
    needs_target: bool = False
    live_only: bool = True
    """False: problems without signal may be picked too."""
    whole_pool: bool = False
    """True: every problem of the collection is a candidate, measured or not."""
    needs_probes: bool = False
    """True: `Candidates.probes` is there: those given, or else those stored last along the target's benchmark."""
