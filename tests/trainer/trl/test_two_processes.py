"""Two processes train together (gloo, on the processor): one store, each sketches its share."""

import copy
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradstore
from gradstore.engine.sketches.bases import sketcher_of
from tests.trainer.trl.conftest import SELECTION

pytest.importorskip("trl", reason="needs trl: make install")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


@pytest.fixture
def run(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., Path]:
    """run(name, steps, *options, **environment) -> the run's folder, after both processes have ended."""

    def start(name: str, steps: int, *options: str, **environment: str) -> Path:
        folder = tmp_path / name
        tiny_model.save_pretrained(folder / "model")
        tiny_tokenizer.save_pretrained(folder / "model")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        root = str(Path(__file__).parents[3])
        ranks = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("ddp_rank.py")), str(folder), str(steps), *options],
                env={**os.environ, **shared, "PYTHONPATH": root, "RANK": str(k), "LOCAL_RANK": str(k), **environment},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for k in range(2)
        ]
        errors = [rank.communicate(timeout=800)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(error[-3000:] for error in errors)
        return folder

    return start


def test_ddp(run: Callable[..., Path], tiny_model: Any) -> None:
    folder = run("ddp", 4)
    store = gradstore.open(folder / "store")
    assert [one.about["step"] for one in store.rounds("pool")] == [0, 2]
    weights = [torch.load(folder / f"weights-{rank}.pt") for rank in range(2)]
    for name, own in weights[0].items():
        assert torch.equal(own, weights[1][name])
    kept = torch.load(folder / "sketched.pt", weights_only=False)
    check_first_sketches(kept, store, tiny_model)
    observed = [one for one in kept["sketched"] if one["step"] == 3]
    assert [len(group.responses) for one in observed for group in one["groups"]] == [4] * 4

    rows = store.view("pool").steps.tolist()
    shutil.rmtree(folder / "out" / "checkpoint-4")
    run("ddp", 4, "resume")  # from within the second round
    again = gradstore.open(folder / "store")
    assert again.view("pool").steps.tolist() == rows
    assert len(again.rounds("pool")) == 2
    for rank in range(2):
        for name, own in torch.load(folder / f"weights-{rank}.pt").items():
            assert torch.equal(own, weights[0][name])


def test_fsdp2(run: Callable[..., Path], tiny_model: Any) -> None:
    """The shards are gathered for a round as for a step; the sketches are those of the whole model."""
    folder = run("fsdp", 4, **FSDP2)
    store = gradstore.open(folder / "store")
    assert [len(one.picks) for one in store.rounds("pool")] == [SELECTION["selected"]] * 2
    check_first_sketches(torch.load(folder / "sketched.pt", weights_only=False), store, tiny_model)


def check_first_sketches(kept: Any, store: Any, tiny_model: Any) -> None:
    """Sketches of step 0 against one process with the whole model."""
    model = copy.deepcopy(tiny_model)
    model.load_state_dict(tiny_model.state_dict())
    whole = sketcher_of(store, model)
    first = [one for one in kept["sketched"] if one["step"] == 0]
    assert first
    for one in first:
        expected, found = whole.sketch(one["groups"]), one["batch"]
        assert found.ids == expected.ids
        scale = np.abs(expected.sketches).max()
        np.testing.assert_allclose(found.sketches, expected.sketches, rtol=1e-4, atol=1e-5 * scale)
