"""FAISS indexes over a view. The first: IndexFlatIP, exact inner products of float32 rows."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from gradstore import View
from gradstore.errors import RequestError


@dataclass(frozen=True, slots=True, eq=False)
class FlatIndex:
    """The live rows of one view in a FAISS IndexFlatIP: unit rows for cosine, gradients for dot."""

    faiss_index: Any
    positions: np.ndarray
    """Place in the view of each indexed row, int64 [live]."""
    metric: str
    collection: str
    commit: int
    at: int | None

    @classmethod
    def build(cls, view: View, metric: str = "cosine") -> "FlatIndex":
        """Index every live row; 4 bytes x D a row. RequestError when FAISS is not installed."""
        faiss = _faiss()
        faiss_index = faiss.IndexFlatIP(view.dim)
        positions = np.flatnonzero(view.live)
        for block, units_PD in view.scan(positions):
            rows_PD = units_PD * view.norms[block, None] if metric == "dot" else units_PD
            faiss_index.add(np.ascontiguousarray(rows_PD))
        return cls(faiss_index, positions, metric, view.collection, view.commit, view.at)

    def search(
        self, view: View, query_D: np.ndarray, k: int, metric: str, largest: bool, eligible: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions and scores of the k best eligible rows, best first, ties among them by id.

        RequestError when the index was built from another view or for another metric.
        """
        built, asked = (
            (self.collection, self.commit, self.at, self.metric),
            (
                view.collection,
                view.commit,
                view.at,
                metric,
            ),
        )
        if built != asked:
            raise RequestError(f"the index was built for (collection, commit, at, metric) {built}, asked for {asked}")
        faiss = _faiss()
        k = min(k, len(eligible))
        if k == 0:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        parameters = None
        if len(eligible) < len(self.positions):
            chosen = np.searchsorted(self.positions, eligible)
            parameters = faiss.SearchParameters(sel=faiss.IDSelectorBatch(chosen))
        sign = np.float32(1 if largest else -1)
        scores, rows = self.faiss_index.search(sign * query_D[None], k, params=parameters)
        positions = self.positions[rows[0]]
        order = np.lexsort((view.ids[positions].astype(str), -scores[0]))
        return positions[order], sign * scores[0][order]


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError:
        raise RequestError("the flat index needs FAISS: pip install 'gradstore[cpu]' or 'gradstore[gpu]'") from None
    return faiss
