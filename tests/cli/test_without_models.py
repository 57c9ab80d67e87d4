"""A plain installation, without torch: stores are read, searched and verified; the rest says which extra it needs."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MISSING = ("torch", "transformers", "safetensors", "math_verify", "reasoning_gym")


@pytest.fixture
def plain(tmp_path: Path):
    """Runs `gradstore` where what the extra `sketch` brings cannot be imported."""
    for name in MISSING:
        absent = f"raise ModuleNotFoundError('No module named {name}', name={name!r})\n"
        (tmp_path / f"{name}.py").write_text(absent)

    def run(*words: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "gradstore", *words]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})

    return run


def test_stores_are_read(plain, small_store: Callable[[Path], Path], tmp_path: Path) -> None:
    store = small_store(tmp_path / "store")
    both = ["--pool", "pool", "--against", "bench"]
    for words in (
        ["query", str(store), *both, "--json"],
        ["select", str(store), *both, "-n", "3", "--out", str(store.parent / "picked")],
        ["info", str(store)],
        ["verify", str(store)],
        ["compact", str(store), "--keep", "newest"],
        ["selectors"],
        ["report", str(store), "--out", str(store.parent / "report.html")],
    ):
        done = plain(*words)
        assert done.returncode == 0, (words, done.stderr)


def test_verl_brings_the_rest(plain) -> None:
    done = plain("train", "--backend", "verl", "gradstore.store=run/store")
    assert done.returncode == 2
    assert "gradstore[verl]" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


ROUNDS = ["selected=1", "train_batch=1", "steps=1", "rounds=1"]


@pytest.mark.parametrize(
    "words",
    [
        ["rollout", "pool.jsonl", "--model", "m", "--reward", "math", "--out", "r.jsonl"],
        ["collect", "store", "pool", "r.jsonl", "--model", "m"],
        ["train", "--model", "m", "--pool", "pool.jsonl", "--benchmark", "b.jsonl", "--out", "run", *ROUNDS],
        ["demo"],
    ],
)
def test_the_extra_is_named(plain, words: list[str], tmp_path: Path) -> None:
    for name in ("pool.jsonl", "b.jsonl", "r.jsonl"):
        (tmp_path / name).write_text('{"id": "a", "prompt": "1+1", "ground_truth": "2"}\n')
    words = [str(tmp_path / word) if word.endswith(".jsonl") else word for word in words]
    done = plain(*words)
    assert done.returncode == 2
    assert "gradstore[sketch]" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
