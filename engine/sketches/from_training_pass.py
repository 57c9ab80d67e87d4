"""Sketches from a backward pass that runs anyway: the only extra cost is the projections.

`SketchesFromTrainingPass` takes them from the training pass, `sketched_and_summed` from the pass that computes a
benchmark's gradient.

A training pass back-propagates each group under the training objective; a sketch needs the objective of selection. The
token weights of the two may differ by one factor within a group (such as the group's standard deviation). Then the
gradients differ by the same factor, with or without a shared prompt, and the sketch is the observed one times that
factor. Otherwise the problem is sketched in a separate pass, before the weights change. Possible reasons: responses of
different length under another aggregation, importance ratios, a KL term in one objective only, or several groups of one
problem (they need a common baseline).

Dimension letters: P problems, W groups of the training pass, R responses of a group, C core entries.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradstore.engine.gradients.directions import summed_gradient
from gradstore.engine.gradients.hooks import Observer
from gradstore.engine.gradients.layers import Layer
from gradstore.engine.gradients.microbatch import rollouts_of
from gradstore.engine.gradients.objectives import Objective, rollout_weights
from gradstore.engine.rollouts.group import Group, joined
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchBatch

log = logging.getLogger(__name__)

_RELATIVE = 1e-9
"""Largest relative difference between factors of one group: float64 rounding."""


class SketchesFromTrainingPass:
    """Sketches of a training step's groups, one per problem, from the pass that trains on them."""

    def __init__(
        self,
        sketcher: Sketcher,
        groups: Sequence[Group],
        trained: Objective,
        factors_P: Sequence[float] | None = None,
        rollout_weights_PG: Sequence[np.ndarray] | None = None,
    ) -> None:
        """Sketch at once the problems that the pass cannot give. groups: in the order of the pass. trained: the pass's
        objective. factors_P: factor by which the pass multiplies each group's gradient; a group with factor 0 is not
        run in the pass. rollout_weights_PG: factor of each rollout's advantage in the pass; a sketch is of the
        problem's own gradient, without them. RequestError as in `Sketcher.sketch`."""
        self._sketcher = sketcher
        windows_of: dict[str, list[int]] = {}
        for window, group in enumerate(groups):
            windows_of.setdefault(group.problem_id, []).append(window)
        self._free: dict[int, float] = {}
        """For problems sketched from the pass: position of the group -> factor of its cores."""
        separate = []
        for windows in windows_of.values():
            own = [groups[window] for window in windows]
            found = factor(own[0], trained, sketcher.spec.objective) if len(own) == 1 else None
            if found is not None and factors_P is not None:
                found = found / factors_P[windows[0]] if factors_P[windows[0]] else None
            if rollout_weights_PG is not None and not (rollout_weights_PG[windows[0]] == 1).all():
                found = None
            if found is None or sketcher.optimizer is not None:
                separate.append(joined(own))
            else:
                self._free[windows[0]] = found
        self.n_separate = len(separate)
        """Number of problems sketched in a separate pass."""
        self._whole = None if self._free else sketcher.sketch(separate)
        self._groups = [*(groups[window] for window in self._free), *separate]
        self._observer, self._cores_WC = sketcher.observer(len(groups))
        observer, self._separate_PC = sketcher.observer(len(separate))
        self._n_tokens = sketcher.gradients.run(separate, observer) if self._free and separate else 0

    @property
    def watch(self) -> tuple[Sequence[Layer], Observer] | None:
        """Layers and observer for the training pass; None if no sketch can come from it."""
        return (self._sketcher.gradients.layers, self._observer) if self._free else None

    def batch(self) -> SketchBatch:
        """The sketches; call it after the pass. n_tokens counts only the tokens of separate passes."""
        if self._whole is not None:
            return self._whole
        factors_P = torch.tensor(list(self._free.values()), device=self._cores_WC.device)
        seen_PC = self._cores_WC[list(self._free)] * factors_P[:, None]
        return self._sketcher.batch(self._groups, torch.cat([seen_PC, self._separate_PC]), self._n_tokens)


def sketched_and_summed(sketcher: Sketcher, groups: Sequence[Group]) -> tuple[SketchBatch, dict[str, Tensor]]:
    """Sketches of groups and the sum of their gradients (`summed_gradient`), from one pass if it can give both.

    Optimizer directions and effective sample sizes need a separate pass for the sketches. Under FSDP2 all ranks call
    this together, each with its own groups. RequestError as in `Sketcher.sketch` and `summed_gradient`.
    """
    rule, gradients = sketcher.spec.objective, sketcher.gradients
    if sketcher.optimizer is not None or rule.importance:
        return sketcher.sketch(groups), summed_gradient(gradients, groups)
    observer, cores_PC = sketcher.observer(len(groups))
    sums = summed_gradient(gradients, groups, (gradients.layers, observer))
    n_tokens = sum(len(run.prompt_ids) + len(run.response_ids) for run in rollouts_of(groups, rule))
    return sketcher.batch(groups, cores_PC, n_tokens), sums


def factor(group: Group, trained: Objective, wanted: Objective) -> float | None:
    """Factor between the group's gradients under two objectives: wanted = factor x trained; None if there is none."""
    if trained == wanted and not wanted.importance:
        return 1.0
    for rule in (trained, wanted):
        if rule.importance or rule.kl_beta:
            return None
    if trained.temperature != wanted.temperature:
        return None
    have_R, want_R = (
        rollout_weights(group.rewards, group.n_written, rule, group.rollout_of) for rule in (trained, wanted)
    )
    if not want_R.any():
        return 0.0
    if ((have_R == 0) & (want_R != 0)).any():
        return None
    ratios = want_R[have_R != 0] / have_R[have_R != 0]
    return float(ratios[0]) if np.ptp(ratios) <= _RELATIVE * np.abs(ratios).max() else None
