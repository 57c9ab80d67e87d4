"""Float32 values as the float64 whose text is shortest, for JSON: 0.1 instead of 0.10000000149011612.

T values.
"""

import numpy as np

_POWERS = np.array([float(f"1e{k}") for k in range(23)])
"""Powers of ten that float64 holds exactly."""
_LEAST, _MOST = 1e-13, 1e6
"""Sizes whose digits can be tried with those powers: nine digits of a smaller value would need more, and a larger one
is not a fraction any more."""
_FEW, _DIGITS = 6, 9
"""Up to six digits, the decimal nearest to a float32 is the same with more zeros. Nine tell any two float32 apart."""


def shortest(values_T: np.ndarray) -> np.ndarray:
    """float64 [T]: of each float32 value a decimal number with the fewest digits that give the same float32 again.

    Six to nine digits are tried for all values at once: n = round(value * 10^k), and n / 10^k is the float64 nearest to
    that decimal, as both are exact.
    """
    values_T = np.asarray(values_T, np.float32)
    exact_T = values_T.astype(np.float64)
    found_T, sizes_T = exact_T.copy(), np.abs(exact_T)
    by_digits = (sizes_T >= _LEAST) & (sizes_T < _MOST)
    left = np.flatnonzero(by_digits)
    below = -np.floor(np.log10(sizes_T[left])).astype(np.int64)  # decimals before the first digit that counts
    for digits in range(_FEW, _DIGITS + 1):
        powers = _POWERS[np.clip(below + digits - 1, 0, len(_POWERS) - 1)]
        tried = np.rint(exact_T[left] * powers) / powers
        same = tried.astype(np.float32) == values_T[left]
        found_T[left[same]] = tried[same]
        left, below = left[~same], below[~same]
    others = ~by_digits & (sizes_T > 0) & np.isfinite(exact_T)
    for place in [*left.tolist(), *np.flatnonzero(others).tolist()]:
        found_T[place] = float(str(values_T[place]))
    return found_T
