"""Top-k of many scores, ties broken by id, independent of the storage order."""

from collections.abc import Callable

import numpy as np

_SAMPLE = 4096
"""Sample size for the first bound on the k-th smallest key."""

_FEW = 2
"""Up to this multiple of k, sorting all keys is faster than selecting first."""


def best(scores_P: np.ndarray, k: int, id_of: Callable[[np.ndarray], np.ndarray], largest: bool = True) -> np.ndarray:
    """Positions of the k best finite scores, best first, equal scores in the order of their ids; int64 [<= k].

    scores_P: float [P]; NaN excludes a problem. id_of: callback from positions to ids; called only if there are ties,
    with the few contenders for the k.
    """
    keys_P = -scores_P if largest else scores_P
    bound = kth_smallest(keys_P, k) if len(keys_P) > _FEW * k else np.inf
    contenders = np.flatnonzero(keys_P <= bound)
    keys = keys_P[contenders]
    order = np.argsort(keys)
    if (keys[order][1:] == keys[order][:-1]).any():  # Ids are read only where there are ties.
        order = np.lexsort((np.asarray(id_of(contenders)).astype(str), keys))
    return contenders[order[:k]]


def kth_smallest(keys_P: np.ndarray, k: int) -> float:
    """The k-th smallest key, NaN keys ignored; with fewer than k keys the largest, with none NaN.

    For many keys, a sample gives a likely upper bound. If at least k keys are within it, only those are searched.
    """
    sample = keys_P[:: max(1, len(keys_P) // _SAMPLE)]
    rank = 2 * k * len(sample) // max(1, len(keys_P)) + 16
    if 4 * rank < len(sample):
        few = keys_P[keys_P <= np.partition(sample, rank)[rank]]
        keys_P = few if len(few) >= k else keys_P
    k = min(k, len(keys_P) - int(np.count_nonzero(np.isnan(keys_P))))
    return float(np.partition(keys_P, k - 1)[k - 1]) if k else float("nan")  # NaN comes last.
