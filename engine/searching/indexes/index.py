"""Index over stored rows: maps entries to rows, proposes candidates and rescores them with the stored rows.

Entries are rows of one generation of a collection. Those never change, so an entry is never wrong, only superseded or
deleted. A search takes a view: entries that are not among its live rows are masked, and live rows without an entry are
added first. The same index therefore serves every view of the collection.

P problems of the view, N entries, M candidates, Q queries, D sketch dimensions.
"""

from dataclasses import dataclass, field
from pathlib import Path
from weakref import ref

import numpy as np

from gradstore import View
from gradstore.engine.searching.indexes.kinds import Kind, kind_class
from gradstore.engine.searching.ranking import best
from gradstore.engine.searching.scan import scan_pairs
from gradstore.errors import RequestError
from gradstore.layout import COLLECTIONS

_MOST_SUPERSEDED = 0.5
"""Above this share of entries outside the view, a new build is better."""
_RETEST_GROWTH = 1.125
_QUERIES_AT_ONCE = 4096
"""Queries per pass of the index; bounds the memory of their candidates."""


@dataclass(frozen=True, slots=True)
class Tested:
    """Result of the self-test for one k."""

    k: int
    recall: float
    """Mean recall at k against the exact scan, for the sort of query where it is lowest."""
    worst: float
    """Recall of the worst query."""
    factor: float
    """Candidates fetched per requested result."""


@dataclass(slots=True, eq=False)
class Index:
    """An index of one kind and metric; create it with `Index.build` or `engine.index_for`."""

    kind: Kind
    """Its entries are unit rows for cosine, else unit rows times their norms."""
    metric: str
    collection: Path
    """Folder of the collection."""
    generation: int
    entry_rows: np.ndarray
    """Row number of each entry, int64 [N]."""
    entry_norms: np.ndarray
    """Norm of each entry's gradient, float32 [N]; a difference shows that a stored row is not the indexed one."""
    tested: tuple[Tested, ...] = ()
    """Passed self-tests, of ascending k; none for an exact kind."""
    n_tested: int = 0
    """Number of entries at the last self-test."""
    _seen: dict = field(default_factory=dict, repr=False)

    @classmethod
    def build(cls, view: View, kind: str = "flat", metric: str = "cosine") -> "Index":
        """Index every live row of the view, in bounded memory beyond the index itself; not tested yet.

        metric: `cosine`, `dot` or `fisher`. RequestError for an unknown kind, or where its library
        is missing or cannot take rows of this width.
        """
        chosen = kind_class(kind)
        index = cls(
            chosen(view.dim), metric, collection_folder(view), view.stored.generation,
            np.empty(0, np.int64), np.empty(0, np.float32),
        )  # fmt: skip
        index._add(view, view.live_positions)
        return index

    def __len__(self) -> int:
        return len(self.entry_rows)

    def holds(self, view: View) -> bool:
        """Whether the index belongs to the view's collection and generation."""
        return (collection_folder(view), view.stored.generation) == (self.collection, self.generation)

    def extend(self, view: View) -> int:
        """Add the view's live rows that have no entry; returns how many.

        RequestError if the view is of another collection or generation.
        """
        if self._seen.get("view", _no_view)() is view and self._seen.get("complete") == len(self):
            return 0
        if not self.holds(view):
            raise RequestError(
                f"the index was built for {self.collection} g{self.generation}, asked for {collection_folder(view)} "
                f"g{view.stored.generation}: build one for this view"
            )
        known = np.isin(view.stored.numbers, self.entry_rows)
        missing = np.flatnonzero(view.live & ~known)
        self._add(view, missing)
        self._seen |= {"view": ref(view), "complete": len(self)}
        return len(missing)

    def positions(self, view: View) -> np.ndarray:
        """Position of each entry in the view, int64 [N]; -1 for an entry that is not a live row of the view.

        RequestError if the stored rows are not the indexed ones.
        """
        key = (view.commit, view.at, len(self))
        if self._seen.get("key") != key:
            last = int(view.stored.numbers.max(initial=-1))
            where_R = np.full(last + 2, -1)  # The last entry stands for rows that this view does not have.
            where_R[view.stored.numbers[view.live]] = view.live_positions
            found = where_R[np.minimum(self.entry_rows, last + 1)]
            inside = found >= 0
            if not np.array_equal(view.norms[found[inside]], self.entry_norms[inside]):
                raise RequestError(f"the index of {self.collection} is of other rows than are stored: build it anew")
            extended = {name: self._seen[name] for name in ("view", "complete") if name in self._seen}
            self._seen = extended | {"key": key, "positions": found, "share": inside.mean()}
        positions: np.ndarray = self._seen["positions"]
        return positions

    def worn(self, view: View) -> bool:
        """Whether most entries are superseded or deleted, so that a new build is needed."""
        self.positions(view)
        return len(self) > 0 and float(self._seen["share"]) < 1 - _MOST_SUPERSEDED

    def due(self) -> bool:
        """Whether the index has grown so much that it must pass the self-test again."""
        return not self.kind.exact and len(self) > _RETEST_GROWTH * self.n_tested

    def n_candidates(self, k: int) -> int | None:
        """Number of candidates to fetch for the k best; None above the largest k tested."""
        if self.kind.exact:
            return k
        if not self.tested or k > self.tested[-1].k:
            return None
        # A larger k needs fewer candidates per result, so the factor of the next smaller tested k is safe.
        low = next((tested for tested in reversed(self.tested) if tested.k <= k), self.tested[0])
        return fetch(low.factor, max(k, low.k))

    def serves(self, view: View, k: int, metric: str, n_eligible: int) -> bool:
        """Whether the index can answer for this k and number of eligible rows; if not, use the exact scan.

        New rows are added first. RequestError for a view of another collection or generation, or another metric.
        """
        if metric != self.metric:
            raise RequestError(f"the index was built for {self.metric}, asked for {metric}")
        self.extend(view)
        if n_eligible == 0:
            return False
        m = self.n_candidates(min(k, n_eligible))
        return m is not None and (self.kind.exact or n_eligible > 2 * m)

    def search(
        self, view: View, queries_QD: np.ndarray, k: int, metric: str, largest: bool, eligible: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Positions int64 [<= k] and scores float32 of the best eligible rows for each query, best first, ties by id.

        The index is searched for _QUERIES_AT_ONCE queries together, and their candidates are scored together from the
        stored rows, so that scores equal those of a scan. Call `serves` first.
        """
        k = min(k, len(eligible))
        if k == 0:
            return [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries_QD]
        m, found = self.n_candidates(k) or fetch(1.0, k), []
        for start in range(0, len(queries_QD), _QUERIES_AT_ONCE):
            some_QD = queries_QD[start : start + _QUERIES_AT_ONCE]
            candidates = self.candidates(view, some_QD, m, largest, eligible)
            found += _rescored(view, some_QD, k, metric, largest, candidates)
        return found

    def candidates(
        self, view: View, queries_QD: np.ndarray, m: int, largest: bool, eligible: np.ndarray
    ) -> list[np.ndarray]:
        """Positions of about the m best eligible rows by the index's own scores, for each query."""
        positions_N = self.positions(view)
        mask_N = None
        if len(eligible) < len(self):
            chosen = np.zeros(len(view) + 1, bool)
            chosen[eligible] = True  # The last entry stays False: -1 points at it.
            mask_N = chosen[positions_N]
        _, entries_QM = self.kind.search(np.float32(1 if largest else -1) * queries_QD, m, mask_N)
        found = [positions_N[entries[entries >= 0]] for entries in entries_QM]
        if self.metric == "cosine":
            return found
        # The error of an inner product grows with the norm, so rows with the largest norms are always candidates.
        heaviest = self._heaviest(view, eligible, m)
        return [np.union1d(positions, heaviest) for positions in found]

    def _heaviest(self, view: View, eligible: np.ndarray, m: int) -> np.ndarray:
        key = ("heaviest", m)
        if len(eligible) == len(self) and key in self._seen:
            known: np.ndarray = self._seen[key]
            return known
        norms = view.norms[eligible]
        heaviest = eligible[np.argpartition(-norms, min(m, len(norms)) - 1)[:m]]
        if len(eligible) == len(self):
            self._seen[key] = heaviest
        return heaviest

    def _add(self, view: View, positions: np.ndarray) -> None:
        for block, units_PD in view.scan(positions):
            self.kind.add(units_PD * view.norms[block, None] if self.metric != "cosine" else units_PD)
        if len(positions):
            self.entry_rows = np.concatenate([self.entry_rows, view.stored.numbers[positions]])
            self.entry_norms = np.concatenate([self.entry_norms, view.norms[positions]])
            self._seen = {}


def _no_view() -> None:
    return None


def fetch(factor: float, k: int) -> int:
    """Number of candidates to fetch for the k best."""
    return int(np.ceil(k * factor)) + 8


def _rescored(
    view: View, queries_QD: np.ndarray, k: int, metric: str, largest: bool, candidates_Q: list[np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The k best of each query's candidates, rescored with the stored rows."""
    found = []
    for candidates, scores in zip(candidates_Q, scan_pairs(view, queries_QD, candidates_Q), strict=True):
        if metric != "cosine":
            scores = scores * view.norms[candidates]
        top = best(scores, k, lambda chosen, of=candidates: view.ids_at(of[chosen]), largest)  # type: ignore[misc]
        found.append((candidates[top], scores[top]))
    return found


def collection_folder(view: View) -> Path:
    """Absolute path of the view's collection folder."""
    return view.store.path.resolve() / COLLECTIONS / view.collection
