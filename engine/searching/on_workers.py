"""Search of one view by a pool of Ray workers: each scans a part of the rows, and the best of all parts are merged.

    with SearchOnWorkers(view, workers=4) as rows:    # Ray must be initialised (engine/cluster/ray_start.py)
        hits = rows.search(target, 20)                # those of `search(view, target, 20)`

The rows stay where they are. A worker opens the view itself, at the same commit, and keeps it open between searches; it
gets a query of one vector and, where there is a filter, one bit per row, and returns the k best of its part. So the
store's folder must be on every machine, at one path.

Equal to one process, because a row's score depends on the row alone, and because what is among the k best of all is
among the k best of its part, also where ids decide between equal scores.

P problems of a view, N of a part, W dimensions of a query, K hits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gradstore import View
from gradstore.engine.cluster.pool import Cost, Pool, Window
from gradstore.engine.searching.fisher import DAMPING
from gradstore.engine.searching.query import Hits, Metric, eligible_positions, n_unknown_of, query_vectors, scanned
from gradstore.engine.searching.ranking import best
from gradstore.engine.searching.targets import Target, target
from gradstore.engine.searching.where import Where
from gradstore.errors import check_number

_Found = tuple[np.ndarray, np.ndarray, int]
"""Positions in the part, scores, and the number of eligible rows without a score."""


class SearchOnWorkers:
    """The rows of a view, divided among workers; as a context manager it ends them."""

    def __init__(self, view: View, *, workers: int, parts: int | None = None, cpus: int = 1) -> None:
        """parts: how many to divide the rows into; default: one for each worker. The others are `Pool`'s.

        RequestError if a worker does not find the store, and for a store that is read from a URL: pull it first.
        """
        check_number("workers", workers, least=1)
        check_number("parts", workers if parts is None else parts, least=1)
        self._view = view
        self._parts = parts_of(view, parts or workers)
        self._n_live = [int(view.live[part].sum()) for part in self._parts]
        self._pool = Pool(_Replica(view.__reduce__(), len(self._parts)), workers=workers, cpus=cpus)
        self._pool.about()

    def __enter__(self) -> "SearchOnWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    @property
    def costs(self) -> list[Cost]:
        """What each worker has done; its `problems` are rows."""
        return self._pool.costs

    def search(
        self,
        query: Target | str | np.ndarray,
        k: int,
        *,
        metric: Metric = "cosine",
        largest: bool = True,
        where: Where | str | Sequence[str] | np.ndarray | None = None,
        damping: float = DAMPING,
    ) -> Hits:
        """As `search` without an index, ties included. The second moment for `fisher` is computed here."""
        check_number("k", k, least=1)
        view = self._view
        goal = target(view.store, query, view.at) if isinstance(query, str) else query
        query_W = query_vectors(view, [goal], metric, damping)[0]
        eligible = eligible_positions(view, where if isinstance(where, np.ndarray) else Where.of(where))
        windows = (
            Window((number, bits, query_W, k, metric, largest), n, f"part {number} of {len(self._parts)}")
            for number, (n, bits) in enumerate(self._asked(eligible, everything=where is None))
        )
        found: list[_Found] = list(self._pool.map(windows))
        position_N = np.concatenate([part[at] for part, (at, _, _) in zip(self._parts, found, strict=True)])
        score_N = np.concatenate([scores for _, scores, _ in found])
        order = best(score_N, k, lambda chosen: view.ids_at(position_N[chosen]), largest)
        positions, unknown = position_N[order], sum(n for _, _, n in found)
        return Hits(view.ids_at(positions), score_N[order], positions, len(eligible), n_unknown=unknown)

    def _asked(self, eligible: np.ndarray, *, everything: bool) -> list[tuple[int, np.ndarray | None]]:
        """Number of eligible rows of each part, and which they are as packed bits; None: all live ones."""
        if everything:
            return [(n, None) for n in self._n_live]
        mask_P = np.zeros(len(self._view), bool)
        mask_P[eligible] = True
        each = [mask_P[part] for part in self._parts]
        return [(int(mask_N.sum()), np.packbits(mask_N)) for mask_N in each]


def parts_of(view: View, n: int) -> list[np.ndarray]:
    """Divide a view into at most n parts of about equal size, in the order of the rows on disk: positions, int64."""
    pieces = view.stored.pieces()
    order = np.concatenate([piece.positions for piece in pieces]) if pieces else np.zeros(0, np.int64)
    cuts = sorted({len(order) * i // n for i in range(n + 1)})
    return [order[a:b] for a, b in pairwise(cuts)] or [order]


@dataclass(frozen=True, slots=True)
class _Replica:
    """How a worker opens the rows."""

    view: tuple[Callable[..., View], tuple]
    """What makes the view, called in `__call__`: there what is wrong with the store is told."""
    parts: int

    def __call__(self) -> "_Scanning":
        make, arguments = self.view
        return _Scanning(make(*arguments), self.parts)


class _Scanning:
    """The function of a worker. It opens a part when it first gets it, in most cases always the same one."""

    def __init__(self, view: View, parts: int) -> None:
        self._view = view
        self._positions = parts_of(view, parts)
        self._parts: dict[int, View] = {}

    def __call__(
        self, number: int, bits: np.ndarray | None, query_W: np.ndarray, k: int, metric: Metric, largest: bool
    ) -> _Found:
        if number not in self._parts:
            self._parts[number] = self._view.part(self._positions[number])
        part = self._parts[number]
        eligible = part.live_positions
        if bits is not None:
            eligible = np.flatnonzero(np.unpackbits(bits, count=len(part)))
        ((positions, scores),) = scanned(part, query_W[None], k, metric, largest, eligible)
        return positions, scores, n_unknown_of(part, query_W, eligible)
