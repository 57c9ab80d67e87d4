"""Metrics of a run, one JSON object per line; also written to TensorBoard if it is installed."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradstore.durable import replace_file, writing
from gradstore.errors import RequestError
from gradstore.trainer.round.progress import TensorBoard, tensorboard

log = logging.getLogger(__name__)


class Metrics:
    """Appends to a folder's `metrics.jsonl` and to TensorBoard event files in its subfolder `tensorboard`."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        """step: the step from which a resumed run continues; rows of later steps are dropped."""
        self._path = folder / "metrics.jsonl"
        if self._path.exists():
            kept = [line for line in self._path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
            replace_file(self._path, b"".join(kept))
        self._board: TensorBoard | None = None
        try:
            self._board = tensorboard(folder / "tensorboard", purge_step=step + 1)
        except RequestError:
            log.info("TensorBoard is not installed: metrics go to %s alone", self._path)

    def add(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Add one row. kind: what was measured, such as "step" or "round". step: training steps done."""
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._board is not None:
            numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
            self._board(numbers, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # incomplete because of a kill
