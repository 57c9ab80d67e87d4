"""A short fuzzing: every kept case, and some tries of fixed seeds, of each target; `make fuzz` is the long one.

The harness itself is tested on a target that does what must be found.
"""

import itertools
from pathlib import Path

import pytest

from tests.fuzz.room import Room
from tests.fuzz.run import Worker, fuzz
from tests.fuzz.targets import TARGETS, corpus

TRIES = {
    "input_files": 40,
    "store_folders": 30,
    "pushed_stores": 20,
    "index_folders": 25,
    "judge_answers": 12,
    "requests": 40,
    "answers": 12,
}
PATIENCE = 6.0
"""Other tests use the machine's cores at the same time."""


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_of_others_breaks_it(target: str) -> None:
    """No traceback, hang, endless memory, file touched beside the store, or store changed by a failed command."""
    result = fuzz(target, itertools.count(), seconds=None, tries=TRIES[target], patience=PATIENCE)
    assert result.tries >= TRIES[target] + len(list(corpus(target)))
    told = [f"{kind}: {where}: {first['text'][-1500:]}" for (kind, where), first in result.first.items()]
    assert not told, "\n\n".join(told)


FOUND = {
    "print": set(),
    "raise": {"traceback"},
    "exit": {"traceback"},
    "two lines": {"line"},
    "escape": {"control"},
    "write outside": {"outside"},
    "read outside": {"outside"},
    "change": {"changed"},
    "memory": {"memory"},
    "hang": {"hang"},
    "die": {"died"},
}
"""What a try of `misbehaving` does -> kinds of failures that must be found."""


@pytest.fixture(scope="module")
def worker() -> Worker:
    """A worker whose tries misbehave as they are told to."""
    with Worker("misbehaving", patience=0.6) as made:
        yield made


@pytest.mark.parametrize("deed", FOUND)
def test_what_the_harness_finds(worker: Worker, deed: str) -> None:
    """A harness that finds nothing proves nothing: each kind of failure is found, and the next try is made."""
    answer = worker.ask({"case": {"deed": deed}})
    assert {failure["kind"] for failure in answer["failures"]} == FOUND[deed]
    assert worker.ask({"case": {"deed": "print"}})["failures"] == []


def test_seeds_repeat(worker: Worker) -> None:
    """The case of a seed is the same in another process."""
    with Worker("misbehaving") as other:
        assert other.ask({"seed": 7})["case"] == worker.ask({"seed": 7})["case"] is not None


def test_a_room_is_empty_for_each_try(tmp_path: Path) -> None:
    room = Room(tmp_path / "top")
    (room.folder / "store").mkdir()
    (room.folder / "inputs" / "x").write_text("x", encoding="utf-8")
    room.clear()
    assert sorted(path.name for path in room.folder.iterdir()) == ["inputs", "out", "outside"]
    assert not list((room.folder / "inputs").iterdir())
