"""Weights of a training step's rollouts, by the setting `rollout_rule`, with the current policy.

The step's own rollouts are sketched one by one. Nothing is rolled out for this, and the target, where the rule has one,
is that of the round: the newest rows of its benchmarks.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradstore import Store
from gradstore.engine.forecasting.cosine_model import sum_of_units
from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.rollouts.group import Group
from gradstore.engine.searching.targets import target
from gradstore.engine.selecting.rollout_rules import ROLLOUT_RULES, StepRollouts, share_dropped, weigh_rollouts
from gradstore.errors import RequestError
from gradstore.trainer.round.policy import Policy
from gradstore.trainer.round.run import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Weighed:
    """Weights of a step's rollouts, and what they cost."""

    weights: list[np.ndarray]
    """Factor of each rollout's advantage, float64 [G] for each group."""
    dropped: float
    """Share of the rollouts with an advantage that have weight 0."""
    n_tokens: int
    """Tokens that went through the model to find the weights."""

    def scalars(self) -> dict[str, float]:
        """The numbers as a trainer logs them."""
        return {"rollouts_dropped": self.dropped, "weigh_tokens": self.n_tokens}


def weigh(
    store: Store,
    run: Run,
    policy: Policy,
    groups: Sequence[Group],
    factors: Sequence[float] | None,
    objective: Objective | None,
) -> Weighed:
    """See `Rounds.weigh`."""
    settings = run.settings
    if settings.rollout_rule is None:
        raise RequestError("the rounds have no rollout_rule: there is nothing to weigh rollouts by")
    rule = ROLLOUT_RULES[settings.rollout_rule]
    target_D = None
    if rule.needs_target:
        target_D = _target(store, run, policy.step)
        if target_D is None:
            log.warning("step %d: no benchmark problem has a signal, all rollouts count", policy.step)
            return Weighed([np.ones(len(group.rewards)) for group in groups], 0.0, 0)
    sketches = policy.sketch_rollouts(groups, objective)
    step = StepRollouts.of_sketches(groups, sketches.rows, target_D, factors, settings.rollout_threshold)
    weights = weigh_rollouts(rule, step)
    return Weighed(weights, share_dropped(groups, weights), sketches.n_tokens)


def _target(store: Store, run: Run, step: int) -> np.ndarray | None:
    """The target, or the sum of the unit vectors of several, in the basis of the policy's sketches (the newest).

    None if no benchmark has a problem with a signal.
    """
    live = [name for name in run.benchmarks if len(store.view(name, step)) and store.view(name, step).live.any()]
    vectors = [target(store, name, step, run.settings.aggregate).vector for name in live]
    if not vectors:
        return None
    return vectors[0] if len(vectors) == 1 else sum_of_units(vectors)
