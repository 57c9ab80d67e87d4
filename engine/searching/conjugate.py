"""Preconditioned conjugate gradients for a few symmetric positive definite systems A u = b at once.

Hestenes and Stiefel 1952, with a preconditioner P near A (Golub and Van Loan, Matrix Computations, 11.5). Each step
multiplies A with one vector per system that is not solved yet. With P^-1 r for the residual r = b - A u, which is the
error of u but for the error of P, a system is solved when

    |P^-1 r| <= tolerance |u|    and    r^T P^-1 r <= tolerance^2 u^T A u

The first bounds the error of u in length, the second in the norm of A: where A is a second moment of rows, that is at
least the root mean square error of the rows' products with u. Residuals are updated, so rounding adds up in them: the
end is decided by one that is computed anew.

Q systems, D unknowns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Times = Callable[[np.ndarray], np.ndarray]
"""Vectors float64 [Q, D] -> a symmetric matrix times each, float64 [Q, D]."""


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """What the steps came to."""

    vectors_QD: np.ndarray
    """u of each system, float64."""
    solved: bool
    """Whether every system reached the tolerance."""
    n_products: int
    """Products of A with one vector that were made."""
    error: float
    """Largest |P^-1 r| / |u| of the systems."""


def solve(times: Times, roughly: Times, queries_QD: np.ndarray, tolerance: float, most_products: int) -> Solution:
    """Solve A u = b for each query b, float64 [Q, D], with `times` as A and `roughly` as P^-1.

    Ends unsolved after about most_products products, or where a residual computed anew shows that rounding keeps the
    tolerance out of reach. The same arguments give the same bytes.
    """
    vectors_QD, residuals_QD, errors_Q = np.zeros_like(queries_QD), queries_QD.copy(), np.ones(len(queries_QD))
    open_Q, n_products, error = np.arange(len(queries_QD)), 0, np.inf
    while True:
        wanted_Q, left = tolerance / errors_Q[open_Q], most_products - n_products - len(open_Q)
        corrections_QD, n_made = _steps(times, roughly, residuals_QD[open_Q], wanted_Q, left)
        vectors_QD[open_Q] += corrections_QD
        n_products += n_made
        if not np.isfinite(vectors_QD).all():  # rounding made A or P indefinite
            return Solution(vectors_QD, False, n_products, np.inf)
        products_QD = times(vectors_QD[open_Q])
        n_products += len(open_Q)
        residuals_QD[open_Q] = queries_QD[open_Q] - products_QD
        errors_Q[open_Q] = _errors(roughly(residuals_QD[open_Q]), residuals_QD[open_Q], vectors_QD[open_Q], products_QD)
        open_Q = np.flatnonzero(errors_Q > tolerance)
        before, error = error, float(errors_Q.max(initial=0.0))
        if not len(open_Q) or n_products >= most_products or error > before / 2:
            return Solution(vectors_QD, not len(open_Q), n_products, error)


def _steps(
    times: Times, roughly: Times, queries_QD: np.ndarray, tolerance_Q: np.ndarray, most_products: int
) -> tuple[np.ndarray, int]:
    """Conjugate gradients from zero: solutions [Q, D], and the number of products made."""
    vectors_QD, residuals_QD = np.zeros_like(queries_QD), queries_QD.copy()
    directions_QD = roughly(residuals_QD)
    open_Q, n_products = np.flatnonzero(directions_QD.any(axis=1)), 0
    directions_QD = directions_QD[open_Q]
    sizes_Q = _dots(residuals_QD[open_Q], directions_QD)
    while len(open_Q) and n_products + len(open_Q) <= most_products:
        products_QD = times(directions_QD)
        n_products += len(open_Q)
        with np.errstate(divide="ignore", invalid="ignore"):
            strides_Q1 = (sizes_Q / _dots(directions_QD, products_QD))[:, None]
            vectors_QD[open_Q] += strides_Q1 * directions_QD
            residuals_QD[open_Q] -= strides_Q1 * products_QD
        here_QD = residuals_QD[open_Q]
        nears_QD = roughly(here_QD)
        before_Q, sizes_Q = sizes_Q, _dots(here_QD, nears_QD)
        errors_Q = _errors(nears_QD, here_QD, vectors_QD[open_Q], queries_QD[open_Q] - here_QD)
        left = (errors_Q > tolerance_Q[open_Q]) & np.isfinite(errors_Q)
        open_Q, before_Q, sizes_Q = open_Q[left], before_Q[left], sizes_Q[left]
        directions_QD = nears_QD[left] + (sizes_Q / before_Q)[:, None] * directions_QD[left]
    return vectors_QD, n_products


def _errors(
    nears_QD: np.ndarray, residuals_QD: np.ndarray, vectors_QD: np.ndarray, products_QD: np.ndarray
) -> np.ndarray:
    """The larger of both relative errors of each system, [Q]; infinite where A or P shows that it is not definite.

    nears: P^-1 r; products: A u.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        in_length_Q = np.linalg.norm(nears_QD, axis=1) / np.linalg.norm(vectors_QD, axis=1)
        in_energy_Q = np.sqrt(_dots(residuals_QD, nears_QD) / _dots(vectors_QD, products_QD))
    errors_Q = np.nan_to_num(np.maximum(in_length_Q, in_energy_Q), nan=np.inf)
    return np.where(nears_QD.any(axis=1), errors_Q, 0.0)


def _dots(some_QD: np.ndarray, others_QD: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.einsum("qd,qd->q", some_QD, others_QD)
    return found
