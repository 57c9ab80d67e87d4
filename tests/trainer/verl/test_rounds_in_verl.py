"""verl trains with rounds of selection on the processor, is killed, goes on, and ends where it would have ended.

Each run starts Ray and imports verl in a dozen processes: most of its minute.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import gradstore

pytestmark = [pytest.mark.verl, pytest.mark.timeout(2000)]

LIMIT = 600
"""Seconds after which a run counts as hung and is ended."""
ROUND_SETTINGS = [
    "gradstore.candidates=8",
    "gradstore.selected=4",
    "gradstore.steps=2",
    "gradstore.rounds=3",
    "gradstore.target_rollouts=4",
    "gradstore.spec.rank=4",
    "gradstore.spec.dim=256",
    "gradstore.selector=cosine:0.5+snr:0.5",
    "trainer.save_freq=3",
]


@dataclass
class Run:
    """A run of the command, and the folder it works in."""

    folder: Path
    process: subprocess.Popen[bytes]
    ray: Path

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    @property
    def rounds(self) -> list[gradstore.Round]:
        store = self.folder / "store"
        return gradstore.open(store).rounds("pool") if (store / "zarr.json").exists() else []

    def logged(self, name: str) -> list[float]:
        """A metric of verl's at each step."""
        return [float(text) for text in re.findall(rf"{name}:([0-9.e+-]+)", self.log)]

    def wait(self) -> None:
        """Until it ends by itself; fails with the end of its log where it does not, or not well."""
        try:
            status = self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the run did not end within {LIMIT} s:\n{self.log[-4000:]}")
        assert status == 0, self.log[-6000:]

    def kill(self) -> None:
        """kill -9 of the process and of all it started, and of nothing else."""
        try:
            own = psutil.Process(self.process.pid)
            started = [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in started:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


VLLM = [
    "actor_rollout_ref.rollout.name=vllm",
    # It cannot sleep on the processor.
    "actor_rollout_ref.rollout.free_cache_engine=False",
    # One request after another: a response then does not depend on what shares its batch.
    "actor_rollout_ref.rollout.max_num_seqs=1",
    "+actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=vllm_on_cpu.CpuExtension",
]


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])])
def engine(request: pytest.FixtureRequest, verl_environment: dict[str, str], tmp_path: Path) -> tuple[list, dict]:
    """Overrides and environment of a rollout engine."""
    if request.param == "transformers":
        return [], dict(verl_environment)
    # verl looks for a distribution of this name, and vLLM learns from "+cpu" that it is on the processor.
    about = tmp_path / "vllm-0.31.0+cpu.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0+cpu\n")
    path = os.pathsep.join([str(tmp_path), verl_environment["PYTHONPATH"]])
    return VLLM, {**verl_environment, "PYTHONPATH": path, "VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.fixture
def start(task: Path, engine: tuple[list, dict], verl_overrides: list[str], tmp_path: Path) -> Iterator:
    """Starts a run in a folder below tmp_path; what is left of it at the end is ended."""
    runs: list[Run] = []

    def begin(name: str, own_entry: bool = False, more: Sequence[str] = ()) -> Run:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        # Ray's sockets need a short path.
        ray = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        settings = [
            *verl_overrides,
            *ROUND_SETTINGS,
            *engine[0],
            *more,
            f"gradstore.store={folder}/store",
            f"trainer.default_local_dir={folder}/checkpoints",
            f"+ray_kwargs.ray_init._temp_dir={ray}",
        ]
        if own_entry:
            settings = [f"+{text}" if text.startswith("gradstore.") else text for text in settings]
            command = [sys.executable, "-m", "own_entry", *settings]
        else:
            command = [sys.executable, "-m", "gradstore", "train", "--backend", "verl", *settings]
        with open(folder / "log", "ab") as log:
            process = subprocess.Popen(command, env=engine[1], stdout=log, stderr=log, cwd=folder)
        runs.append(Run(folder, process, ray))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()
        shutil.rmtree(run.ray, ignore_errors=True)


def test_killed_and_resumed(start) -> None:
    """A cluster job is killed at any moment. What it picks after that, and what it trains on, must not depend on it:
    here it dies in a step after its third round, its checkpoint is of the middle of its second, and the store knows
    more than the checkpoint."""
    undisturbed = start("undisturbed", own_entry=True)
    undisturbed.wait()
    expected = undisturbed.rounds
    assert [found.about["step"] for found in expected] == [0, 2, 4]
    assert len({tuple(sorted(found.picks)) for found in expected}) > 1, "the target moves, and the picks with it"
    for found in expected:
        assert found.about["n_rolled_out"] == 8
    differences = undisturbed.logged("training/rollout_probs_diff_max")
    assert len(differences) == 6
    assert max(differences) < 1e-6, "the rollouts are made by the weights that train"

    killed = start("killed")
    deadline = time.monotonic() + LIMIT
    while len(killed.rounds) < 3:
        assert killed.process.poll() is None, killed.log[-6000:]
        assert time.monotonic() < deadline, killed.log[-4000:]
        time.sleep(0.2)
    killed.kill()
    assert checkpoints(killed.folder) == [3], "killed before its last checkpoint"
    position = sampler_state(killed.folder, 3)
    assert (len(position["order"]), position["drawn"]) == (8, 4), "in the middle of the second round"

    resumed = start("killed")
    resumed.wait()
    assert "Resuming from" in resumed.log
    assert [found.picks for found in resumed.rounds] == [found.picks for found in expected]
    for found, other in zip(resumed.rounds, expected, strict=True):
        np.testing.assert_allclose(found.table["score"].to_numpy(), other.table["score"].to_numpy(), rtol=1e-5)
    assert checkpoints(resumed.folder) == checkpoints(undisturbed.folder) == [3, 6]
    for step in (3, 6):
        assert sampler_state(resumed.folder, step) == sampler_state(undisturbed.folder, step)
    for folder in (undisturbed.folder, resumed.folder):
        observed = gradstore.open(folder / "store").history("pool")
        steps, ids = observed["step"].to_numpy(), np.array(observed["id"].to_pylist())
        for number, found in enumerate(expected):
            trained = sorted(ids[steps == 2 * number + 1].tolist())
            assert trained == sorted(found.picks), "the rollouts of the last pass over the picks are kept"


UNEVEN = """
import numpy as np
from gradstore.engine import Candidates, Scored, Selector

def score(candidates: Candidates) -> Scored:
    cosines = candidates.cosines(candidates.target_D)
    return Scored(cosines, weights=np.where(cosines == cosines.max(), 9.0, 1.0))

SELECTOR = Selector("uneven", score, "cosine, the best weighing 9 times as much", needs_target=True)
"""


@pytest.fixture
def installed(engine: tuple[list, dict], tmp_path: Path) -> None:
    """A package with the selector `uneven`, as `pip install` would leave it."""
    folder = tmp_path / "packages"
    about = folder / "uneven-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "uneven.py").write_text(UNEVEN)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: uneven\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[gradstore.selectors]\nuneven = uneven:SELECTOR\n")
    engine[1]["PYTHONPATH"] = os.pathsep.join([str(folder), engine[1]["PYTHONPATH"]])


@pytest.mark.parametrize("engine", ["transformers"], indirect=True)
@pytest.mark.usefixtures("installed")
def test_two_ranks(start) -> None:
    """Most runs have many ranks: the policy is in shards, each rank sketches some of the problems, and two rollout
    engines are given the weights that train. And a selector's weights must reach the loss."""
    run = start(
        "two",
        more=[
            "trainer.n_gpus_per_node=2",
            "ray_kwargs.ray_init.num_gpus=2",
            "gradstore.rounds=2",
            "gradstore.selector=uneven",
        ],
    )
    run.wait()
    assert [found.about["step"] for found in run.rounds] == [0, 2]
    for found in run.rounds:
        assert found.about["n_rolled_out"] == 8
        assert found.about["counts"]["live"] >= 4
        assert len(set(found.picks)) == 4
        assert found.table["weight"].to_numpy().max() == 9.0
    assert "gradstore/round/number:1.0" in run.log
    differences = run.logged("training/rollout_probs_diff_max")
    assert len(differences) == 4
    assert max(differences) < 1e-6, "both engines have the weights that train"
    assert min(run.logged("actor/grad_norm")) > 0
    # The largest of GRPO's advantages of 4 rewards that differ lies between sqrt(3) / 2 and 3 / 2.
    advantages = [*run.logged("critic/advantages/max"), *run.logged("critic/advantages/min")]
    assert max(map(abs, advantages)) > 2.5, "those of the best problem count 9 / 3 times"
    observed = gradstore.open(run.folder / "store").history("pool")
    assert set(observed["step"].to_pylist()) == {0, 1, 2, 3}


def checkpoints(folder: Path) -> list[int]:
    """Steps of verl's checkpoints."""
    return sorted(
        int(path.name.removeprefix("global_step_")) for path in (folder / "checkpoints").glob("global_step_*")
    )


def sampler_state(folder: Path, step: int) -> dict:
    """The sampler's part of verl's checkpoint of the data loader."""
    state = torch.load(folder / f"checkpoints/global_step_{step}/data.pt", weights_only=False)
    found = [part for part in walk(state) if {"order", "drawn"} <= part.keys()]
    assert found, "the checkpoint has the sampler's state"
    return found[0]


def walk(tree: object) -> Iterator[dict]:
    """Every dict in nested dicts."""
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            yield from walk(value)
