"""A `collect` killed between the creation of its store and the first rows: the same command makes the same store."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gradstore
from benchmarks.contents import contents

_KILLED = """
import os
from gradstore.engine.sketches import collector
collector._append_known = lambda *given: os.kill(os.getpid(), 9)
"""


def test_the_rows_of_the_fit_are_made_again(tmp_path: Path, model_folder: Path, write_lines) -> None:
    """The fit sketches its problems on the way, in micro-batches of its own, and those that it holds out. All of these
    rows are lost, and must come back with the same bytes."""
    rows = [
        {"problem_id": f"p{i}", "prompt": f"{i}+{i}=", "response": "7" * (1 + (i + j) % 9), "reward": float(j % 2)}
        for i in range(100)
        for j in range(4)
    ]
    given = write_lines(tmp_path / "r.jsonl", rows)

    def collect(store: Path, before: str = "") -> subprocess.CompletedProcess:
        asked = ["collect", store, "pool", given, "--model", model_folder, "--rank", 4, "--dim", 64, "--json"]
        asked += ["--token-budget", 96, "--accept-coverage", 0, "--device", "cpu"]
        return subprocess.run(
            [sys.executable, "-c", f"{before}\nfrom gradstore.cli import main; main()", *map(str, asked)],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip

    one, two = tmp_path / "one", tmp_path / "two"
    assert collect(two, _KILLED).returncode == -signal.SIGKILL
    assert not len(gradstore.open(two).view("pool"))
    for store in (one, two):
        ended = collect(store)
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["live"] == 100
    assert contents(two) == contents(one)
