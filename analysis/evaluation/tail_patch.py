"""Tail patch: does one training step on a query's best problems help it more than one on random problems?

The tail-patch check of Chang et al., "Scalable Influence and Fact Tracing" (arXiv 2410.17413), for any score.
Dimension letters: Q queries, P problems.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from gradstore.errors import check_number

Patch = Callable[[np.ndarray], np.ndarray]
"""Positions of problems, int64 [k] -> change of each query's output, float [Q], after one training step on them from
the trained model. The model must be restored afterwards."""


def tail_patch(scores_QP: np.ndarray, patch: Patch, k: int = 10, *, repeats: int = 5, seed: int = 0) -> pd.DataFrame:
    """Gain of one step on a query's k best problems, its k worst, and k random ones (mean over draws), per query.

    Columns: query int64, best, worst, random float64 (change of the query's output), effect float64 (best - random).
    RequestError for k outside 1 to P.
    """
    n_queries, n_problems = scores_QP.shape
    check_number("k", k, least=1, most=n_problems)
    order_QP = np.argsort(-np.nan_to_num(scores_QP, nan=-np.inf), axis=1, kind="stable")
    draws = [np.random.default_rng([seed, r]).choice(n_problems, k, replace=False) for r in range(repeats)]
    random_Q = np.mean([patch(draw) for draw in draws], axis=0)
    rows = []
    for q in range(n_queries):
        worst_P = np.argsort(np.nan_to_num(scores_QP[q], nan=np.inf), kind="stable")[:k]
        best, worst = float(patch(order_QP[q, :k])[q]), float(patch(worst_P)[q])
        rows.append((q, best, worst, float(random_Q[q]), best - float(random_Q[q])))
    return pd.DataFrame(rows, columns=["query", "best", "worst", "random", "effect"])
