"""Which problems of a view align most, or least, with a direction.

The rows of a view are unit vectors with their norms beside them: cosine is a matrix product with the unit target,
dot the same times the norm. The exact scan (engine/scan.py) reads every live row once, as it is stored, in bounded
memory; the FAISS flat index holds the rows in float32 and pays off when the same view is asked many times.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.index import FlatIndex
from engine.ranking import best
from engine.scan import scan_rows
from engine.targets import Target
from engine.where import Where
from gradstore import View
from gradstore.errors import RequestError

Metric = Literal["cosine", "dot"]


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """The problems found, best first."""

    ids: np.ndarray
    """str [K]."""
    scores: np.ndarray
    """float32 [K]."""
    positions: np.ndarray
    """Their places in the view, int64 [K]."""
    n_eligible: int
    """Live problems that passed the filter: fewer than asked when smaller than k."""

    def __len__(self) -> int:
        return len(self.ids)


def search(
    view: View,
    query: Target | np.ndarray,
    k: int,
    *,
    metric: Metric = "cosine",
    largest: bool = True,
    where: Where | np.ndarray | None = None,
    index: FlatIndex | None = None,
) -> Hits:
    """The k live problems of the view with the largest (or smallest) score, ties by id.

    query: a target or a float vector [D]. metric: `cosine` of gradient and query; `dot`, gradient times query.
    where: a filter, or a bool mask [P] over the view. index: a FlatIndex of this view and metric, to search instead
    of scanning; its scores agree with the scan's to float32 rounding.
    Only live problems are ranked. RequestError for k below 1, a wrong dimension, a zero or non-finite query.
    """
    if k < 1:
        raise RequestError(f"k is {k}, expected at least 1")
    query_D = direction(query, view.dim, metric)
    mask_P = view.live
    if where is not None:
        mask_P = mask_P & (where.mask(view.problems, view.pass_rates) if isinstance(where, Where) else where)
    eligible = np.flatnonzero(mask_P)
    if index is not None:
        positions, scores = index.search(view, query_D, k, metric, largest, eligible)
    else:
        scores_P = score_rows(view, query_D, metric, eligible)
        positions = best(scores_P, k, view.ids_at, largest)
        scores = scores_P[positions]
    return Hits(view.ids_at(positions), scores.astype(np.float32), positions, len(eligible))


def direction(query: Target | np.ndarray, dim: int, metric: Metric) -> np.ndarray:
    """The query as float32 [D], of unit length for cosine."""
    if metric not in ("cosine", "dot"):
        raise RequestError(f"metric {metric!r} is not one of cosine, dot")
    query_D = np.asarray(query.vector if isinstance(query, Target) else query, np.float32)
    if query_D.shape != (dim,):
        raise RequestError(f"the query has shape {query_D.shape}, the store holds rows of {dim} dimensions")
    length = float(np.linalg.norm(query_D.astype(np.float64)))
    if not np.isfinite(length) or length == 0.0:
        raise RequestError(f"the query's length is {length}, expected a finite number above 0")
    return query_D if metric == "dot" else (query_D / length).astype(np.float32)


def score_rows(view: View, query: np.ndarray, metric: Metric, positions: np.ndarray) -> np.ndarray:
    """Scores of the rows at the positions, NaN elsewhere: float32 [P] for a query [D], [Q, P] for queries [Q, D]."""
    scores_QP = scan_rows(view, np.atleast_2d(query), positions)
    if metric == "dot":
        scores_QP *= view.norms
    return scores_QP[0] if np.ndim(query) == 1 else scores_QP
