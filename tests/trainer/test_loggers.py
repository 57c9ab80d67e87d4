"""Loggers: what each library's client is told, and that a resumed run goes on in the library."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gradstore import RequestError
from gradstore.trainer.local.metrics import Metrics
from gradstore.trainer.loggers import LOGGERS, Several, load_logger, log_of


class Client:
    """Records every call that it is made, and returns itself."""

    def __init__(self, calls: list[Any], name: str = "") -> None:
        self._calls, self._name = calls, name

    def __getattr__(self, name: str) -> Any:
        return Client(self._calls, f"{self._name}.{name}".lstrip("."))

    def __call__(self, *given: Any, **named: Any) -> Any:
        self._calls.append((self._name, given, named))
        return self


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of fake wandb, mlflow and trackio; no environment variable names a project."""
    made: list[Any] = []
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    run = Client(made, "run")

    def init(**named: Any) -> Any:
        made.append(("init", (), named))
        return run

    wandb, trackio, mlflow = ModuleType("wandb"), ModuleType("trackio"), ModuleType("mlflow")
    wandb.init = trackio.init = init  # type: ignore[attr-defined]

    class MlflowClient(Client):
        def __init__(self) -> None:
            super().__init__(made)

        def get_experiment_by_name(self, name: str) -> None:
            made.append(("get_experiment_by_name", (name,), {}))

        def create_experiment(self, name: str) -> str:
            return f"number of {name}"

        def create_run(self, experiment: str, run_name: str) -> Any:
            made.append(("create_run", (experiment, run_name), {}))
            return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    mlflow.MlflowClient = MlflowClient  # type: ignore[attr-defined]
    mlflow.entities = SimpleNamespace(Metric=lambda *given: given)  # type: ignore[attr-defined]
    for name, module in {"wandb": wandb, "trackio": trackio, "mlflow": mlflow}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio(calls: list[Any], tmp_path: Path, name: str) -> None:
    for step in (3, 4):  # the second time the run is resumed
        logger = load_logger(name, tmp_path / "run", step)
        logger.log({"round/live": 0.5, "step/reward": 1.0}, step)
        logger.close()
    begun = [named for called, _, named in calls if called == "init"]
    assert begun[0] == begun[1]
    assert begun[0]["project"] == "gradstore"
    assert begun[0]["resume"] == "allow"
    assert [call for call in calls if call[0] == "run.log"] == [
        ("run.log", ({"round/live": 0.5, "step/reward": 1.0},), {"step": step}) for step in (3, 4)
    ]
    assert len([call for call in calls if call[0] == "run.finish"]) == 2


def test_mlflow(calls: list[Any], tmp_path: Path) -> None:
    for step in (3, 4):
        logger = load_logger("mlflow", tmp_path / "run", step)
        logger.log({"round/live": 0.5}, step)
        logger.close()
    assert [given for called, given, _ in calls if called == "create_run"] == [("number of gradstore", "run")]
    batches = [given for called, given, _ in calls if called == "log_batch"]
    assert [(run, [(metric[0], metric[1], metric[3]) for metric in metrics]) for run, metrics in batches] == [
        ("r1", [("round/live", 0.5, step)]) for step in (3, 4)
    ]
    assert [given for called, given, _ in calls if called == "set_terminated"] == [("r1",)] * 2


class Own:
    """A logger of the user's."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []
        self.closed = 0

    def log(self, values: Any, step: int) -> None:
        self.logged.append((dict(values), step))

    def close(self) -> None:
        self.closed += 1


def test_metrics_reach_every_logger(calls: list[Any], tmp_path: Path) -> None:
    own = Own()
    metrics = Metrics(tmp_path, 0, ["wandb", "trackio"], [own])
    metrics.add("step", 1, {"reward": 0.25, "grad_norm": float("nan"), "note": "kept in the file alone"})
    metrics.close()
    assert own.logged == [({"step/reward": 0.25}, 1)]
    assert own.closed == 1
    assert [given[0] for called, given, _ in calls if called == "run.log"] == [{"step/reward": 0.25}] * 2
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["note"] == "kept in the file alone"


def test_a_function_is_a_logger_too() -> None:
    own, seen = Own(), list[Any]()
    log_of(own)({"a": 1.0}, 2)
    log_of(lambda values, step: seen.append((values, step)))({"a": 1.0}, 2)
    assert own.logged == seen == [({"a": 1.0}, 2)]
    Several([own, own]).close()
    assert own.closed == 2


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_library_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RequestError, match=f"logging to {name} needs it installed: pip install {name}"):
        load_logger(name, tmp_path)
    with pytest.raises(RequestError, match="did you mean 'mlflow'"):
        load_logger("mflow", tmp_path)


def _installed(*names: str) -> Any:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


@_installed("mlflow")
def test_mlflows_file_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "tracked").as_uri())
    for step in (1, 2):
        logger = load_logger("mlflow", tmp_path / "run", step)
        logger.log({"round/live": step / 4}, step)
        logger.close()
    client = mlflow.MlflowClient()
    run = json.loads((tmp_path / "run" / "loggers.json").read_text())["mlflow"]
    kept = client.get_metric_history(run, "round/live")
    assert [(one.step, one.value) for one in kept] == [(1, 0.25), (2, 0.5)]
    assert client.get_run(run).info.status == "FINISHED"


@_installed("wandb")
def test_wandb_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    folder.mkdir()
    logger = load_logger("wandb", folder)
    logger.log({"round/live": 0.5}, 1)
    logger.close()
    assert list(folder.rglob("*.wandb"))


@_installed("trackio")
def test_trackio_locally(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tracked"))
    logger = load_logger("trackio", tmp_path / "run")
    logger.log({"round/live": 0.5}, 1)
    logger.close()
    assert any((tmp_path / "tracked").rglob("*.db"))
