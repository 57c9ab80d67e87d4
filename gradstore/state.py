"""State of a stored row: live (with a gradient), no signal, or failed."""

from enum import IntEnum


class State(IntEnum):
    """State of a row. Only live rows are ranked; the others are counted and shown."""

    LIVE = 0
    """The row holds a gradient."""
    NO_SIGNAL = 1
    """All rewards were equal, so the gradient is exactly zero."""
    FAILED = 2
    """The gradient was not finite or could not be computed; the row keeps the reason."""
