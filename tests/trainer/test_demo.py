"""The demo from end to end, at a size a test can afford."""

import json

import pytest

import gradstore
from gradstore import State
from gradstore.demo.run import DemoSettings, run_demo, summary
from gradstore.engine import SELECTORS

SMALL = DemoSettings(n_pool=400, n_benchmark=60, n_selected=40, n_rollouts=12)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, 0, SMALL, lambda line: None)


def test_cosine_finds_the_target_family(demo) -> None:
    """The claim the product stands on: alignment beats chance, and beats picking coin flips by their pass rate."""
    shares = demo[1].shares
    assert shares["(pool)"] == pytest.approx({"family": 0.2, "broken": 0.4, "wrong_truth": 0.2, "coin_flip": 0.2})
    assert shares["cosine"]["family"] > 2 * max(shares["rand"]["family"], shares["accgreedy"]["family"])
    assert shares["cosine"]["broken"] < 0.75 * shares["accgreedy"]["broken"]
    assert shares["cosine"]["broken"] < shares["rand"]["broken"]


def test_every_selector_is_compared_and_every_stage_timed(demo) -> None:
    """A table with a row missing compares something else."""
    result = demo[1]
    assert set(result.shares) == {*(name for name in SELECTORS if not SELECTORS[name].needs_probes), "(pool)"}
    assert len(result.seconds) == 8
    facts = json.loads(json.dumps(summary([result, result])))
    assert facts["shares"]["cosine"]["family"] == [result.shares["cosine"]["family"], 0.0]


def test_states_and_store(demo) -> None:
    """Problems without signal are counted, not ranked, and the store is whole."""
    folder, result = demo
    store = gradstore.open(folder / "store")
    view = store.view("pool")
    assert result.states["no_signal"] == int((view.states == State.NO_SIGNAL).sum()) > 0
    assert result.states["live"] + result.states["no_signal"] == 400
    assert store.verify().ok


def test_a_second_run_does_nothing_again(demo) -> None:
    """Interrupted or finished, the demo goes on from what is there and says the same."""
    folder, first = demo
    commits = [gradstore.open(folder / "store").commit(name) for name in ("pool", "benchmark")]
    again = run_demo(folder, 0, SMALL, lambda line: None)
    assert [gradstore.open(folder / "store").commit(name) for name in ("pool", "benchmark")] == commits
    assert again.shares == first.shares
