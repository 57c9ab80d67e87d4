"""`collect --ray local` from the command line: a Ray of its own, the store of one process, and nothing left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradstore
from benchmarks.contents import contents

pytestmark = pytest.mark.slow


def test_a_store_collected_by_a_ray_of_its_own(tmp_path: Path, model_folder: Path, rollout_files, accepted) -> None:
    stores = [tmp_path / "one", tmp_path / "two"]
    for store, spread in zip(stores, ((), ("--ray", "local", "--workers", "2")), strict=True):
        asked = [store, "pool", rollout_files["pool"], "--model", model_folder, "--rank", 4, "--device", "cpu"]
        ended = subprocess.run(
            [sys.executable, "-m", "gradstore", "collect", *map(str, [*asked, *accepted, *spread, "--json"])],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        told = json.loads(ended.stdout)
        assert told["collected"] == 12
    assert sum(worker["problems"] for worker in told["workers"]) == 3  # the fit has sketched those with a signal
    assert contents(stores[1]) == contents(stores[0])
    assert gradstore.open(stores[1]).verify().ok
