"""Fidelity of a projection: rank correlation of sketched with exact cosines, and when to fit a new projection.

Dimension letters: P problems, D sketch dimensions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from torch import nn

from gradstore.engine.gradients.exact import exact_against
from gradstore.engine.gradients.settings import GradientSpec
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.sketcher import Sketcher, sketch_together
from gradstore.engine.sketches.spec import SketchBatch

_LEAST = 16
"""Groups with a signal from which a ranking is measured."""
REFIT_BELOW = 0.9
"""A projection with a fidelity below this should be fitted anew."""
REFIT_LOSS = 0.01
"""A projection that lost this much fidelity since its fit should be fitted anew."""


class Rows:
    """Sketches of problems, by problem id."""

    def __init__(self, batches: Iterable[SketchBatch]) -> None:
        self._batches = list(batches)
        self._places = {i: (b, row) for b, batch in enumerate(self._batches) for row, i in enumerate(batch.ids)}

    def of(self, groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
        """Sketches of the groups, float64 [P, D], and the sketcher's estimates of their gradient norms, float64 [P];
        zeros for a problem without a sketch here."""
        rows_PD = np.zeros((len(groups), self._batches[0].sketches.shape[1]))
        lengths_P = np.zeros(len(groups))
        for place, group in enumerate(groups):
            if group.problem_id in self._places:
                b, row = self._places[group.problem_id]
                batch = self._batches[b]
                rows_PD[place] = batch.sketches[row]
                lengths_P[place] = np.linalg.norm(rows_PD[place]) if batch.norms is None else batch.norms[row]
        return rows_PD, lengths_P


@dataclass(frozen=True, slots=True, eq=False)
class ExactRanking:
    """Exact cosines of some problems with the mean gradient of others: the reference for a projection's fidelity."""

    scored: list[Group]
    others: list[Group]
    cosines: np.ndarray
    """Exact cosines, float64 [P], NaN for a problem without a gradient."""

    @classmethod
    def of(
        cls, model: nn.Module, spec: GradientSpec, groups: Sequence[Group], benchmark: Sequence[Group] = (), n: int = 64
    ) -> "ExactRanking | None":
        """The exact ranking of at most n of the groups; None if fewer than `_LEAST` groups have a signal.

        benchmark: groups whose mean gradient is the target, as in a search; without them, the target is the mean
        gradient of every second group. Cost: a plain forward and backward for each group used.
        """
        if not cls.measures(groups):
            return None
        live = [group for group in groups if group.has_signal][:n]
        known = [group for group in benchmark if group.has_signal]
        scored, others = (live, known) if known else (live[::2], live[1::2])
        return cls(scored, others, exact_against(model, scored, others, spec).cosines[:, 0])

    @staticmethod
    def measures(groups: Sequence[Group]) -> bool:
        """Whether enough of the groups have a signal."""
        return sum(group.has_signal for group in groups) >= _LEAST

    def fidelity(self, rows: Rows, others: Rows) -> float | None:
        """Spearman correlation of the sketches' cosines with the exact ones; None if fewer than 8 problems have both.

        rows: sketches of at least the scored problems. others: sketches of at least the target's problems.
        """
        rows_PD, lengths_P = rows.of(self.scored)
        found_P = rows_PD @ others.of(self.others)[0].sum(axis=0) / np.where(lengths_P > 0, lengths_P, np.nan)
        kept_P = np.isfinite(self.cosines) & np.isfinite(found_P)
        return float(spearmanr(found_P[kept_P], self.cosines[kept_P])[0]) if kept_P.sum() >= 8 else None

    def fidelity_of(self, sketcher: Sketcher) -> float | None:
        """Fidelity of a sketcher, which makes the sketches for it."""
        rows, others = (Rows([sketch_together(sketcher, groups)]) for groups in (self.scored, self.others))
        return self.fidelity(rows, others)


def needs_refit(fidelity: float | None, when_fitted: float | None) -> bool:
    """Whether a projection of this fidelity should be fitted anew; False if it was not measured."""
    least = REFIT_BELOW if when_fitted is None else max(REFIT_BELOW, when_fitted - REFIT_LOSS)
    return fidelity is not None and fidelity < least
