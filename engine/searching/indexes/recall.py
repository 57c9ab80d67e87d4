"""Recall self-test at the end of a build: measures recall against the exact scan, and sets how much is fetched.

There are three sorts of query: means of sixteen problems' gradients (targets), single rows, and targets blended half
with random directions (like another benchmark's). For fisher they are preconditioned. Each is searched for the largest
and for the smallest scores and compared with an exact scan of the same view. The index then fetches the fewest
candidates whose mean recall reaches the requested one for every sort of query and both directions.

Q queries, P problems, D sketch dimensions.
"""

import numpy as np

from gradstore import View
from gradstore.engine.searching.fisher import preconditioned
from gradstore.engine.searching.indexes.index import Index, Tested, fetch
from gradstore.engine.searching.scan import scan_rows

_QUERIES = 8
"""Queries per sort."""


def rung(k: int, n_live: int) -> int:
    """The k to test for a requested k: the next of 100, 300, 1000, 3000, ..., at most all rows."""
    for power in range(2, 12):
        for tested in (10**power, 3 * 10**power):
            if tested >= k:
                return min(tested, n_live)
    return n_live


def self_test(index: Index, view: View, recall: float, k: int, queries_QD: np.ndarray | None = None) -> Tested:
    """Find the smallest factor whose mean recall at k reaches `recall` for every sort, else the one with most recall.

    queries_QD: test with these, unit length, instead of sampled ones.
    """
    live = view.live_positions
    sampled = queries_QD is None
    queries_QD = sample_queries(view, live) if queries_QD is None else queries_QD
    if sampled and index.metric == "fisher":
        # Preconditioned queries point away from the rows with the largest norms: the hardest case by inner product.
        queries_QD = _unit(preconditioned(view, queries_QD))
    scores_QP = _exact(index, view, queries_QD, live)
    wanted = {sign: [live[np.argpartition(-sign * scores_P, k - 1)[:k]] for scores_P in scores_QP] for sign in (1, -1)}
    best = Tested(k, -1.0, -1.0, 1.0)
    for factor in index.kind.factors:
        m = min(fetch(factor, k), len(live))
        shares = np.array(
            [
                [
                    np.isin(expected, found).mean()
                    for expected, found in zip(
                        expected_Q, index.candidates(view, queries_QD, m, sign > 0, live), strict=True
                    )
                ]
                for sign, expected_Q in wanted.items()
            ]
        )
        means = shares.reshape(2, -1, _QUERIES if sampled else len(queries_QD)).mean(axis=2)
        result = Tested(k, float(means.min()), float(shares.min()), factor)
        if result.recall > best.recall:
            best = result
        if best.recall >= recall or factor * k > 2 * len(live):
            break
    return best


def sample_queries(view: View, live: np.ndarray, seed: int = 0) -> np.ndarray:
    """Sample queries, float32 [Q, D], unit length: means of sixteen gradients, single rows, means plus random units."""
    random = np.random.default_rng(seed)
    picked = [random.choice(live, size=min(16, len(live)), replace=False) for _ in range(_QUERIES)]
    means_QD = _unit(np.stack([view.norms[np.sort(chosen)] @ view.rows(np.sort(chosen)) for chosen in picked]))
    singles_QD = view.rows(np.sort(random.choice(live, size=_QUERIES)))
    blends_QD = _unit(means_QD[::-1] + _unit(random.normal(size=means_QD.shape)))
    return np.concatenate([means_QD, singles_QD, blends_QD]).astype(np.float32)


def _unit(rows_QD: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows_QD, axis=1, keepdims=True)
    unit_QD: np.ndarray = rows_QD / np.where(lengths > 0, lengths, 1)
    return unit_QD


def _exact(index: Index, view: View, queries_QD: np.ndarray, live: np.ndarray) -> np.ndarray:
    scores_QP = scan_rows(view, queries_QD, live)[:, live]
    return scores_QP if index.metric == "cosine" else scores_QP * view.norms[live]
