"""Queries for a store with several bases: one block of D dimensions per basis, concatenated.

Rows in different bases have no common dimensions, but every row approximates its gradient. Scores of rows in different
bases can therefore be ranked together, if the target is known in each basis. In a store with one basis a query is one
block, [D]. A block of NaN means that the query is unknown in that basis: rows in it get no score. A query of one block
in a store with several bases is in the newest one.

Q queries, D sketch dimensions of a block, W dimensions of a whole query, P problems of a view.
"""

import numpy as np

from gradstore import View
from gradstore.errors import RequestError


def laid_out(vectors: dict[int, np.ndarray], n_bases: int) -> np.ndarray:
    """Build a query from its vector per basis, float32 [n_bases * D]; NaN for a basis without a vector."""
    dim = len(next(iter(vectors.values())))
    blocks_BD = np.full((n_bases, dim), np.nan, np.float32)
    for basis, vector_D in vectors.items():
        blocks_BD[basis] = vector_D
    return blocks_BD.ravel()


def blocks_of(queries_QW: np.ndarray, dim: int, n_bases: int) -> np.ndarray:
    """Split queries by basis, float [bases, Q, D]; RequestError if their width fits neither one basis nor all."""
    n_queries, width = queries_QW.shape
    if width == n_bases * dim:
        return queries_QW.reshape(n_queries, n_bases, dim).transpose(1, 0, 2)
    if width != dim:
        several = f", or {n_bases * dim} for its {n_bases} bases" if n_bases > 1 else ""
        raise RequestError(f"the query has shape ({width},), the store holds rows of {dim} dimensions{several}")
    blocks_BQD = np.full((n_bases, n_queries, dim), np.nan, queries_QW.dtype)
    blocks_BQD[-1] = queries_QW
    return blocks_BQD


def lengths_of(queries_QW: np.ndarray, dim: int) -> np.ndarray:
    """Length of each block, float64 [Q, blocks]; NaN for an unknown block."""
    blocks_QBD = queries_QW.reshape(len(queries_QW), -1, dim).astype(np.float64)
    lengths_QB: np.ndarray = np.sqrt((blocks_QBD * blocks_QBD).sum(axis=2))
    return lengths_QB


def scaled(queries_QW: np.ndarray, lengths_QB: np.ndarray) -> np.ndarray:
    """Divide each block of the queries by its length, float32; blocks of length zero stay unchanged."""
    n_queries, n_blocks = lengths_QB.shape
    blocks_QBD = queries_QW.reshape(n_queries, n_blocks, -1)
    divided_QBD = np.empty(blocks_QBD.shape, np.float32)
    np.divide(blocks_QBD, np.where(lengths_QB == 0, 1.0, lengths_QB)[..., None], out=divided_QBD, casting="same_kind")
    return divided_QBD.reshape(queries_QW.shape)


def lengths_at(view: View, queries_QW: np.ndarray) -> np.ndarray:
    """Length of each query in the basis of each row of the view, float64 [Q, P]; NaN if unknown in that basis."""
    lengths_BQ = np.linalg.norm(blocks_of(queries_QW, view.dim, view.n_bases).astype(np.float64), axis=2)
    return lengths_BQ.T[:, view.bases]


def only_basis(view: View, what: str) -> int:
    """The basis of the view's live rows; RequestError if they are in several bases."""
    if len(view.live_bases) > 1:
        raise RequestError(
            f"{what} compares rows with each other, and those of {view.collection!r} are in bases "
            f"{', '.join(map(str, view.live_bases))}: collect the older ones anew"
        )
    return view.live_bases[0] if view.live_bases else view.n_bases - 1
