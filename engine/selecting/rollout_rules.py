"""Rules that weigh the rollouts of a training step: a factor of each rollout's advantage, 0 drops it.

The unit is the rollout, not the problem. A rule looks at a step's rollouts, after they were sampled and before the
update, and needs no further ones. It goes by dots of each rollout's part g_ij of its problem's gradient: with a target,
or with the step's own mean gradient. They come from sketches of the rollouts (`of_sketches`) or from derivatives of
their log-probabilities along a direction, as probes measure them (`of_derivatives`).

Users add rules through the entry-point group `gradstore.rollout_rules`; an entry names an `engine.RolloutRule`.
Formulas and sources: docs/methods.md.

Dimension letters: P problems (groups), G rollouts of a group, D sketch dimensions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gradstore.engine.gradients.objectives import Objective, advantages
from gradstore.engine.rollouts.group import Group
from gradstore.engine.selecting.registry import Registry
from gradstore.errors import RequestError, check_number

PerRollout = list[np.ndarray]
"""A number for each rollout, float64 [G] for each of P groups."""

_ROUNDING = 1e-6
"""A difference that is smaller than this share of its terms is rounding: sketches are float32."""


@dataclass(frozen=True, slots=True, eq=False)
class StepRollouts:
    """What a rule knows of a step's rollouts."""

    groups: Sequence[Group]
    threshold: float = 0.0
    """How far a rollout may oppose the direction, in root mean squares of the step's dots that are not 0."""
    target: PerRollout | None = None
    """<g_ij, t>, t the target; None: there is no target, or none of its problems has a signal."""
    batch: PerRollout | None = None
    """<g_ij, m>, m the step's mean gradient, sum_ij f_i g_ij / P with the problems' factors f; None: unknown."""
    own: PerRollout | None = None
    """<g_ij, f_i g_ij / P>, what a rollout itself adds to its `batch`; None: unknown."""

    def __post_init__(self) -> None:
        check_number("rollout_threshold", self.threshold, least=0)
        for name in ("target", "batch", "own"):
            values = getattr(self, name)
            if values is None:
                continue
            if [len(own) for own in values] != [len(group.rewards) for group in self.groups]:
                raise RequestError(f"rollout rules: {name} has not one number for each rollout of each group")
            for group, own in zip(self.groups, values, strict=True):
                if not np.isfinite(own).all():
                    j = int(np.flatnonzero(~np.isfinite(own))[0])
                    raise RequestError(f"problem {group.problem_id!r}: the dot of rollout {j} is not finite")

    @classmethod
    def of_sketches(
        cls,
        groups: Sequence[Group],
        rows: Sequence[np.ndarray],
        target_D: np.ndarray | None = None,
        factors_P: Sequence[float] | None = None,
        threshold: float = 0.0,
    ) -> "StepRollouts":
        """From sketches of the rollouts, float32 [G, D] for each group (`sketch_rollouts`).

        target_D: the target in the same dimensions. factors_P: factor of each group's gradient in the step; None: 1.
        """
        factors = np.ones(len(groups)) if factors_P is None else np.asarray(factors_P, np.float64)
        parts = [np.asarray(own_GD, np.float64) for own_GD in rows]
        sums = (f * own_GD.sum(0) for f, own_GD in zip(factors, parts, strict=True))
        mean_D = sum(sums, np.zeros(1)) / max(len(parts), 1)
        return cls(
            groups,
            threshold,
            None if target_D is None else [own_GD @ np.asarray(target_D, np.float64) for own_GD in parts],
            [own_GD @ mean_D for own_GD in parts],
            [f * (own_GD * own_GD).sum(1) / len(groups) for f, own_GD in zip(factors, parts, strict=True)],
        )

    @classmethod
    def of_derivatives(
        cls,
        groups: Sequence[Group],
        objective: Objective,
        *,
        target: Sequence[np.ndarray] | None = None,
        batch: Sequence[np.ndarray] | None = None,
        squares: Sequence[np.ndarray] | None = None,
        factors_P: Sequence[float] | None = None,
        threshold: float = 0.0,
    ) -> "StepRollouts":
        """From derivatives d_ij along the target, or along the step's mean gradient (`Probe.derivatives`).

        <g_ij, V> = A_ij d_ij / G; a derivative counts as 0 where the advantage is 0, also if it was not measured.
        squares: |g_ij|^2, for leave-one-out.
        """
        given = [advantages(np.asarray(group.rewards, np.float64), objective.advantage) for group in groups]
        factors = [1.0] * len(groups) if factors_P is None else factors_P

        def dots(derivatives: Sequence[np.ndarray] | None) -> PerRollout | None:
            if derivatives is None:
                return None
            return [
                np.where(A_G == 0, 0.0, A_G * np.where(A_G == 0, 0.0, d_G)) / len(A_G)
                for A_G, d_G in zip(given, derivatives, strict=True)
            ]

        own = None
        if squares is not None:
            own = [f * np.asarray(own_G, np.float64) / len(groups) for f, own_G in zip(factors, squares, strict=True)]
        return cls(groups, threshold, dots(target), dots(batch), own)


@dataclass(frozen=True, slots=True)
class RolloutRule:
    """A named way to weigh a step's rollouts."""

    name: str
    weigh: Callable[[StepRollouts], PerRollout]
    """Factor of each rollout's advantage, 0 or more; the step's rollouts -> float64 [G] for each group."""
    formula: str
    needs_target: bool = False
    """True: `StepRollouts.target` is known, where a benchmark has a signal."""


def weigh_rollouts(rule: str | RolloutRule, step: StepRollouts) -> PerRollout:
    """The rule's factor of each rollout's advantage, float64 [G] for each group, in the groups' order.

    A rule by target without a target leaves everything as it is. RequestError for an unknown name, for dots that the
    rule needs and the step does not have, and for a rule's answer of other shapes, or with a factor below 0.
    """
    chosen = ROLLOUT_RULES[rule] if isinstance(rule, str) else rule
    if chosen.needs_target and step.target is None:
        return [np.ones(len(group.rewards)) for group in step.groups]
    found = [np.asarray(weights_G, np.float64) for weights_G in chosen.weigh(step)]
    if [own.shape for own in found] != [(len(group.rewards),) for group in step.groups]:
        raise RequestError(f"rollout rule {chosen.name!r} gave not one weight for each rollout of each group")
    if not all((np.isfinite(own) & (own >= 0)).all() for own in found):
        raise RequestError(f"rollout rule {chosen.name!r}: weights must be finite and not negative")
    return found


def share_dropped(groups: Sequence[Group], weights: Sequence[np.ndarray]) -> float:
    """Share of the rollouts with an advantage that have weight 0; 0 if there are none."""
    live = [advantages(np.asarray(group.rewards, np.float64), "mean") != 0 for group in groups]
    kept = [own_G[live_G] != 0 for live_G, own_G in zip(live, weights, strict=True)]
    n = sum(map(len, kept))
    return 1 - sum(int(own.sum()) for own in kept) / n if n else 0.0


def _scale(dots: PerRollout) -> float:
    """Root mean square of the dots that are not 0; 1 if there are none. It does not depend on their order."""
    given = np.concatenate([np.zeros(0), *dots])
    given = given[given != 0]
    largest = float(np.abs(given).max()) if len(given) else 0.0
    return largest * math.sqrt(math.fsum((given / largest) ** 2) / len(given)) if largest else 1.0


def _hard(dots: PerRollout, threshold: float) -> PerRollout:
    cut = -threshold * _scale(dots)
    return [np.where(dots_G < cut, 0.0, 1.0) for dots_G in dots]


def _soft(dots: PerRollout, threshold: float) -> PerRollout:
    scale = _scale(dots)
    return [np.exp(np.minimum(0.0, dots_G / scale + threshold)) for dots_G in dots]


def _known(dots: PerRollout | None, what: str) -> PerRollout:
    if dots is None:
        raise RequestError(f"this rollout rule needs {what}")
    return dots


def _of_batch(step: StepRollouts) -> PerRollout:
    return _known(step.batch, "dots of the rollouts with the step's mean gradient")


def _of_the_others(step: StepRollouts) -> PerRollout:
    """<g_ij, m - f_i g_ij / P>, 0 where it is rounding."""
    own = _known(step.own, "squares of the rollouts' gradients")
    pairs = zip(_of_batch(step), own, strict=True)
    return [np.where(np.abs(b_G - s_G) <= _ROUNDING * s_G, 0.0, b_G - s_G) for b_G, s_G in pairs]


BUILT_IN: list[RolloutRule] = [
    RolloutRule(
        "oppose_target", lambda step: _hard(step.target or [], step.threshold), "0 if <g_ij, t> < 0, else 1", True
    ),
    RolloutRule(
        "oppose_target_soft",
        lambda step: _soft(step.target or [], step.threshold),
        "exp(min(0, <g_ij, t> / rms))",
        True,
    ),
    RolloutRule("dtv", lambda step: _hard(_of_batch(step), step.threshold), "0 if <g_ij, m> < 0, else 1"),
    RolloutRule(
        "dtv_loo",
        lambda step: _hard(_of_the_others(step), step.threshold),
        "0 if <g_ij, m without g_ij> < 0, else 1",
    ),
]

ROLLOUT_RULES: Registry[RolloutRule] = Registry(
    RolloutRule, BUILT_IN, kind="rollout rule", group="gradstore.rollout_rules", forbidden="+"
)
