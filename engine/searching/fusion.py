"""Fusion of several benchmarks into one ranking: score against all targets in one pass, then combine the scores.

    mean      sum_q w_q s_qi / sum_q w_q               one benchmark's large scores can dominate
    minimum   min_q s_qi                               the benchmark that a problem helps least decides
    rrf       sum_q w_q / (c + rank_q(i))              only the order within each benchmark counts

RRF: Cormack, Clarke, Buettcher, SIGIR 2009, with their c = 60; c = 0 is CROPI's sum of 1/rank (arXiv 2510.26491).

Q targets, P problems, K hits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from gradstore import View
from gradstore.engine.searching.fisher import DAMPING
from gradstore.engine.searching.indexes import Index
from gradstore.engine.searching.query import Hits, Metric, best_hits, eligible_positions, query_vectors, score_rows
from gradstore.engine.searching.ranking import best
from gradstore.engine.searching.targets import Target
from gradstore.engine.searching.where import Where
from gradstore.errors import RequestError, check_known, check_number

Fusion = Literal["mean", "minimum", "rrf"]
RRF_CONSTANT = 60.0


@dataclass(frozen=True, slots=True, eq=False)
class FusedHits(Hits):
    """Hits of a combined ranking; `scores` are the combined ones."""

    scores_QK: np.ndarray
    """Score of each hit against each target, float32 [Q, K]."""


def fuse_scores(
    scores_QP: np.ndarray, how: Fusion = "mean", weights: Sequence[float] | None = None, constant: float = RRF_CONSTANT
) -> np.ndarray:
    """Combine scores into one per problem, higher is better, float64 [P]; NaN where any score is NaN.

    scores_QP: float [Q, P], higher is better. weights: one per target, not negative; `minimum` takes none. Ranks count
    from 1; equal scores share the best of their ranks. RequestError for an unknown method or invalid weights.
    """
    check_known("fusion", how, get_args(Fusion))
    if weights is not None and how == "minimum":
        raise RequestError("the minimum takes no weights: use mean or rrf")
    weight_Q = np.ones(len(scores_QP)) if weights is None else np.asarray(weights, np.float64)
    if weight_Q.shape != (len(scores_QP),):
        raise RequestError(f"{weight_Q.size} weights for {len(scores_QP)} targets: give one for each")
    if not np.isfinite(weight_Q).all() or weight_Q.min() < 0 or weight_Q.sum() == 0:
        raise RequestError(f"weights {weight_Q.tolist()}: expected finite numbers, none negative, not all zero")
    scores_QP = np.asarray(scores_QP, np.float64)
    if how == "minimum":
        return scores_QP.min(axis=0)
    weight_Q = weight_Q / weight_Q.sum()
    if how == "mean":
        return weight_Q @ scores_QP
    ranked = ~np.isnan(scores_QP).any(axis=0)
    fused_P = np.full(scores_QP.shape[1], np.nan)
    fused_P[ranked] = weight_Q @ (1 / (constant + _ranks(scores_QP[:, ranked])))
    return fused_P


def search_each(
    view: View,
    queries: Sequence[Target | str | np.ndarray] | np.ndarray,
    k: int,
    *,
    metric: Metric = "cosine",
    largest: bool = True,
    where: Where | str | Sequence[str] | np.ndarray | None = None,
    index: Index | str | None = None,
    damping: float = DAMPING,
) -> list[Hits]:
    """The k best problems for each target; arguments as in `search`.

    All are found in one pass over the rows, or with an index in one pass over that; `auto` takes the faster of the two
    for so many targets.
    """
    queries_QD, eligible = _asked(view, queries, k, metric, where, damping)
    return best_hits(view, queries_QD, k, metric, largest, eligible, index)


def search_fused(
    view: View,
    queries: Sequence[Target | str | np.ndarray] | np.ndarray,
    k: int,
    *,
    how: Fusion = "mean",
    weights: Sequence[float] | None = None,
    constant: float = RRF_CONSTANT,
    metric: Metric = "cosine",
    largest: bool = True,
    where: Where | str | Sequence[str] | np.ndarray | None = None,
    damping: float = DAMPING,
) -> FusedHits:
    """The k problems with the best combined score over all targets, ties by id; other arguments as in `search`.

    largest=False negates every score before the combination: it finds problems that all benchmarks rank low.
    Exact, in one pass over the rows. Memory: two floats per problem and target.
    """
    queries_QD, eligible = _asked(view, queries, k, metric, where, damping)
    scores_QP = score_rows(view, queries_QD, metric, eligible)
    sign = 1 if largest else -1
    fused_P = fuse_scores(sign * scores_QP, how, weights, constant)
    positions = best(fused_P, k, view.ids_at)
    shown = fused_P[positions] * (1 if how == "rrf" else sign)
    return FusedHits(
        view.ids_at(positions),
        shown.astype(np.float32),
        positions,
        len(eligible),
        scores_QP[:, positions],
        n_unknown=int(np.isnan(fused_P[eligible]).sum()),
    )


def _asked(
    view: View,
    queries: Sequence[Target | str | np.ndarray] | np.ndarray,
    k: int,
    metric: Metric,
    where: Where | str | Sequence[str] | np.ndarray | None,
    damping: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Check the request; returns query vectors [Q, D] and the positions of the problems to rank."""
    check_number("k", k, least=1)
    queries = [queries] if isinstance(queries, str) else queries
    if not len(queries):
        raise RequestError("no target given: name at least one benchmark")
    found = query_vectors(view, list(queries), metric, damping)
    return found, eligible_positions(view, where if isinstance(where, np.ndarray) else Where.of(where))


def _ranks(scores_QP: np.ndarray) -> np.ndarray:
    """Rank of each score in its row, float64: 1 is the largest, equal scores have equal ranks."""
    return np.stack([np.searchsorted(np.sort(-scores_P), -scores_P) + 1.0 for scores_P in scores_QP])
