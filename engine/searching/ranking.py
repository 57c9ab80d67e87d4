"""The k best of many scores, ties broken by id, whatever order the problems are stored in."""

from collections.abc import Callable

import numpy as np


def best(scores_P: np.ndarray, k: int, id_of: Callable[[np.ndarray], np.ndarray], largest: bool = True) -> np.ndarray:
    """Positions of the k best finite scores, best first, equal scores in the order of their ids; int64 [<= k].

    scores_P: float [P]; NaN marks what must not be ranked. id_of: the ids at given positions, asked only for the
    few that can be among the k.
    """
    keys_P = -scores_P if largest else scores_P
    k = min(k, len(keys_P) - int(np.count_nonzero(np.isnan(keys_P))))
    if k == 0:
        return np.empty(0, np.int64)
    bound = np.partition(keys_P, k - 1)[k - 1]  # NaN comes last.
    contenders = np.flatnonzero(keys_P <= bound)
    ids = np.asarray(id_of(contenders)).astype(str)
    return contenders[np.lexsort((ids, keys_P[contenders]))[:k]]
