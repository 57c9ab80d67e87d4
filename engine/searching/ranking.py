"""The k best of many scores, ties broken by id, whatever order the problems are stored in."""

from collections.abc import Callable

import numpy as np

_SAMPLE = 4096
"""Of many keys, to guess a bound from."""

_FEW = 2
"""So many times the wanted keys are sorted sooner than cut down to the wanted."""


def best(scores_P: np.ndarray, k: int, id_of: Callable[[np.ndarray], np.ndarray], largest: bool = True) -> np.ndarray:
    """Positions of the k best finite scores, best first, equal scores in the order of their ids; int64 [<= k].

    scores_P: float [P]; NaN marks what must not be ranked. id_of: the ids at given positions, asked only for the
    few that can be among the k.
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
    """The k-th smallest of the keys that are not NaN: their largest where they are fewer, NaN where there are none.

    Of many keys a sample tells a bound that a few are below; where those are k or more, only they are looked at.
    """
    sample = keys_P[:: max(1, len(keys_P) // _SAMPLE)]
    rank = 2 * k * len(sample) // max(1, len(keys_P)) + 16
    if 4 * rank < len(sample):
        few = keys_P[keys_P <= np.partition(sample, rank)[rank]]
        keys_P = few if len(few) >= k else keys_P
    k = min(k, len(keys_P) - int(np.count_nonzero(np.isnan(keys_P))))
    return float(np.partition(keys_P, k - 1)[k - 1]) if k else float("nan")  # NaN comes last.
