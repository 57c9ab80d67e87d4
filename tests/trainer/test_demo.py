"""The demo from end to end, at a size a test can afford."""

import json

import pytest

import gradstore
from gradstore import State
from gradstore.demo.run import DemoSettings, TimeLeft, best_of, conclusion, run_demo, summary
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


def test_the_conclusion_follows_from_the_numbers() -> None:
    """Other numbers, other sentences; nobody who is best, and nobody who is worst, is named by accident."""

    def row(family: float, broken: float, spread: float = 0.01) -> dict[str, list[float]]:
        named = {"family": family, "broken": broken, "wrong_truth": broken / 2, "coin_flip": broken / 2}
        return {kind: [share, spread] for kind, share in named.items()}

    shares = {
        "a": row(0.9, 0.2),
        "b": row(0.6, 0.1),
        "c": row(0.1, 0.0),
        "rand": row(0.2, 0.4),
        "(pool)": row(0.2, 0.4),
    }
    found = conclusion(shares)
    assert found.startswith("Of the picks of a, 90.0 % are of the benchmark's family, of the pool 20.0 %.")
    assert "Of the 2 selectors that mostly find this family, b takes the fewest broken rewards, 10.0 %" in found
    assert "More of them" not in found
    assert best_of(shares) == {"family": "a", "broken": "c", "wrong_truth": "c", "coin_flip": "c"}
    assert " c takes more broken rewards than a random choice." in conclusion({**shares, "c": row(0.1, 0.5)})
    assert "More of them" not in conclusion({**shares, "c": row(0.1, 0.5, 0.2)})


def test_the_time_left_follows_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing at first; then what is left of the seeds and of the run at the end, at the pace so far."""
    clock = [0.0]
    monkeypatch.setattr("gradstore.demo.run.time.monotonic", lambda: clock[0])
    left = TimeLeft(3)
    clock[0] = 28.0
    assert left.after("target") == ""
    assert left.after("rollouts of the pool") == "; about 5 min left"  # 28 s for 28 % of a seed, 2.97 seeds to go


def test_every_line_says_which_seed(demo) -> None:
    """A second run is quick, and its lines are those of the first."""
    lines: list[str] = []
    run_demo(demo[0], 0, SMALL, lines.append, called="seed 1 of 3")
    assert len(lines) >= 5
    assert all(line.startswith("seed 1 of 3: ") for line in lines)
