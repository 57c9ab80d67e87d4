"""verl trains with rounds of selection on the processor, is killed, goes on, and ends where it would have ended.

Each run starts Ray and imports verl in a dozen processes: most of its minute.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import gradstore
from gradstore.engine.gradients.logprobs import Reference
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.bases import sketcher_of

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
        return [float(text) for text in re.findall(rf"{name}:(?:np\.\w+\()?([0-9.e+-]+)", self.log)]

    def wait(self) -> None:
        """Until it ends by itself; fails with the end of its log where it does not, or not well."""
        try:
            status = self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the run did not end within {LIMIT} s:\n{self.log[-4000:]}")
        assert status == 0, self.log[-6000:]

    def kill_after(self, rounds: int) -> None:
        """kill -9 when the store has so many rounds."""
        deadline = time.monotonic() + LIMIT
        while len(self.rounds) < rounds:
            assert self.process.poll() is None, self.log[-6000:]
            assert time.monotonic() < deadline, self.log[-4000:]
            time.sleep(0.2)
        self.kill()

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
    killed.kill_after(rounds=3)
    assert checkpoints(killed.folder) == [3], "killed before its last checkpoint"
    position = sampler_state(killed.folder, 3)
    assert (len(position["order"]), position["drawn"]) == (8, 4), "in the middle of the second round"

    resumed = start("killed")
    resumed.wait()
    assert "Resuming from" in resumed.log
    same_rounds(resumed, undisturbed)
    assert checkpoints(resumed.folder) == checkpoints(undisturbed.folder) == [3, 6]
    for step in (3, 6):
        assert sampler_state(resumed.folder, step) == sampler_state(undisturbed.folder, step)
    for folder in (undisturbed.folder, resumed.folder):
        observed = gradstore.open(folder / "store").history("pool")
        steps, ids = observed["step"].to_numpy(), np.array(observed["id"].to_pylist())
        for number, found in enumerate(expected):
            trained = sorted(ids[steps == 2 * number + 1].tolist())
            assert trained == sorted(found.picks), "the rollouts of the last pass over the picks are kept"


def same_rounds(one: Run, other: Run) -> None:
    """Equal picks, by equal scores."""
    assert [found.picks for found in one.rounds] == [found.picks for found in other.rounds]
    for found, expected in zip(one.rounds, other.rounds, strict=True):
        np.testing.assert_allclose(found.table["score"].to_numpy(), expected.table["score"].to_numpy(), rtol=1e-5)


TOOLS = [
    "actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent",
    "actor_rollout_ref.rollout.multi_turn.enable=True",
    f"actor_rollout_ref.rollout.multi_turn.function_tool_path={Path(__file__).parent}/cpu/calculator.py",
    "actor_rollout_ref.rollout.multi_turn.format=every_turn",
    "actor_rollout_ref.rollout.multi_turn.max_assistant_turns=2",
    "data.max_response_length=48",
    "gradstore.rounds=2",
    "trainer.save_freq=1",
]
"""Two turns by verl's own agent loop, with the answer of a calculator between them."""


@pytest.mark.parametrize("engine", ["transformers"], indirect=True)
def test_tools(start, tiny_model, tmp_path: Path) -> None:
    """Tokens of a tool are read by the policy and not trained on: the store's rows are the engine's sketches of the
    same masked rollouts. And resuming is as exact as with one turn."""
    undisturbed = start("undisturbed", more=[*TOOLS, f"gradstore.export={tmp_path}/rollouts"])
    undisturbed.wait()
    assert [found.about["step"] for found in undisturbed.rounds] == [0, 2]
    assert undisturbed.logged("training/num_turns/min") == [4.0] * 4, "two of the policy's, the problem's, the tool's"
    assert max(undisturbed.logged("training/rollout_probs_diff_max")) < 1e-6
    store = gradstore.open(undisturbed.folder / "store")
    (exported,) = (tmp_path / "rollouts").glob("round-0000-pool-*.jsonl")
    groups = exported_groups(exported)
    assert [len(group.responses) for group in groups] == [4] * 8
    assert all(0 < written < len(response) for group in groups for written, response in lengths(group))
    for row in map(json.loads, exported.read_text(encoding="utf-8").splitlines()):
        written = [int(value != 0) for value in row["logprobs"]]  # verl records 0 for a tool's tokens
        assert [int(value) for value in row["response_mask"]] == written
    expected = sketcher_of(store, tiny_model).sketch(groups)
    view = store.view("pool", 0)
    norms_P = dict(zip(view.ids, view.norms, strict=True))
    np.testing.assert_allclose([norms_P[name] for name in expected.ids], expected.norms, rtol=1e-4)
    rows_PD, expected_PD = view.take(expected.ids), expected.sketches / expected.norms[:, None]
    off_P = np.linalg.norm(rows_PD - expected_PD, axis=1) / np.linalg.norm(expected_PD, axis=1)
    assert off_P.max() < 0.03, "rows have 8 bits a number"

    killed = start("killed", more=TOOLS)
    killed.kill_after(rounds=2)
    resumed = start("killed", more=TOOLS)
    resumed.wait()
    assert "Resuming from" in resumed.log
    same_rounds(resumed, undisturbed)


def exported_groups(exported: Path) -> list[Group]:
    """Groups of a round's exported rollouts."""
    rows: dict[str, list[dict]] = {}
    for line in exported.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.setdefault(row["problem_id"], []).append(row)
    return [
        Group(
            name,
            np.array(of_problem[0]["prompt_ids"]),
            [np.array(row["response_ids"]) for row in of_problem],
            np.array([row["reward"] for row in of_problem]),
            reference_logprobs=[np.array(row["reference_logprobs"]) for row in of_problem]
            if "reference_logprobs" in of_problem[0]
            else None,
            masks=[np.array(row["response_mask"], dtype=bool) for row in of_problem]
            if "response_mask" in of_problem[0]
            else None,
        )
        for name, of_problem in rows.items()
    ]


def lengths(group: Group) -> Iterator[tuple[int, np.ndarray]]:
    """Tokens that the policy wrote, and the response, of each rollout."""
    return zip(group.n_written.tolist(), group.responses, strict=True)


KL = [
    "actor_rollout_ref.actor.use_kl_loss=True",
    "actor_rollout_ref.actor.kl_loss_coef=0.05",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.ref.use_torch_compile=False",
    "actor_rollout_ref.ref.fsdp_config.use_torch_compile=False",
    "actor_rollout_ref.ref.fsdp_config.dtype=float32",
    "+actor_rollout_ref.ref.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
]
"""verl's KL loss, and with it its reference worker."""
AHEAD = ["trainer.v1.trainer_mode=colocate_async", "gradstore.rounds=2", "trainer.save_freq=2"]


@pytest.mark.parametrize("engine", ["transformers"], indirect=True)
def test_generating_ahead(start, tmp_path: Path) -> None:
    """Where verl generates a batch ahead, a round comes that much before the steps it picks for. Its rollouts and its
    sketches are of one policy all the same, and rows of a step are of that step's policy or are not kept."""
    more = [*AHEAD, f"trainer.rollout_data_dir={tmp_path}/trained"]
    begun = start("ahead", more=[*more, "trainer.total_training_steps=2"])
    begun.wait()
    rounds = begun.rounds
    assert [found.about["step"] for found in rounds] == [0, 1], "at 2 r - 1, after the first"
    assert [found.about["n_rolled_out"] for found in rounds] == [8, 8]
    assert max(begun.logged("training/off_policy/trajectory_staleness_worst/max")) >= 1, "it did generate ahead"

    ended = start("ahead", more=[*more, "trainer.total_training_steps=4"])
    ended.wait()
    assert "Resuming from" in ended.log
    assert [found.picks for found in ended.rounds] == [found.picks for found in rounds]
    assert checkpoints(ended.folder) == [2, 4]
    trained = [trained_on(tmp_path / f"trained/{step}.jsonl") for step in (1, 2, 3, 4)]
    assert trained[0] <= set(rounds[0].picks)
    assert trained[3] <= set(rounds[1].picks)
    assert all(found <= set(rounds[0].picks) | set(rounds[1].picks) for found in trained)
    observed = gradstore.open(ended.folder / "store").history("pool")
    left_out = ended.logged("gradstore/observe/of_earlier_policies")  # of both runs: they share a log
    assert len(left_out) == 4
    assert max(left_out) > 0
    assert set(observed["step"].to_pylist()) <= {0, 1, 2, 3}


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
def test_two_ranks(start, tiny_model, tmp_path: Path) -> None:
    """Most runs have many ranks: the policy is in shards, each rank sketches some of the problems, and two rollout
    engines are given the weights that train. A selector's weights must reach the loss, and log-probabilities of verl's
    reference the sketches."""
    run = start(
        "two",
        more=[
            "trainer.n_gpus_per_node=2",
            "ray_kwargs.ray_init.num_gpus=2",
            "gradstore.rounds=2",
            "gradstore.selector=uneven",
            f"gradstore.export={tmp_path}/rollouts",
            *KL,
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
    store = gradstore.open(run.folder / "store")
    assert set(store.history("pool")["step"].to_pylist()) == {0, 1, 2, 3}
    assert store.fingerprint["objective"]["kl_beta"] == 0.05, "as verl's loss has it"
    refers_to(tiny_model, tmp_path / "rollouts")


def refers_to(model, folder: Path) -> None:
    """The exported rollouts of two rounds have the base model's log-probabilities, whatever the step."""
    for number in (0, 1):
        (exported,) = folder.glob(f"round-000{number}-pool-*.jsonl")
        groups = [group for group in exported_groups(exported) if group.has_signal]
        assert groups
        for group in groups:
            expected = Reference(model)(replace(group, reference_logprobs=None))
            for given, own in zip(group.reference_logprobs, expected.reference_logprobs, strict=True):
                np.testing.assert_allclose(given, own, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers"], indirect=True)
def test_adapters_and_their_reference(start, tiny_model, tmp_path: Path) -> None:
    """With LoRA the reference is the model without its adapters, also where verl's own loss has no KL term."""
    run = start(
        "adapters",
        more=[
            "actor_rollout_ref.model.lora_rank=4",
            "actor_rollout_ref.model.lora_alpha=8",
            "actor_rollout_ref.model.target_modules=all-linear",
            "actor_rollout_ref.model.lora.merge=True",
            "gradstore.rounds=2",
            "gradstore.selector=cosine",
            "gradstore.spec.objective.kl_beta=0.05",
            f"gradstore.export={tmp_path}/rollouts",
        ],
    )
    run.wait()
    assert [found.about["step"] for found in run.rounds] == [0, 2]
    refers_to(tiny_model, tmp_path / "rollouts")


def trained_on(dump: Path) -> set[str]:
    """Problems of a step, from verl's dump of its rollouts: a uid ends with the row in the pool, here the id."""
    uids = {json.loads(line)["uid"].split("_")[0] for line in dump.read_text(encoding="utf-8").splitlines()}
    return {uid.rsplit("-", 1)[1] for uid in uids if not uid.startswith("pad")}


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
