"""Interface of a selector: its input (Candidates), its result (Scored) and its declaration (Selector).

A selector is a function of `Candidates`: the problems it may choose among, with their stored gradients, the targets,
the probes and the history of their pass rates. It returns one score per candidate, or a `Scored` with intervals,
weights or rollouts as well. docs/selectors.md shows how to write one.

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
    numbers: np.ndarray
    """Numbers of the problems in the collection (View.problem_numbers), int64 [P]."""
    positions: np.ndarray
    """Positions of the candidates in the view, int64 [P]; -1 for a problem never measured (whole-pool selectors)."""
    target_D: np.ndarray | None
    """float32 [D]: the target, or the sum of the unit vectors of several targets; None without a target. In a store
    with several bases it has one block of dimensions per basis, like every query (engine/searching/blocks.py)."""
    random: np.random.Generator
    targets: tuple[Target, ...] = ()
    probes: "ProbeBatch | None" = None
    """Derivatives along the target, for some candidates and perhaps other problems; None unless requested."""
    confidence: float = 0.95
    """Confidence level of the intervals."""
    forgetting: float = 1.0
    """Factor per policy step on the weight of older rollouts in the history; 1 forgets nothing."""

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def ids(self) -> np.ndarray:
        """Ids, object array of str [P]; `ids_at` gives those of a few."""
        return self.view.ids_of(self.numbers)

    def ids_at(self, places: np.ndarray) -> np.ndarray:
        """Ids of some candidates, by their places among the candidates; object array of str."""
        return self.view.ids_of(self.numbers[places])

    @cached_property
    def norms(self) -> np.ndarray:
        """Norm of each gradient, float64 [P]; NaN where never measured."""
        return self._at(self.view.norms)

    @cached_property
    def pass_rates(self) -> np.ndarray:
        """float64 [P]; NaN where unknown or never measured."""
        return self._at(self.view.pass_rates)

    @cached_property
    def history(self) -> "History":
        """Posterior of each candidate's pass rate, and the number and last step of its measurements, as of the view."""
        from gradstore.engine.selecting.history import History

        view = self.view
        table = view.store.history(view.collection, view.at, numbers=True)
        place_N = np.full(max(view.n_problems, int(table["problem"].to_numpy().max(initial=-1)) + 1), -1)
        place_N[self.numbers] = np.arange(len(self))
        place_M = place_N[table["problem"].to_numpy()]
        return History.at_places(table, place_M, len(self), now=view.at, forgetting=self.forgetting)

    def cosines(self, query_D: np.ndarray | None) -> np.ndarray:
        """Cosine of every candidate with a direction, float64 [P]; NaN where never measured.

        All zero for a direction of length zero. RequestError for None.
        """
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
        """Sum of the candidates' unit gradients times their weights, float64 [D]; candidates never measured add 0."""
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
    """Result of a selector: scores, with optional intervals, weights and rollouts; arrays [P], in candidates' order."""

    scores: np.ndarray
    """float64; higher is better, NaN excludes a candidate."""
    low: np.ndarray | None = None
    """Lower end of the score's interval at `Candidates.confidence`, float64 (`high`: upper); NaN or None: unknown."""
    high: np.ndarray | None = None
    weights: np.ndarray | None = None
    """Training weight of each candidate, float64; None: all 1."""
    rollouts: np.ndarray | None = None
    """Training rollouts for each candidate, int64; 0 or None: the trainer's own setting."""


@dataclass(frozen=True, slots=True)
class Selector:
    """A named way to score candidates."""

    name: str
    score: Callable[[Candidates], np.ndarray | Scored]
    """Candidates -> float64 [P], or Scored; higher is better, a score that is not finite excludes a candidate."""
    formula: str
    needs_target: bool = False
    live_only: bool = True
    """False: problems without signal may be picked too."""
    whole_pool: bool = False
    """True: every problem of the collection is a candidate, measured or not."""
    needs_probes: bool = False
    """True: `Candidates.probes` is set: the caller's probes, or else the newest stored ones along the benchmark."""
