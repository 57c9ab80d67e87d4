"""Layer contributions: a problem's score with a target, split into one term per layer."""

import numpy as np

from gradstore import View
from gradstore.engine.searching.fisher import DAMPING
from gradstore.engine.searching.query import Metric, query_vectors
from gradstore.engine.searching.targets import Target
from gradstore.errors import RequestError


def layer_contributions(
    view: View, positions: np.ndarray, query: Target | np.ndarray, metric: Metric = "cosine", damping: float = DAMPING
) -> np.ndarray:
    """Split the scores at the positions into one term per layer; float32 [K, layers], each row sums to the score.

    A layer has a range of sketch dimensions (`Store.layers`); its term is the inner product over that range. GradAlign
    records the layers with the largest terms as `h_sorted`.
    """
    query_D = query_vectors(view, [query], metric, damping)[0]
    if view.n_bases > 1:
        newest = view.n_bases - 1
        if (view.bases[positions] != newest).any():
            raise RequestError(
                f"{view.collection!r}: terms of layers are those of the newest basis, and some of these rows are in "
                "older ones: collect them anew"
            )
        query_D = query_D[newest * view.dim :]
    products_KD = view.rows(positions) * query_D
    if metric != "cosine":
        products_KD *= view.norms[positions, None]
    starts = [start for _, start, _ in view.store.layers]
    return np.add.reduceat(products_KD, starts, axis=1)
