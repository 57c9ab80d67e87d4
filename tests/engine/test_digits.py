"""The shortest decimal of a float32 is what numpy prints of it, one value at a time."""

import numpy as np
import pytest

from gradstore.engine.rollouts.digits import shortest


def _values(name: str) -> np.ndarray:
    random = np.random.default_rng(0)
    if name == "log-probabilities":
        return -random.exponential(scale=10.0 ** random.uniform(-9, 2, 20_000)).astype(np.float32)
    if name == "all bits":
        return random.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    powers = np.array([f"{sign}{digit}e{k}" for sign in ("", "-") for digit in (1, 2, 9.5) for k in range(-45, 39)])
    near = np.concatenate([2.0 ** np.arange(-149, 128), powers[np.abs(powers.astype(float)) < 3e38].astype(float)])
    near = near.astype(np.float32)
    up, down = np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))
    return np.concatenate([near, up, down, np.array([0.0, -0.0], np.float32)])


@pytest.mark.parametrize("name", ["log-probabilities", "all bits", "near powers"])
def test_the_shortest_decimal_is_the_one_that_numpy_prints(name: str) -> None:
    values_T = _values(name)
    with np.errstate(invalid="ignore"):  # signalling nan
        found_T = shortest(values_T)
    finite = np.isfinite(values_T)
    np.testing.assert_array_equal(found_T[~finite], values_T[~finite])
    assert found_T[finite].astype(np.float32).tobytes() == values_T[finite].tobytes(), "also the sign of zero"
    assert found_T[finite].tolist() == [float(str(value)) for value in values_T[finite]]
