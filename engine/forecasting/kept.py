"""What a forecast keeps for the next one of the same pool, so that each costs what was added since the last.

A round forecasts its candidates again after every stage. Rows of earlier steps, the pairs among them, the candidates'
numbers and sources stay the same meanwhile; so do the statistics of probes read before, and the calibration of a
candidate while its row and the probes are the same. Every value is kept with what it was computed from. A forecast
from nothing, as after an interruption, gives the same numbers.

P candidates, N problems of the pool.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from gradstore import Store, View

_Value = TypeVar("_Value")
_every: WeakKeyDictionary[Store, dict[str, "Kept"]] = WeakKeyDictionary()


class Kept:
    """Values of one pool by name; each counts only while its key is the same."""

    def __init__(self) -> None:
        self._values: dict[Hashable, tuple[Any, Any]] = {}

    @classmethod
    def of(cls, store: Store, pool: str) -> "Kept":
        """What is kept for a pool of an open store."""
        return _every.setdefault(store, {}).setdefault(pool, cls())

    def get(self, name: Hashable, key: Any, make: Callable[[], _Value]) -> _Value:
        """The value of this name if it was made for this key; otherwise a new one, which replaces it."""
        found = self._values.get(name)
        if found is None or found[0] != key:
            found = self._values[name] = key, make()
        value: _Value = found[1]
        return value

    def last(self, name: Hashable) -> Any:
        """The value that was kept last under a name, whatever its key; None without one."""
        return self._values.get(name, (None, None))[1]

    def put(self, name: Hashable, value: Any) -> None:
        """Keep a value whose owner knows what it was made from."""
        self._values[name] = None, value

    def keep_only(self, kind: str, names: set[Hashable]) -> None:
        """Drop the values of names (kind, ...) that are not among these."""
        for name in [own for own in self._values if isinstance(own, tuple) and own[0] == kind and own not in names]:
            del self._values[name]


class Places:
    """Where the problems of a pool stand among the candidates of a round."""

    def __init__(self, view: View, ids: Sequence[str]) -> None:
        self.numbers = view.numbers_of(ids)
        """Problem number of each candidate, int64 [P]; -1 if the pool does not have it."""
        self._place_N = np.full(view.n_problems + 1, -1)  # the last one for the number -1
        known = np.flatnonzero(self.numbers >= 0)
        self._place_N[self.numbers[known]] = known

    def __len__(self) -> int:
        return len(self.numbers)

    @classmethod
    def of(cls, view: View, ids: list[str]) -> "Places":
        """Places of candidates in the view's pool; those made before while neither list nor pool changed."""
        kept = Kept.of(view.store, view.collection)
        return kept.get("places", (ids, view.stored.base, view.n_problems), lambda: cls(view, ids))

    def column(self, values: np.ndarray, missing: float) -> np.ndarray:
        """The candidates' entries of a column by problem number; `missing` for those that the pool does not have."""
        found = values[np.maximum(self.numbers, 0)] if len(values) else np.full(len(self), missing)
        found[self.numbers < 0] = missing
        return found

    def of_numbers(self, numbers: np.ndarray) -> np.ndarray:
        """Place of each problem among the candidates, int64; -1 for others."""
        places: np.ndarray = self._place_N[numbers]
        return places
