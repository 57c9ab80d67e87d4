"""Scores of a pool against each problem of a benchmark; every benchmark problem is a separate query.

Dimension letters: Q queries, P problems of the pool, D sketch dimensions.
"""

import numpy as np

from gradstore import Store
from gradstore.engine.searching.fisher import DAMPING
from gradstore.engine.searching.query import Metric, eligible_positions, query_vectors, score_rows
from gradstore.errors import RequestError


def score_matrix(
    store: Store, pool: str, benchmark: str, metric: Metric = "cosine", at: int | None = None, damping: float = DAMPING
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids of the pool [P], ids of the benchmark [Q], scores float32 [Q, P]); nan for problems that are not live.

    Queries are the benchmark's gradients, not their mean. RequestError if no problem of the benchmark is live.
    """
    view, wanted = store.view(pool, at), store.view(benchmark, at)
    live = np.flatnonzero(wanted.live)
    if not len(live):
        raise RequestError(f"benchmark {benchmark!r} has no live problem: there is nothing to score against")
    queries_QD = wanted.rows(live) * wanted.norms[live, None]
    queries_QD = query_vectors(view, list(queries_QD), metric, damping)
    return view.ids, wanted.ids_at(live), score_rows(view, queries_QD, metric, eligible_positions(view, None))


def self_influence(store: Store, pool: str, at: int | None = None, damping: float = DAMPING) -> np.ndarray:
    """Self-influence g_i^T (M/n + lambda I)^-1 g_i of every problem, float64 [P]; nan where not live.

    It is large for problems that no other problem explains, such as those with wrong labels.
    """
    view = store.view(pool, at)
    live = view.live_positions
    found_P = np.full(len(view), np.nan)
    for positions, units_ND in view.scan(live, 1024):
        rows_ND = units_ND * view.norms[positions, None]
        solved_ND = query_vectors(view, list(rows_ND), "fisher", damping)
        found_P[positions] = (rows_ND.astype(np.float64) * solved_ND).sum(axis=1)
    return found_P
