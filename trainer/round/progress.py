"""Loggers of scalars, in addition to the store: any callable of (values by name, step)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradstore.errors import RequestError

Logger = Callable[[Mapping[str, float], int], None]
"""Callable({name: value}, the policy's step)."""


class TensorBoard:
    """A logger that writes TensorBoard event files; each call is on disk when it returns."""

    def __init__(self, writer: Any) -> None:
        """writer: torch's SummaryWriter."""
        self._writer = writer

    def __call__(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def tensorboard(folder: str | Path, purge_step: int | None = None) -> TensorBoard:
    """A logger that writes TensorBoard scalars to a folder; RequestError when tensorboard is not installed.

    purge_step: in a resumed run, the first step that is logged anew; TensorBoard drops the old values from there on.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RequestError("logging to TensorBoard needs the package tensorboard: pip install tensorboard") from None
    return TensorBoard(SummaryWriter(str(folder), purge_step=purge_step))
