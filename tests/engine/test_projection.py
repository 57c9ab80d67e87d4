"""Random bases keep inner products in expectation, with the error a projection of that size must have."""

import numpy as np

from engine.sketches.projection import random_bases, random_projection

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
