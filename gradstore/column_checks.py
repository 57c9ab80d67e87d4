"""Check of a column's values when it is read: what points into something must point inside it.

Checksums tell that bytes are those that were written, not who wrote them. One pass over the values in memory takes far
less time than reading them.
"""

from collections.abc import Callable

import numpy as np

from gradstore.errors import DamagedError
from gradstore.layout import RowArray
from gradstore.manifest import Manifest
from gradstore.state import State


def check_column(array: RowArray, column: np.ndarray, manifest: Manifest, where: str) -> None:
    """DamagedError, with the first wrong row and its value, for a value that the array cannot have.

    column: its published entries. where: folder of the generation.
    """
    if not len(column) or array.name not in _CHECKS:
        return
    is_right, expected = _CHECKS[array.name](manifest)
    if array.dtype.kind in "iu":
        # One pass for both bounds: as unsigned numbers negative ones are larger than any positive one.
        unsigned = column.view(array.dtype.str.replace("i", "u"))
        if unsigned.max() <= is_right:
            return
        wrong = unsigned > is_right
    else:
        wrong = ~is_right(column)
    if wrong.any():
        row = int(np.argmax(wrong))
        file = f"{where}/{array.name}/{array.chunk_file(row // array.chunk_rows)}"
        raise DamagedError(f"{file}: damaged: row {row} has {array.name} {column[row]}, expected {expected}")


def _most(most: Callable[[Manifest], int], expected: str) -> Callable[[Manifest], tuple]:
    """Check of whole numbers from 0 to `most`."""
    return lambda manifest: (most(manifest), expected.format(most(manifest)))


def _real(is_right: Callable[[np.ndarray], np.ndarray], expected: str) -> Callable[[Manifest], tuple]:
    return lambda manifest: (is_right, expected)


def _size(column: np.ndarray) -> np.ndarray:
    return (column >= 0) & (column < np.inf)


def _scale(column: np.ndarray) -> np.ndarray:
    # 1 / |codes|, and codes are whole numbers or a unit row.
    return (column >= 0) & (column <= 2)


_CHECKS: dict[str, Callable[[Manifest], tuple]] = {
    "scale": _real(_scale, "a number from 0 to 2"),
    "norm": _real(_size, "a finite number of at least 0"),
    "step": _most(lambda _: 2**63 - 1, "a step of at least 0"),
    "problem": _most(lambda manifest: manifest.n_problems - 1, "a problem from 0 to {}"),
    "state": _most(lambda _: max(State), "a state from 0 to {}"),
    "pass_rate": _real(lambda c: ((c >= 0) & (c <= 1)) | np.isnan(c), "a share from 0 to 1, or nan"),
    "n_rollouts": _most(lambda _: 2**31 - 1, "a count of at least 0"),
    "reason": _most(lambda manifest: len(manifest.reasons) - 1, "a reason from 0 to {}"),
    "ess": _real(lambda c: (c >= 0) | np.isnan(c), "a number of at least 0, or nan"),
}
