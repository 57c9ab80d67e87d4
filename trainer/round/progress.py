"""Loggers for a round's scalars, in addition to the store: any callable of (values by name, step)."""

from collections.abc import Callable, Mapping
from pathlib import Path

from gradstore.errors import RequestError

Logger = Callable[[Mapping[str, float], int], None]
"""Callable({name: value}, the policy's step)."""


def tensorboard(folder: str | Path) -> Logger:
    """A logger that writes TensorBoard scalars to a folder; RequestError when tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RequestError("logging to TensorBoard needs the package tensorboard: pip install tensorboard") from None
    writer = SummaryWriter(str(folder))

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def to_each(*loggers: Logger) -> Logger:
    """A logger that passes all values to each of `loggers`."""

    def log(values: Mapping[str, float], step: int) -> None:
        for logger in loggers:
            logger(values, step)

    return log
