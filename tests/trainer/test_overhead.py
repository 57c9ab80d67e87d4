"""The benchmark of selection's cost runs, and its share is of what it says."""

import pytest

from benchmarks.overhead import SIZES, measured, share


def test_every_stage_of_a_round_is_there() -> None:
    """A stage that was left out would make selection look cheap."""
    stages = measured("tiny", SIZES["tiny"], rounds=1, device="cpu", repeats=1)
    assert {len(own) for own in stages.values()} == {1}
    names = {name for name in stages if name.startswith("selection")}
    wanted = ("rollouts", "plan", "sketch", "probe", "target", "select", "store", "the rest")
    assert names == {f"selection: {name}" for name in wanted}
    assert all(own[0] >= 0 for name, own in stages.items() if name.startswith("selection"))


def test_the_share_leaves_out_the_rollouts_of_selection_alone() -> None:
    """Those have a budget of their own; observation counts as selection, not as training."""
    stages = {
        "training: rollouts": [3.0, 6.0],
        "training: updates": [5.0, 4.0],
        "observation: sketches": [0.25, 0.5],
        "observation: store": [0.25, 0.5],
        "selection: rollouts": [100.0, 100.0],
        "selection: sketch": [1.5, 1.0],
    }
    assert share(stages).tolist() == pytest.approx([0.25, 0.2])
