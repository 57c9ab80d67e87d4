"""Target for the tests of the harness: does what it is told to, in place of gradstore."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from gradstore.errors import RequestError
from tests.fuzz.trial import Trial

FORKS = True


def prepare(folder: Path) -> None:
    """Nothing is needed."""


def draw(random: Random, honest: None) -> dict[str, Any]:
    """A case that is a failure, so that it comes back."""
    return {"deed": "raise", "number": random.random()}


def attempt(trial: Trial, honest: None, case: dict[str, Any]) -> None:
    """Do the deed in one step, with a store beside it."""
    store = trial.folder / "store"
    store.mkdir()
    (store / "zarr.json").write_text("{}", encoding="utf-8")
    trial.call("deed", _DEEDS[case["deed"]], trial, store=store)
    if case["deed"] == "escape":
        trial.check_command("deed", 0, "a\x1b[2J", "")


def _fail(text: str) -> None:
    raise RequestError(text)


def _raise(trial: Trial) -> None:
    raise KeyError("x")


def _exit(trial: Trial) -> None:
    raise SystemExit(0)


def _change(trial: Trial) -> None:
    (trial.folder / "store" / "zarr.json").write_text("{ }", encoding="utf-8")
    raise RequestError("refused, but the store is another")


def _take(trial: Trial) -> None:
    bytearray(4 << 30)


_DEEDS: dict[str, Callable[[Trial], Any]] = {
    "print": lambda trial: print("nothing wrong"),
    "raise": _raise,
    "exit": _exit,
    "two lines": lambda trial: _fail("a\nb"),
    "escape": lambda trial: None,
    "write outside": lambda trial: (trial.folder.parent / "new").write_text("x", encoding="utf-8"),
    "read outside": lambda trial: (trial.outside / "canary").read_bytes(),
    "change": _change,
    "memory": _take,
    "hang": lambda trial: time.sleep(60),
    "die": lambda trial: os._exit(3),
}
