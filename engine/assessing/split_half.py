"""Split-half reliability of scores, from odd and even rollouts, and a noise floor, from shuffled rewards.

A score is an estimate from a few rollouts. Two halves of them give two independent estimates, each with its own
baseline. Their correlation over problems is the reliability of half the rollouts; the Spearman-Brown formula
extrapolates it to all rollouts. It bounds how well a sketch of these scores can rank. Shuffling rewards within each
group removes only their relation to the responses: scores from shuffled rewards are the noise floor.

Dimension letters: P problems.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy.stats import pearsonr, spearmanr  # type: ignore[import-untyped]
from torch import nn

from gradstore.engine.gradients.exact import LayerGradients, exact_dots
from gradstore.engine.rollouts.group import Group
from gradstore.engine.searching.query import Metric, direction
from gradstore.engine.searching.targets import Target
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchSpec
from gradstore.errors import RequestError
from gradstore.state import live_mask

Score = Callable[[Sequence[Group]], np.ndarray]
"""Groups -> scores, float64 [P]; NaN for a group without a score (no signal, failed)."""


@dataclass(frozen=True, slots=True)
class SplitHalf:
    """Agreement of the scores of two halves, and the resulting reliability of the whole."""

    n_problems: int
    pearson: float
    """Pearson correlation of the halves' scores."""
    spearman: float
    """Spearman (rank) correlation of the halves' scores."""
    reliability: float
    """Expected correlation between scores from all rollouts and from equally many new rollouts (Spearman-Brown)."""
    rank_reliability: float
    """The same for ranks: the expected Spearman correlation of two independent sets of rollouts."""

    def describe(self) -> dict:
        """The results as a dict for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, eq=False)
class Reliability:
    """Scores with their standard errors, their reliability and the noise floor."""

    ids: list[str]
    scores: np.ndarray
    """Scores from all rollouts, float64 [P]; NaN without signal."""
    standard_errors: np.ndarray
    """Half the difference of the halves' scores, float64 [P]: one degree of freedom each."""
    standard_error: float
    """Root mean square of `standard_errors`: error of a typical score, much more precise than each single one."""
    halves: SplitHalf
    floor: np.ndarray
    """Scores under shuffled rewards, float64, all permutations concatenated."""

    @property
    def noise_floor(self) -> float:
        """95th percentile of |score| under shuffled rewards; NaN without permutations."""
        found = self.floor[~np.isnan(self.floor)]
        return float(np.quantile(np.abs(found), 0.95)) if len(found) else float("nan")

    def describe(self) -> dict:
        """The results without the single scores, as a dict for JSON."""
        live = ~np.isnan(self.scores)
        return {
            **self.halves.describe(),
            "standard_error": self.standard_error,
            "score_deviation": float(self.scores[live].std()),
            "noise_floor": self.noise_floor,
            "above_floor": float((self.scores[live] > self.noise_floor).mean()),
        }


def reliability(score: Score, groups: Sequence[Group], *, seed: int = 0, permutations: int = 1) -> Reliability:
    """Score the groups, their odd and even rollouts, and the groups with rewards shuffled within each.

    score: a scoring function such as `sketch_scores(sketcher, target)` or `exact_scores(model, target)`.
    Groups without signal are left out; a half without signal scores 0. Cost: each group is run 2 + permutations times.
    RequestError for fewer than three live groups, or a group with a single rollout.
    """
    halves = split(groups)
    scores_P = np.asarray(score(groups), np.float64)
    live = np.flatnonzero(~np.isnan(scores_P)).tolist()
    chosen, *parts = ([part[i] for i in live] for part in (groups, *halves))
    even_P, odd_P = (np.nan_to_num(np.asarray(score(part), np.float64)) for part in parts)
    found = split_half(even_P, odd_P)
    errors_P = np.full(len(groups), np.nan)
    errors_P[live] = np.abs(even_P - odd_P) / 2
    floor = [score(permuted(chosen, seed + number)) for number in range(permutations)]
    return Reliability(
        [group.problem_id for group in groups],
        scores_P,
        errors_P,
        float(np.sqrt(np.mean(errors_P[live] ** 2))),
        found,
        np.concatenate(floor) if floor else np.empty(0),
    )


def split_half(even_P: np.ndarray, odd_P: np.ndarray) -> SplitHalf:
    """Agreement of two halves' scores of the same problems, float [P] each; RequestError for fewer than three."""
    if len(even_P) < 3 or len(even_P) != len(odd_P):
        raise RequestError(f"reliability needs two scores of at least 3 live problems, got {len(even_P)}, {len(odd_P)}")
    if np.ptp(even_P) == 0 or np.ptp(odd_P) == 0:  # a correlation with what does not vary is not defined
        pearson = spearman = float("nan")
    else:
        pearson, spearman = float(pearsonr(even_P, odd_P)[0]), float(spearmanr(even_P, odd_P)[0])
    return SplitHalf(len(even_P), pearson, spearman, spearman_brown(pearson), spearman_brown(spearman))


def spearman_brown(correlation: float) -> float:
    """Reliability of twice the measurements: 2 r / (1 + r); NaN for r = -1 (Spearman 1910, Brown 1910)."""
    return 2 * correlation / (1 + correlation) if correlation > -1 else float("nan")


def split(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """Split each group into even rollouts (first, third, ...) and odd ones; each half has its own baseline.

    RequestError for a group with a single rollout.
    """
    for group in groups:
        if group.n_rollouts < 2:
            raise RequestError(f"problem {group.problem_id!r} has one rollout: halves need at least two")
    return [group.part(slice(0, None, 2)) for group in groups], [group.part(slice(1, None, 2)) for group in groups]


def permuted(groups: Sequence[Group], seed: int) -> list[Group]:
    """Shuffle the rewards within each group; the order depends only on the seed and the group's id."""
    shuffled = []
    for group in groups:
        random = np.random.default_rng([seed, *group.problem_id.encode()])
        shuffled.append(replace(group, rewards=random.permutation(group.rewards)))
    return shuffled


def sketch_scores(sketcher: Sketcher, target: Target | np.ndarray, metric: Metric = "cosine") -> Score:
    """Scoring function: sketches against a target in sketch space, equal to a search in a store."""
    target_D = direction(target, sketcher.dim, metric)

    def score(groups: Sequence[Group]) -> np.ndarray:
        batch = sketcher.sketch(groups)
        lengths_P = np.linalg.norm(batch.sketches, axis=1) if batch.norms is None else batch.norms
        lengths_P = lengths_P if metric == "cosine" else np.ones(len(groups))
        live_P = live_mask(batch.states)
        dots_P = (batch.sketches @ target_D).astype(np.float64)
        return np.divide(dots_P, lengths_P, out=np.full(len(groups), np.nan), where=live_P)

    return score


def exact_scores(
    model: nn.Module, target: LayerGradients, spec: SketchSpec | None = None, metric: Metric = "cosine"
) -> Score:
    """Scoring function: exact scores over the layers that the spec sketches."""

    def score(groups: Sequence[Group]) -> np.ndarray:
        batch = exact_dots(model, groups, target, spec, norms=metric == "cosine")
        if metric == "cosine":
            return batch.cosines[:, 0]
        live_P = live_mask(batch.states)
        return np.where(live_P, batch.dots[:, 0], np.nan)

    return score
