"""Apportionment: turns shares into integer numbers of picks that sum to the requested total.

A parts of a mixture, S sources.
"""

import numpy as np


def apportion(n: int, shares: np.ndarray) -> np.ndarray:
    """Split n in proportion to shares: int64 of the shape of shares, sum n.

    Largest remainders (Hamilton's method): each count is rounded down, and the picks left over go to the largest
    remainders, ties to the earlier. shares: float64, not negative, not all zero.
    """
    exact = n * np.asarray(shares, np.float64) / np.sum(shares)
    counts = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(-np.round(exact - counts, 9), kind="stable")
    counts[order[: n - int(counts.sum())]] += 1
    return counts


def cross(rows_A: np.ndarray, columns_S: np.ndarray) -> np.ndarray:
    """Integer table with the given row and column sums and proportional cells, rounded up or down; int64 [A, S].

    rows_A, columns_S: int64 with the same sum n. Exact cells are rows_A x columns_S / n. The rounded table is a vertex
    of the transport polytope between their floors and ceilings, which always exists (controlled rounding). Among these,
    it rounds up the cells with the largest sum of remainders.
    """
    from scipy.optimize import linprog  # type: ignore[import-untyped]

    n_parts, n_sources = len(rows_A), len(columns_S)
    exact = np.outer(rows_A, columns_S) / max(int(np.sum(rows_A)), 1)
    low = np.floor(exact + 1e-9)
    of_row = np.kron(np.eye(n_parts), np.ones(n_sources))
    of_column = np.kron(np.ones(n_parts), np.eye(n_sources))
    left = np.concatenate([rows_A - low.sum(axis=1), columns_S - low.sum(axis=0)])
    room = np.ceil(exact - 1e-9) - low
    found = linprog(
        -(exact - low).ravel(),
        A_eq=np.vstack([of_row, of_column]),
        b_eq=left,
        bounds=[(0, cell) for cell in room.ravel()],
        method="highs-ds",
    )
    return (low + np.rint(found.x).reshape(low.shape)).astype(np.int64)
