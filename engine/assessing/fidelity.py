"""Fidelity of stored sketches: agreement of their ranking with the exact one over the same layers, on a sample.

The split-half reliability of the exact ranking is reported as well. If it is lower than the agreement, a finer sketch
would rank no better.

Dimension letters: P problems.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from torch import nn

from gradstore import Store
from gradstore.engine.assessing.split_half import SplitHalf, split, split_half
from gradstore.engine.gradients.exact import exact_against
from gradstore.engine.rollouts.source import RolloutSource
from gradstore.engine.searching.query import search
from gradstore.engine.searching.ranking import best
from gradstore.engine.searching.targets import target
from gradstore.engine.sketches.spec import SketchSpec
from gradstore.errors import RequestError


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well one set of scores reproduces another's ranking."""

    n_problems: int
    spearman: float
    top_5_percent: float
    """Recall of the exact scores' best 5 % among the best 5 % found."""
    k: int
    top_k: float
    """The same recall for the best k."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Agreement of stored sketches with exact scores, and the reliability of the exact scores."""

    agreement: Agreement
    halves: SplitHalf | None
    """Agreement of exact scores from even and from odd rollouts; None unless requested."""
    row_bytes: int
    """Bytes per row in the store."""

    def describe(self) -> dict:
        """The results as a dict for JSON."""
        halves = None if self.halves is None else self.halves.describe()
        return {**asdict(self.agreement), "row_bytes": self.row_bytes, "reliability": halves}


def agreement(found_P: np.ndarray, exact_P: np.ndarray, ids: Sequence[str], k: int | None = None) -> Agreement:
    """Spearman correlation and top-k overlaps of two scores per problem, float [P] without NaN, ties by id.

    k: default a tenth of the problems. RequestError for fewer than three problems.
    """
    if len(found_P) < 3:
        raise RequestError(f"agreement of rankings needs at least 3 live problems, got {len(found_P)}")
    n_best = max(1, round(len(found_P) / 20))
    k = max(1, len(found_P) // 10) if k is None else min(k, len(found_P))
    names = np.asarray(ids, object)

    def overlap(n: int) -> float:
        tops = [set(best(scores, n, lambda chosen: names[chosen]).tolist()) for scores in (found_P, exact_P)]
        return len(tops[0] & tops[1]) / n

    return Agreement(len(found_P), float(spearmanr(found_P, exact_P)[0]), overlap(n_best), k, overlap(k))


def fidelity(
    store: Store,
    pool: str,
    against: str,
    model: nn.Module,
    rollouts: RolloutSource,
    benchmark_rollouts: RolloutSource,
    *,
    at: int | None = None,
    sample: int | None = 200,
    k: int | None = None,
    seed: int = 0,
    halves: bool = True,
) -> Fidelity:
    """Compare cosines of a pool's stored rows with exact cosines, over the layers in the store's settings.

    model, rollouts, benchmark_rollouts: the sources of the rows of pool and benchmark. sample: number of live problems
    measured exactly, drawn with the seed; None: all. Cost: a backward pass with weight gradients over the sample's
    rollouts (twice that with halves) and over the benchmark's. Rows in head mode approximate the gradient of every
    layer, so their exact scores use every layer. Memory beyond the model: two blocks of layers' full gradients
    (full_gradients.py). RequestError when fewer than three live problems have rollouts.
    """
    view = store.view(pool, at)
    known = set(rollouts.problem_ids)
    ids = [problem_id for problem_id in view.ids[view.live].tolist() if problem_id in known]
    if sample is not None and sample < len(ids):
        picked = np.sort(np.random.default_rng(seed).choice(len(ids), sample, replace=False))
        ids = [ids[i] for i in picked]
    if len(ids) < 3:
        raise RequestError(f"{pool!r}: {len(ids)} live problems have rollouts in the file, expected at least 3")
    if k is not None and k > len(ids):
        raise RequestError(f"the best {k} of {len(ids)} problems: expected fewer than are measured")
    spec = replace(SketchSpec.of(store.fingerprint), head_only=False)
    groups = [group for group in rollouts.groups(ids) if group.has_signal]
    measured = [*groups, *(half for part in split(groups) for half in part)] if halves else groups
    exact = exact_against(model, measured, list(benchmark_rollouts.groups()), spec).cosines[:, 0]
    exact_P, halves_P = exact[: len(groups)], np.split(exact[len(groups) :], 2)
    live_P = ~np.isnan(exact_P)
    live = [group for group, kept in zip(groups, live_P, strict=True) if kept]
    hits = search(view, target(store, against, at), len(view))
    stored = dict(zip(hits.ids.tolist(), hits.scores.tolist(), strict=True))
    names = [group.problem_id for group in live]
    found_P = np.array([stored[name] for name in names])
    parts = [np.nan_to_num(half_P[live_P]) for half_P in halves_P] if halves else None
    return Fidelity(
        agreement(found_P, exact_P[live_P], names, k), None if parts is None else split_half(*parts), store.row_bytes
    )
