"""Rollouts and stores made by workers: those of one process, byte for byte, also when workers or the driver are killed.

Files of a store are compared as they are, but for what counts publications (a manifest's commit number and checksum)
and names processes (the lock).
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gradstore
from benchmarks.contents import contents
from benchmarks.ray_kills import workers as workers_alive
from gradstore import RequestError
from gradstore.cli import main
from gradstore.engine.assessing.start import start_store
from gradstore.engine.assessing.stored_halves import collect_halves
from gradstore.engine.cluster.worker import limit_threads
from gradstore.engine.gradients.models import load_model, load_tokenizer
from gradstore.engine.rollouts import read_rollouts
from gradstore.engine.sketches import on_workers as sketching
from gradstore.engine.sketches.collector import collect
from gradstore.engine.sketches.spec import SketchSpec
from gradstore.trainer.sampling import on_workers as sampling
from gradstore.trainer.sampling.backends import load_backend
from gradstore.trainer.sampling.reward import Reward
from gradstore.trainer.sampling.rollout import rollout

pytestmark = pytest.mark.slow

SPEC = SketchSpec(basis="fitted", rank=4, dim=64, token_budget=64)
LENGTH = Reward("length", lambda record, text, j: len(text) % 3)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    """The reference computes with as many threads as a worker."""
    import torch

    before = torch.get_num_threads()
    limit_threads(1)
    yield
    limit_threads(before)


def _kill_once(workers: Any, killed: list[int]) -> Callable[[int], None]:
    """A progress callback that kills a worker when the first window is done."""

    def progress(n: int) -> None:
        alive = [cost.pid for cost in workers.costs if cost.windows]
        if alive and not killed:
            killed.append(alive[0])
            os.kill(alive[0], signal.SIGKILL)

    return progress


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, sums: list) -> Callable[..., Path]:
    """sampled(backend) -> the rollout file that it makes, with 4 problems to a window."""

    def run(backend: Any, **more: Any) -> Path:
        out = tmp_path_factory.mktemp("sampled") / "r.jsonl"
        rollout(sums, backend, LENGTH, out, n=3, max_new_tokens=6, chunk=4, seed=5, step=2, **more)
        return out

    return run


@pytest.fixture(scope="module")
def alone(sampled: Callable[..., Path], model_folder: Path) -> Path:
    return sampled(load_backend("transformers", model_folder, device="cpu"))


@pytest.mark.parametrize(("workers", "kill"), [(2, False), (4, True)])
def test_rollouts_are_those_of_one_process(
    ray_here: Any, sampled: Callable[..., Path], alone: Path, model_folder: Path, workers: int, kill: bool
) -> None:
    """The file and its settings, so that either kind of run can go on where the other stopped."""
    replica = sampling.Replica(backend="transformers", model=model_folder, options={"device": "cpu"})
    killed: list[int] = []
    with sampling.OnWorkers(replica, workers=workers) as backend:
        out = sampled(backend, progress=_kill_once(backend, killed) if kill else None)
        assert sum(cost.problems for cost in backend.costs) == 40
        assert sum(cost.lost for cost in backend.costs) == len(killed) == kill
        assert backend.generate([[1, 2]], 1, max_new_tokens=2, temperature=1.0, top_p=1.0, seed=0)[0][0].token_ids.size
    assert out.read_bytes() == alone.read_bytes()
    settings = [path.with_name("r.jsonl.settings.json").read_bytes() for path in (out, alone)]
    assert settings[0] == settings[1]


def _begin(path: Path, model_folder: Path, rollout_file: Path) -> tuple[Any, Any, Any]:
    model = load_model(model_folder, device="cpu")
    source = read_rollouts(rollout_file, tokenizer=load_tokenizer(model_folder))
    begun = start_store(path, model, source, SPEC, fit_problems=12, accept_coverage=0.0, widen=False)
    return begun, source, model


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, rollout_file: Path) -> Path:
    """The store that one process makes, with halves."""
    path = tmp_path_factory.mktemp("stored") / "s"
    begun, source, _ = _begin(path, model_folder, rollout_file)
    collect(begun.store, "pool", source, sketcher=begun.sketcher, step=0, known=begun.rows)
    collect_halves(begun.store, "pool", source, sketcher=begun.sketcher, step=0)
    return path


@pytest.mark.parametrize(("workers", "kill"), [(2, True), (4, False)])
def test_a_store_is_that_of_one_process(
    ray_here: Any, tmp_path: Path, stored: Path, model_folder: Path, rollout_file: Path, workers: int, kill: bool
) -> None:
    begun, source, _ = _begin(tmp_path / "s", model_folder, rollout_file)
    replica, killed, counted = sketching.Replica(model=str(model_folder), spec=SPEC, device="cpu"), [], []
    with sketching.OnWorkers(replica, begun.sketcher, workers=workers) as on_workers:
        stop = _kill_once(on_workers, killed) if kill else counted.append
        arguments = {"sketcher": begun.sketcher, "step": 0, "sketch_each": on_workers}
        report = collect(begun.store, "pool", source, known=begun.rows, progress=stop, **arguments)
        collect_halves(begun.store, "pool", source, **arguments)
        assert sum(cost.lost for cost in on_workers.costs) == len(killed) == kill
        assert sum(cost.windows for cost in on_workers.costs) >= 4
    assert report.collected == 40
    assert kill or sum(counted) == 40
    assert contents(tmp_path / "s") == contents(stored)
    assert gradstore.open(tmp_path / "s").verify().ok


def test_another_model_on_the_workers_is_refused(
    ray_here: Any, tmp_path: Path, model_folder: Path, rollout_file: Path
) -> None:
    """A folder of the same name with other weights: the fingerprint, which holds shapes, would not tell them apart."""
    begun, source, model = _begin(tmp_path / "s", model_folder, rollout_file)
    next(model.parameters()).data.mul_(2)
    replica = sketching.Replica(model=str(model_folder), spec=SPEC, device="cpu")
    with (
        sketching.OnWorkers(replica, begun.sketcher, workers=1) as on_workers,
        pytest.raises(RequestError, match=r"the workers' model has weights .* this process's"),
    ):
        collect(begun.store, "pool", source, sketcher=begun.sketcher, step=0, sketch_each=on_workers)
    assert len(begun.store.view("pool")) == 0


@pytest.fixture
def gradstore_command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A command of gradstore run in this process -> what it printed as JSON."""

    def run(*arguments: str) -> Any:
        monkeypatch.setattr("sys.argv", ["gradstore", *arguments, "--json"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
            raise SystemExit(0)
        assert not stop.value.code
        return json.loads(capsys.readouterr().out)

    return run


def _rows(out: Path) -> int:
    """Lines of a rollout file, or published rows of a store's pool."""
    if out.suffix == ".jsonl":
        return out.read_bytes().count(b"\n") if out.exists() else 0
    manifest = out / "collections/pool/manifest.json"
    return json.loads(manifest.read_bytes())["manifest"]["rows"] if manifest.exists() else 0


@pytest.mark.parametrize("name", ["rollout", "collect"])
def test_a_killed_driver_leaves_no_workers_and_is_resumed(
    ray_here: Any, tmp_path: Path, model_folder: Path, gradstore_command: Callable[..., Any], name: str
) -> None:
    """By the same command on the same cluster; the result is that of one process, byte for byte."""
    given = tmp_path / "given.jsonl"
    problems = [{"id": f"q{i}", "prompt": f"{i}+{i}=", "ground_truth": str(2 * i)} for i in range(192)]
    if name == "rollout":
        rows, first = problems, 1
        asked = ["--reward", "benchmarks.real:even", "-n", "2", "--max-new-tokens", "16", "--as-text"]
        begun, out = ["rollout", str(given)], tmp_path / "r.jsonl"
    else:
        rows = [
            {"problem_id": row["id"], "prompt": row["prompt"], "response": "7" * (1 + i % 9), "reward": float(i % 3)}
            for row in problems
            for i in range(4)
        ]
        first = 13  # Twelve rows are known from the fit.
        asked = ["--rank", "4", "--dim", "64", "--fit-problems", "12", "--token-budget", "64", "--accept-coverage", "0"]
        begun, out = ["collect", str(tmp_path / "s"), "pool", str(given)], tmp_path / "s"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked += ["--model", str(model_folder), "--device", "cpu"]
    to = ["--out", str(out)] if name == "rollout" else []
    spread = ["--ray", ray_here.get_runtime_context().gcs_address, "--workers", "1"]
    often = "from gradstore.engine.sketches import collector; collector._PUBLISH_SECONDS = 0"
    run = [sys.executable, "-c", f"{often}\nfrom gradstore.cli import main; main()", *begun, *to, *asked, *spread]
    with subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as driver:
        while driver.poll() is None and _rows(out) < first:
            time.sleep(0.01)
        driver.kill()
    assert driver.returncode == -signal.SIGKILL, driver.stderr
    told = gradstore_command(*begun, *to, *asked, *spread)
    kept = told["kept_problems" if name == "rollout" else "skipped"]
    assert 0 < kept < 192
    assert sum(worker["problems"] for worker in told["workers"]) == 192 - kept
    one = tmp_path / "one"
    if name == "rollout":
        gradstore_command(*begun, "--out", str(one.with_suffix(".jsonl")), *asked)
        assert out.read_bytes() == one.with_suffix(".jsonl").read_bytes()
    else:
        gradstore_command("collect", str(one), *begun[2:], *asked)
        assert contents(out) == contents(one)
    deadline = time.monotonic() + 30
    while (alive := workers_alive()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive
