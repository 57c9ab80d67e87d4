"""Metrics of a run, one JSON object per line; also given to loggers (trainer/loggers.py)."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradstore.durable import replace_file, writing
from gradstore.errors import RequestError
from gradstore.trainer.loggers import Logger, Several, load_logger

log = logging.getLogger(__name__)


class Metrics:
    """Appends to a folder's `metrics.jsonl` and passes the numbers on to loggers."""

    def __init__(
        self, folder: Path, step: int = 0, names: Sequence[str] | None = None, loggers: Sequence[Logger] = ()
    ) -> None:
        """step: the step from which a resumed run continues; rows of later steps are dropped. names: loggers by name;
        None: TensorBoard if it is installed. loggers: further ones, which `close` closes too."""
        self._path = folder / "metrics.jsonl"
        if self._path.exists():
            kept = [line for line in self._path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
            replace_file(self._path, b"".join(kept))
        found = [load_logger(name, folder, step) for name in names or ()]
        if names is None:
            try:
                found.append(load_logger("tensorboard", folder, step))
            except RequestError:
                log.info("TensorBoard is not installed: metrics go to %s alone", self._path)
        self._loggers = Several([*found, *loggers])

    def add(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Add one row. kind: what was measured, such as "step" or "round". step: training steps done."""
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        self._loggers.log(numbers, step)

    def close(self) -> None:
        self._loggers.close()


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # incomplete because of a kill
