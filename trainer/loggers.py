"""Loggers of scalars: TensorBoard, Weights & Biases, MLflow, trackio, or any object with `log` and `close`.

    log = load_logger("mlflow", Path("run"))
    log.log({"round/live": 0.9}, step)
    log.close()

Each writes through its library's own client, with the library's own settings (WANDB_PROJECT, MLFLOW_TRACKING_URI and so
on; the project is `gradstore` where they name none). A run that goes on continues its run in the library: the ids are
kept in the folder's loggers.json.
"""

import importlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gradstore.durable import write_text_file
from gradstore.errors import RequestError, check_known

KEPT = "loggers.json"
"""File of a run's folder with the ids of its runs in the libraries."""
PROJECT = "gradstore"


class Logger(Protocol):
    """Receives scalars by name."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values at a step, the number of training steps done. Several calls may have one step."""
        ...

    def close(self) -> None:
        """Write what is still to be written; called once, after the last `log`."""
        ...


Log = Logger | Callable[[Mapping[str, float], int], Any]
"""A logger, or its method `log` alone."""


def log_of(logger: Log) -> Callable[[Mapping[str, float], int], Any]:
    """The function that logs values at a step."""
    return logger.log if hasattr(logger, "log") else logger


class TensorBoard:
    """Event files in a folder; each call is on disk when it returns."""

    def __init__(self, folder: str | Path, purge_step: int | None = None) -> None:
        """purge_step: in a run that goes on, the first step that is logged anew; TensorBoard drops the old values from
        there on."""
        _library("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases. It takes no step twice: what a resumed run logs again is dropped there."""

    def __init__(self, folder: Path) -> None:
        wandb = _library("wandb")
        name = _kept(folder, "wandb", lambda: secrets.token_hex(4))
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = wandb.init(project=project, name=folder.name, id=name, resume="allow", dir=str(folder))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, by its client: a run that the caller has active stays active and untouched."""

    def __init__(self, folder: Path) -> None:
        mlflow = _library("mlflow", "mlflow-skinny")
        self._metric = mlflow.entities.Metric
        self._client = client = mlflow.MlflowClient()

        def begin() -> str:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = client.get_experiment_by_name(experiment)
            number = client.create_experiment(experiment) if found is None else found.experiment_id
            return str(client.create_run(number, run_name=folder.name).info.run_id)

        self._run = _kept(folder, "mlflow", begin)
        client.update_run(self._run, status="RUNNING")

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [self._metric(name, float(own), now, step) for name, own in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Trackio:
    """A run of trackio."""

    def __init__(self, folder: Path) -> None:
        trackio = _library("trackio")
        name = _kept(folder, "trackio", lambda: f"{folder.name}-{secrets.token_hex(4)}")
        self._run = trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=name, resume="allow")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Several:
    """Loggers as one. Values that are not finite are left out: not every library takes them."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = list(loggers)

    def log(self, values: Mapping[str, float], step: int) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for logger in self._loggers:
            logger.log(finite, step)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


LOGGERS: dict[str, Callable[[Path, int], Logger]] = {
    "tensorboard": lambda folder, step: TensorBoard(folder / "tensorboard", step + 1),
    "wandb": lambda folder, step: WandB(folder),
    "mlflow": lambda folder, step: MLflow(folder),
    "trackio": lambda folder, step: Trackio(folder),
}
"""Name -> logger of a run's folder, which goes on after a step."""


def load_logger(name: str, folder: str | Path, step: int = 0) -> Logger:
    """The logger of this name for a run in a folder; step: steps that the run has done.

    RequestError for an unknown name, and for a library that is not installed.
    """
    check_known("logger", name, LOGGERS)
    return LOGGERS[name](Path(folder), step)


def _library(name: str, distribution: str | None = None) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise RequestError(f"logging to {name} needs it installed: pip install {distribution or name}") from None


def _kept(folder: Path, name: str, make: Callable[[], str]) -> str:
    """The id that the folder keeps under a name; a new one the first time."""
    file = folder / KEPT
    known: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if name not in known:
        known[name] = make()
        folder.mkdir(parents=True, exist_ok=True)
        write_text_file(file, json.dumps(known))
    return known[name]
