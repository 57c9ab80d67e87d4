"""The actor of a pool of Ray workers (pool.py): one process with one function, which it applies to windows."""

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Make = Callable[[], Callable[..., Any]]
"""Runs once in each worker, and returns the function that the worker applies to a window's arguments. If the function
has an attribute `about`, its value must be the same in all workers."""


class PoolWorker:
    """The actor: one process with one function."""

    def __init__(self) -> None:
        self._function: Callable[..., Any] | None = None
        self._records: list[tuple[str, int, str]] = []

    def hello(self) -> tuple[str, int, str]:
        """(address of the machine, process id, version of gradstore)."""
        import ray

        logging.getLogger("gradstore").addHandler(_Keeping(self._records))
        return ray.util.get_node_ip_address(), os.getpid(), installed_version()

    def load(self, make: Make, threads: int, folder: str) -> tuple[Any, float, list[tuple[str, int, str]]]:
        """Make the function. threads: torch's. folder: the driver's working folder, for relative paths."""
        started = time.perf_counter()
        if Path(folder).is_dir():
            os.chdir(folder)
        self._function = make()
        if "torch" in sys.modules:  # else Ray's OMP_NUM_THREADS holds when it is imported
            limit_threads(threads)
        about = getattr(self._function, "about", None)
        return self._answer(about, started)

    def run(self, arguments: tuple[Any, ...]) -> tuple[Any, float, list[tuple[str, int, str]]]:
        """Apply the function. Arrays of the result are read-only for the driver: they lie in Ray's shared memory."""
        started = time.perf_counter()
        if self._function is None:
            raise RuntimeError("run before load")
        return self._answer(self._function(*arguments), started)

    def _answer(self, value: Any, started: float) -> tuple[Any, float, list[tuple[str, int, str]]]:
        """(value, seconds, log records)."""
        records, self._records[:] = list(self._records), []
        return value, time.perf_counter() - started, records


class _Keeping(logging.Handler):
    """Keeps the records of warnings, for the driver."""

    def __init__(self, records: list[tuple[str, int, str]]) -> None:
        super().__init__(logging.WARNING)
        self._kept = records

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append((record.name, record.levelno, record.getMessage()))


def limit_threads(threads: int) -> None:
    """Let torch use this many threads: the last bits of a CPU's results can depend on it."""
    import torch

    torch.set_num_threads(threads)


def installed_version() -> str:
    from importlib.metadata import version

    return version("gradstore")
