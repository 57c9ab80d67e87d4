"""Brittleness: how much worse does a query get when its best problems are removed and the model is retrained?

The baseline removes as many random problems. Dimension letters: Q queries, P problems, K numbers removed.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from gradstore.errors import RequestError

Retrain = Callable[[np.ndarray], np.ndarray]
"""Training sets bool [M, P] -> outputs float [M, Q] of the models trained on them."""


def brittleness(
    scores_QP: np.ndarray, retrain: Retrain, removed: Sequence[int] = (10, 50, 100), *, seed: int = 0
) -> pd.DataFrame:
    """A query's output after removing its best problems, compared with removing random ones.

    One row per query and number removed. Columns: query, removed int64, whole (output of the model trained on all
    problems), without_best, without_random float64, effect float64 (without_random - without_best; above 0 if the
    scores found problems that mattered). Trained models: one per query and number, one per number at random, one on all
    problems. RequestError for a number outside 1 to P - 1.
    """
    n_queries, n_problems = scores_QP.shape
    if max(removed) >= n_problems or min(removed) < 1:
        raise RequestError(f"to be removed: {list(removed)}, expected 1 to {n_problems - 1} problems")
    order_QP = np.argsort(-np.nan_to_num(scores_QP, nan=-np.inf), axis=1, kind="stable")
    subsets = [np.ones(n_problems, bool)]
    for n in removed:
        random = np.random.default_rng([seed, n]).choice(n_problems, n, replace=False)
        for out in [random, *(order_P[:n] for order_P in order_QP)]:
            kept_P = np.ones(n_problems, bool)
            kept_P[out] = False
            subsets.append(kept_P)
    outputs_MQ = np.asarray(retrain(np.stack(subsets)), np.float64)
    rows = []
    for number, n in enumerate(removed):
        first = 1 + number * (n_queries + 1)
        for q in range(n_queries):
            without, chance = float(outputs_MQ[first + 1 + q, q]), float(outputs_MQ[first, q])
            rows.append((q, n, float(outputs_MQ[0, q]), without, chance, chance - without))
    return pd.DataFrame(rows, columns=["query", "removed", "whole", "without_best", "without_random", "effect"])
