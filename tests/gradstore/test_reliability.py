"""The trials of `python -m benchmarks.reliability`, fewer of each."""

from pathlib import Path

import pytest

import gradstore
from benchmarks.churn import create
from benchmarks.powercut import recorded
from benchmarks.reliability import clock, cuts, live
from gradstore import durable


def test_power_cuts_lose_nothing(fast_path: Path) -> None:
    """What was acknowledged is on the disk whatever else is not: the order of writes and fsyncs, folders included."""
    assert "cuts" in cuts(fast_path, n_changes=12, every=15, seed=3)


@pytest.mark.parametrize("forgotten", ["_OpenChunk.sync", "_sync_folder"])
def test_the_power_cut_model_notices_a_forgotten_fsync(fast_path: Path, monkeypatch, forgotten: str) -> None:
    """A model that never finds anything proves nothing."""
    monkeypatch.setattr(f"gradstore.appender.{forgotten}", lambda where: None)
    with pytest.raises(ValueError, match="cut after event"):
        cuts(fast_path, n_changes=12, every=5)


def test_the_power_cut_model_notices_a_manifest_without_fsync(fast_path: Path, monkeypatch) -> None:
    """The rename alone makes a publication visible, not durable."""
    monkeypatch.setattr(durable, "fsync_folder", lambda folder: None)
    with pytest.raises(ValueError, match="cut after event"):
        cuts(fast_path, n_changes=12, every=5)


def test_a_part_that_another_swallowed_does_not_come_back(fast_path: Path) -> None:
    """Its removal must be on the disk before the lock says that there is nothing to clear: no later writer looks."""
    store = create(fast_path / "store")
    with recorded(store.path) as disk:
        for number in range(3):
            store.add_problems("more", [{"id": f"x{number}", "prompt": "?"}])
    *_, (_, state) = disk.states()
    state.build(fast_path / "after")
    left = gradstore.open(fast_path / "after")
    assert len(left.problems("more")) == 3
    assert left.verify().ok
    assert not left.verify().notes


def test_readers_beside_a_writer(fast_path: Path) -> None:
    """Every answer is the answer of one publication, while rows are published ten times a second and compacted."""
    assert "publications" in live(fast_path, seconds=4, readers=2)


def test_times_of_files_mean_nothing(fast_path: Path) -> None:
    """A clock that jumps must not make a reader keep an old moment, or a writer believe a new one."""
    clock(fast_path, 15)
