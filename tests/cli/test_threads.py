"""Torch's threads in a command: they sleep while they wait, and a small model has one."""

import os
import subprocess
import sys

import pytest
import torch

from gradstore.cli.threads import COUNTS, SMALL, WAITING, suit_threads

SHOW = """
import os, sys
sys.argv = ["gradstore", "--version"]
try:
    from gradstore.cli import main
    main()
finally:
    print([os.environ.get(name) for name in {names}])
"""


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch):
    """Torch has two threads, and the environment decides nothing."""
    for name in COUNTS:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _model(width: int, vocabulary: int = 16) -> torch.nn.Module:
    model = torch.nn.ModuleDict({"block": torch.nn.Linear(width, width), "head": torch.nn.Linear(width, vocabulary)})
    model.get_output_embeddings = lambda: model["head"]
    return model


@pytest.mark.usefixtures("two_threads")
def test_a_small_model_gets_one_thread() -> None:
    """By its blocks: even a small model has a large vocabulary."""
    wide = 512
    assert wide * wide >= SMALL
    suit_threads(_model(wide))
    assert torch.get_num_threads() == 2
    suit_threads(_model(64, vocabulary=SMALL))
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", COUNTS)
def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "2")
    suit_threads(_model(64))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("given", "waiting"),
    [
        ({}, ["passive", None, None]),
        ({"OMP_WAIT_POLICY": "active"}, ["active", None, None]),
        ({"GOMP_SPINCOUNT": "10"}, [None, "10", None]),
    ],
)
def test_threads_sleep_unless_the_environment_says_otherwise(given: dict, waiting: list) -> None:
    """Set before torch is loaded: OpenMP reads it once. Spinning threads made a fit take minutes beside a busy job."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING} | given
    command = [sys.executable, "-c", SHOW.format(names=WAITING)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == repr(waiting)
