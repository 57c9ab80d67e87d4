"""Sketches of single rollouts: the part that each has in its problem's gradient.

One pass with every rollout as a problem of its own. It costs a forward and an input-gradient backward, and runs each
prompt once for each of its distinct responses, because a shared prompt's gradient cannot be told apart by rollout. From
the rows follow a rollout's dot with any target in sketch space, its dot with the step's mean gradient, and its square:
what the rules in engine/selecting/rollout_rules.py go by.

Dimension letters: P problems, G rollouts of a group, R responses (outputs) of a group, S sequences that are run,
C core entries, D sketch dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from gradstore.engine.gradients.hooks import Observer
from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.errors import RequestError


@dataclass(frozen=True, slots=True, eq=False)
class RolloutSketches:
    """Sketches of the rollouts of several groups."""

    ids: list[str]
    """Problem of each group."""
    rows: list[np.ndarray]
    """Sketch of each rollout's part, all its outputs together, float32 [G, D] for each group; zero where the advantage
    is. The rows of a group add up to the sketch of its gradient."""
    n_tokens: int
    """Tokens that went through the model, without padding and repeated responses."""


def sketch_rollouts(sketcher: Sketcher, groups: Sequence[Group], objective: Objective | None = None) -> RolloutSketches:
    """Sketches of the groups' single rollouts, in the sketcher's dimensions.

    objective: that of the gradients; None: the sketcher's. Its importance ratios and KL term are left out: at the
    policy that sampled the rollouts the ratios are 1. RequestError as in `Sketcher.sketch`, for a sketcher of an
    optimizer's directions, which do not add up, and for a gradient that is not finite.
    """
    if sketcher.optimizer is not None:
        raise RequestError("an optimizer's direction is of a whole gradient: rules for rollouts need plain sketches")
    rule = plain(objective or sketcher.spec.objective)
    cores: list[Tensor] = []

    def observer_of(n: int) -> Observer:
        observer, sums_SC = sketcher.observer(n)
        cores.append(sums_SC)
        return observer

    found, n_tokens = sketcher.gradients.under(rule).run_apart(groups, observer_of)
    sketches_SD = sketcher.folded(cores[0]).cpu().numpy()
    finite_S = np.isfinite(sketches_SD).all(axis=1)
    if not finite_S.all():
        bad = found.sequences[int(np.flatnonzero(~finite_S)[0])]
        name = groups[found.groups[bad.problem]].problem_id
        raise RequestError(f"problem {name!r}: the gradient of rollout {bad.index} is not finite")
    padded_SD = np.concatenate([sketches_SD, np.zeros((1, sketcher.dim), np.float32)])  # the row of sequence -1
    rows = []
    for group, sequence_R, factor_R in zip(groups, found.sequence_PR, found.factor_PR, strict=True):
        own_GD = np.zeros((len(group.rewards), sketcher.dim), np.float32)
        np.add.at(own_GD, group.rollouts, padded_SD[sequence_R] * factor_R.astype(np.float32)[:, None])
        rows.append(own_GD)
    return RolloutSketches([group.problem_id for group in groups], rows, n_tokens)


def plain(objective: Objective) -> Objective:
    """The objective without importance ratios, clipping and KL term."""
    return replace(objective, importance=False, clip_low=None, clip_high=None, kl_beta=0.0, reference=None)
