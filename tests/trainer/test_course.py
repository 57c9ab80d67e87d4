"""The demo's short training run: it records what it does, learns, and goes on after an interruption."""

from pathlib import Path

import numpy as np
import pytest

import gradstore
from gradstore.cli import demo
from gradstore.demo.course import CourseSettings, run_course

SMALL = CourseSettings(n_pool=40, n_benchmark=12, n_rounds=2, n_selected=8)


class StoppedError(Exception):
    """What an interruption is here."""


def test_an_interrupted_run_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    """Stopped after its first round and started again: the same rows, the same picks, no round twice."""
    whole = run_course(tmp_path / "whole", SMALL)

    def stop(step: int) -> None:
        if step == SMALL.n_updates:
            raise StoppedError

    with pytest.raises(StoppedError):
        run_course(tmp_path / "stopped", SMALL, stop)
    again = run_course(tmp_path / "stopped", SMALL)
    assert [one.picks for one in again.rounds("pool")] == [one.picks for one in whole.rounds("pool")]
    for name in whole.collections:
        for step in whole.steps(name):
            a, b = whole.view(name, step), again.view(name, step)
            assert a.ids.tolist() == b.ids.tolist()
            assert np.array_equal(a.rows(np.arange(len(a))), b.rows(np.arange(len(b))))
    commits = [again.commit(name) for name in again.collections]
    run_course(tmp_path / "stopped", SMALL)
    assert [gradstore.open(tmp_path / "stopped/store").commit(name) for name in again.collections] == commits


def test_the_demo_ends_with_its_report(tmp_path: Path) -> None:
    """The page that `gradstore demo` names is there and shows the rounds."""
    page, told = demo._shown(tmp_path, SMALL)
    assert page == tmp_path / "report.html"
    assert str(page) in told
    assert "Alignment gained by each selector" in page.read_text()
