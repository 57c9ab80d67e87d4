"""Conjugate gradients against a dense solve in float64."""

import numpy as np
import pytest

from gradstore.engine.searching.conjugate import solve

D = 40


def system(eigenvalues: np.ndarray, seed: int = 0) -> np.ndarray:
    """A symmetric matrix with these eigenvalues, in random directions."""
    turned_DD = np.linalg.qr(np.random.default_rng(seed).standard_normal((D, D)))[0]
    matrix_DD: np.ndarray = turned_DD * eigenvalues @ turned_DD.T
    return matrix_DD


def near(matrix_DD: np.ndarray) -> np.ndarray:
    """The inverse of a matrix that is right to some 30 %, as that of a sample is."""
    root_DD = np.linalg.cholesky(matrix_DD)
    noise_DD = np.random.default_rng(1).standard_normal((D, D)) * 0.3 / np.sqrt(D)
    inverse_DD: np.ndarray = np.linalg.inv(root_DD @ (np.eye(D) + (noise_DD + noise_DD.T) / 2) @ root_DD.T)
    return (inverse_DD + inverse_DD.T) / 2


@pytest.mark.parametrize(
    "eigenvalues",
    [np.ones(D), np.geomspace(1, 1e6, D), np.r_[np.full(3, 1e8), np.ones(D - 3)], np.r_[np.full(D - 1, 1e4), 1e-3]],
    ids=["identity", "spread", "few strong", "one weak"],
)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-8])
def test_the_error_is_within_the_tolerance(eigenvalues: np.ndarray, tolerance: float) -> None:
    """A small residual says little where the spectrum is wide: what counts is the error of the solution, in length and
    in the norm of A, for each query on its own, large or small."""
    matrix_DD = system(eigenvalues)
    inverse_DD = near(matrix_DD)
    queries_QD = np.random.default_rng(2).standard_normal((3, D)) * np.array([[1.0], [1e-9], [1e9]])
    found = solve(lambda v: v @ matrix_DD, lambda v: v @ inverse_DD, queries_QD, tolerance, 1000)
    assert found.solved
    for got_D, query_D in zip(found.vectors_QD, queries_QD, strict=True):
        expected_D = np.linalg.solve(matrix_DD, query_D)
        missed_D = got_D - expected_D
        assert np.linalg.norm(missed_D) <= 3 * tolerance * np.linalg.norm(expected_D) + 1e-15
        assert missed_D @ matrix_DD @ missed_D <= (3 * tolerance) ** 2 * (expected_D @ query_D)


def test_products_are_counted_and_limited() -> None:
    """The limit is what keeps a system that does not converge from costing more than its matrix."""
    matrix_DD, products = system(np.geomspace(1, 1e8, D)), []

    def times(vectors_QD: np.ndarray) -> np.ndarray:
        products.append(len(vectors_QD))
        return vectors_QD @ matrix_DD

    found = solve(times, lambda v: v, np.ones((2, D)), 1e-10, 9)
    assert not found.solved
    assert sum(products) == found.n_products <= 10
    assert found.error > 1e-10


def test_rounding_that_keeps_the_tolerance_out_of_reach_is_seen() -> None:
    """Updated residuals shrink whatever happens; believed, they would call a wrong answer solved."""
    matrix_DD = system(np.geomspace(1, 1e6, D))

    def times(vectors_QD: np.ndarray) -> np.ndarray:
        return (vectors_QD.astype(np.float32) @ matrix_DD.astype(np.float32)).astype(np.float64)

    inverse_DD = near(matrix_DD)
    found = solve(times, lambda v: v @ inverse_DD, np.ones((1, D)), 1e-9, 10_000)
    assert not found.solved
    assert found.n_products < 1000


def test_zeros() -> None:
    """A query of zeros has the solution zero; a matrix of zeros must end as unsolved."""
    zero = solve(lambda v: v, lambda v: v, np.zeros((2, D)), 1e-6, 10)
    assert zero.solved
    assert not zero.vectors_QD.any()
    assert not solve(lambda v: 0 * v, lambda v: v, np.ones((1, D)), 1e-6, 200).solved
