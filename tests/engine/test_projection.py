"""Random bases keep inner products in expectation, with the error a projection of that size must have."""

import numpy as np

from gradstore.engine.sketches.projection import LayerBasis, beside, fitted_projection, random_bases, random_projection

SHAPES = [("attention", 24, 40), ("narrow", 5, 40), ("head", 40, 24)]


def project(gradients: list[np.ndarray], rank: int, seed: int) -> np.ndarray:
    parts = []
    for basis, gradient_OI in zip(random_bases(SHAPES, rank, seed), gradients, strict=True):
        rows_RI = gradient_OI if basis.left_OR is None else basis.left_OR.T @ gradient_OI
        parts.append((rows_RI if basis.right_IR is None else rows_RI @ basis.right_IR).ravel())
    return np.concatenate(parts)


def test_inner_products_are_kept_in_expectation_for_every_shape() -> None:
    """A scale that depends on a layer's shape would weigh attention against MLP by accident."""
    random = np.random.default_rng(0)
    for only in range(len(SHAPES)):
        a = [random.normal(size=shape[1:]) * (i == only) for i, shape in enumerate(SHAPES)]
        b = [x + 0.5 * random.normal(size=x.shape) * (i == only) for i, x in enumerate(a)]
        exact = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
        found = np.array([project(a, 8, seed) @ project(b, 8, seed) for seed in range(400)])
        standard_error = found.std() / np.sqrt(len(found))
        assert abs(found.mean() - exact) < 4 * standard_error
        assert standard_error < 0.05 * exact


def test_bases_depend_on_seed_and_name_alone() -> None:
    """A basis that changes between runs or with the layer list makes stored rows incomparable."""
    one, again = random_projection(SHAPES, 8, 0), random_projection(SHAPES, 8, 0)
    assert one.digest() == again.digest() != random_projection(SHAPES, 8, 1).digest()
    alone = random_bases(SHAPES[2:], 8, 0)[0]
    assert np.array_equal(alone.left_OR, one.layers[2].left_OR)
    assert not np.array_equal(one.layers[0].right_IR, one.layers[1].right_IR)


def test_the_signs_are_frozen() -> None:
    """A store outlives the libraries it was written with: the same seed must give the same basis for ever."""
    assert random_projection(SHAPES, 8, 0).digest() == "e4adaf64998a4ac3"


def test_a_narrow_side_is_kept() -> None:
    """Projecting 5 outputs to 8 would only add noise."""
    narrow = random_bases(SHAPES, 8, 0)[1]
    assert narrow.left_OR is None
    assert narrow.stop - narrow.start == 5 * 8


def test_random_directions_beside_fitted_ones_stand_for_the_rest() -> None:
    """A length over the fitted directions alone lacks a share that differs from gradient to gradient."""
    random = np.random.default_rng(0)
    a_OI = random.normal(size=(24, 40)).astype(np.float32)
    b_OI = a_OI + 0.5 * random.normal(size=a_OI.shape).astype(np.float32)
    left_OR, right_IR = (np.linalg.qr(random.normal(size=(n, r)))[0].astype(np.float32) for n, r in ((24, 5), (40, 7)))
    assert np.array_equal(beside(left_OR, 0, 0, "x", "left"), left_OR)
    found = []
    for seed in range(400):
        wide_OR, wide_IR = beside(left_OR, 3, seed, "x", "left"), beside(right_IR, 3, seed, "x", "right")
        assert np.array_equal(wide_OR[:, :5], left_OR)
        assert np.abs(left_OR.T @ wide_OR[:, 5:]).max() < 1e-5
        found.append([float(((wide_OR.T @ x @ wide_IR) * (wide_OR.T @ a_OI @ wide_IR)).sum()) for x in (a_OI, b_OI)])
    for dots, exact in zip(np.array(found).T, (float((a_OI * a_OI).sum()), float((a_OI * b_OI).sum())), strict=True):
        standard_error = dots.std() / np.sqrt(len(dots))
        assert abs(dots.mean() - exact) < 4 * standard_error
        assert standard_error < 0.05 * exact


def test_entries_of_fitted_directions_come_first() -> None:
    """A random direction's energy is that of all it stands for, but kept it says little of any of them."""
    bases = [LayerBasis("x", None, None, 0, 6)]
    energy_C, fitted_C = np.array([1.0, 9, 2, 8, 3, 7]), np.array([1, 0, 1, 0, 1, 0], bool)
    toward_C = np.array([1.0, 1, 3, 1, 4, 1])

    def fold(dim: int) -> list[list[float]]:
        made = fitted_projection(bases, energy_C, dim, None, toward_C, fitted_C)
        rows = np.zeros((made.dim, 6))
        rows[made.fold.to_M, made.fold.of_M] = made.fold.sign_M  # type: ignore[union-attr]
        return np.round(rows, 4).tolist()

    assert fold(2) == [[0, 0, 0, 0, 1, 0], np.round(np.array([1, 0, 3, 0, 0, 0]) / np.sqrt(10), 4).tolist()]
    assert fold(5) == [
        *np.eye(6)[[0, 1, 2, 4]].tolist(),
        np.round(np.array([0, 0, 0, 1, 0, 1]) / np.sqrt(2), 4).tolist(),
    ]
    assert fitted_projection(bases, energy_C, 3).fold.of_M.tolist() == [1, 3, 5]  # type: ignore[union-attr]
