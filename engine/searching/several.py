"""Search of several stores as if they were one: shards that were not merged, or rows on several disks.

    hits = search_stores([gradstore.open(path).view("pool") for path in paths], target, 20)

The stores have the same settings and bases, as those that `merge` takes. Each is scanned by a thread of its own, so
that several disks are read at once. Hits and scores are those of a search of the merged store, ties included: a row's
score depends on the row alone, and what is among the k best of all is among the k best of its store.

K hits, S of a store.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import numpy as np

from gradstore import View
from gradstore.engine.searching.query import Hits, search
from gradstore.engine.searching.ranking import best
from gradstore.engine.searching.targets import Target
from gradstore.engine.searching.where import Where
from gradstore.errors import RequestError, check_known
from gradstore.likeness import check_like


def search_stores(
    views: Sequence[View],
    query: Target | np.ndarray,
    k: int,
    *,
    metric: Literal["cosine", "dot"] = "cosine",
    largest: bool = True,
    where: Where | str | Sequence[str] | None = None,
) -> Hits:
    """The k live problems of all views with the largest (or smallest) score, ties by id.

    views: one of each store. A problem may be in several stores with the same row, and is found once. positions of the
    hits: in the views laid end to end. n_eligible counts a problem in each store that has it. The rest as in `search`,
    with neither an index nor `fisher`, whose second moment is of one store's rows.
    RequestError for no views, for stores of other settings, and for a hit that has another row in another store.
    """
    if not views:
        raise RequestError("a search of several stores needs at least one view")
    check_known("metric", metric, ("cosine", "dot"))
    for view in views[1:]:
        check_like(view.store, views[0].store.path)
    run = partial(search, query=query, k=k, metric=metric, largest=largest, where=where)
    with ThreadPoolExecutor(len(views)) as threads:
        found = list(threads.map(run, views))
    starts = np.cumsum([0, *map(len, views)])
    ids_S, scores_S = (np.concatenate([getattr(hits, name) for hits in found]) for name in ("ids", "scores"))
    positions_S = np.concatenate([hits.positions + start for hits, start in zip(found, starts, strict=False)])
    _, first, inverse = np.unique(ids_S, return_index=True, return_inverse=True)
    other = np.flatnonzero(scores_S != scores_S[first][inverse])
    if len(other):
        name = ids_S[other[0]]
        stores = [str(view.store.path) for view, hits in zip(views, found, strict=True) if name in hits.ids]
        raise RequestError(f"problem {name!r} has different rows in {' and '.join(stores)}: of which steps are they?")
    once = np.sort(first)
    order = once[best(scores_S[once], k, lambda chosen: ids_S[once[chosen]], largest)]
    n_eligible, n_unknown = sum(hits.n_eligible for hits in found), sum(hits.n_unknown for hits in found)
    return Hits(ids_S[order], scores_S[order], positions_S[order], n_eligible, n_unknown=n_unknown)
