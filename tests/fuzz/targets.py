"""The targets of the fuzzing, and how a try of one is made.

A target is a module of this folder with three functions (and `LIMIT_S`, if a step may take longer than five seconds):

    prepare(folder: Path) -> H                               once per worker: what honest data is
    draw(random: Random, honest: H) -> dict                  the case of a seed
    attempt(trial: Trial, honest: H, case: dict) -> None     one try

A case is a small dict of JSON values that says everything about a try: edits of honest data, bytes as
{"base64": ...}, the commands. So failures are kept as files, and corpus/TARGET/*.json stays valid when `draw` changes.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.trial import Trial

TARGETS = ("input_files", "store_folders", "pushed_stores", "index_folders", "judge_answers", "requests", "answers")
HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
LIMIT_S = 5.0
"""Seconds that one step of a try may take."""


@dataclass(frozen=True)
class Target:
    """The three functions of a target's module."""

    name: str
    prepare: Callable[[Path], Any]
    draw: Callable[[Random, Any], dict[str, Any]]
    attempt: Callable[[Trial, Any, dict[str, Any]], None]
    limit_s: float
    forks: bool
    """Whether `prepare` gives plain data, so that tries can be made in forks (worker.py)."""


def load(name: str) -> Target:
    """The target of a name; ModuleNotFoundError if there is none."""
    module = import_module(f"tests.fuzz.{name}")
    return Target(
        name,
        module.prepare,
        module.draw,
        module.attempt,
        getattr(module, "LIMIT_S", LIMIT_S),
        getattr(module, "FORKS", False),
    )


def case_of(target: Target, honest: Any, seed: int) -> dict[str, Any]:
    """The case of a seed: the same in every process."""
    return target.draw(Random(f"{target.name} {seed}"), honest)


def corpus(name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The kept cases of a target, by file."""
    for path in sorted((CORPUS / name).glob("*.json")):
        yield path, json.loads(path.read_text(encoding="utf-8"))["case"]
