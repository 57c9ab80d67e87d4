"""State of a stored row: live (with a gradient), no signal, or failed."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np


class State(IntEnum):
    """State of a row. Only live rows are ranked; the others are counted and shown."""

    LIVE = 0
    """The row holds a gradient."""
    NO_SIGNAL = 1
    """All rewards were equal, so the gradient is exactly zero."""
    FAILED = 2
    """The gradient was not finite or could not be computed; the row keeps the reason."""


def states_of(finite_P: np.ndarray, signal_P: np.ndarray) -> tuple[list[State], list[str]]:
    """State of each row and the reason of a failed one, "" for the others. finite_P, signal_P: bool [P]."""
    passed = np.where(signal_P, State.LIVE, State.NO_SIGNAL)
    states = [State(value) for value in np.where(finite_P, passed, State.FAILED).tolist()]
    return states, ["the gradient is not finite" * (state is State.FAILED) for state in states]


def live_mask(states: Sequence[State]) -> np.ndarray:
    """True for live rows, bool [P]."""
    return np.array([state is State.LIVE for state in states], bool)
