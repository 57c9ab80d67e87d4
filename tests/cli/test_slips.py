"""Slips that are no wrong requests: what they do is said, and what can be read is read."""

import csv
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import gradstore
from gradstore import RequestError, State, engine
from gradstore.durable import folder_bytes
from gradstore.engine.assessing.mixed_up import mixed_up
from gradstore.engine.searching.notices import notices
from gradstore.reading.opening import open_rows


@pytest.fixture
def store(tmp_path: Path) -> gradstore.Store:
    """A pool at steps 0 and 4, a benchmark at step 0, and one whose problems all have no signal."""
    made = gradstore.create(tmp_path / "store", dim=4, fingerprint={"model": "m", "layout": [["all", 0, 4]]})
    for name, n, steps in (("pool", 8, (0, 4)), ("bench", 2, (0,)), ("flat", 3, (0,))):
        ids = [f"{name}{i}" for i in range(n)]
        made.add_problems(name, [{"id": one, "prompt": one} for one in ids])
        for step in steps:
            with made.writer(name, step=step) as writer:
                state = [State.NO_SIGNAL if name == "flat" else State.LIVE] * n
                writer.append(ids, np.eye(4, dtype=np.float32)[np.arange(n) % 4], state=state)
    return gradstore.open(tmp_path / "store")


def test_a_step_without_rows_is_said(store: gradstore.Store) -> None:
    """Also one after the last; a step that some row has is not worth a word."""
    for step, said in ((4, False), (0, False), (3, True), (99, True)):
        found = notices(store.view("pool", step), [engine.target(store, "bench", step)])
        assert any("steps 0, 4" in sentence for sentence in found) is said


def test_a_benchmark_without_gradient_says_why(cli, store: gradstore.Store, tmp_path: Path) -> None:
    """And is not asked for by a selector that goes by no benchmark."""
    with pytest.raises(RequestError, match="all rewarded alike"):
        engine.target(store, "flat")
    status, _, err = cli(
        "select", store.path, "--pool", "pool", "--against", "flat", "-n", 2, "--selector", "rand",
        "--out", tmp_path / "picks",
    )  # fmt: skip
    assert status == 0, err
    assert "--against is not used" in err


def test_rollouts_under_a_wrong_name(store: gradstore.Store) -> None:
    """A new name near an old one, and another collection's problems; a new pool of its own is nothing to say."""
    assert "did you mean 'pool'" in str(mixed_up(store, "pol", ["pool0"]))
    assert "are in 'pool'" in str(mixed_up(store, "bench", ["pool0", "pool1"]))
    assert mixed_up(store, "bench", ["bench0", "pool1"]) is None
    assert mixed_up(store, "bench", ["new"]) is None
    assert mixed_up(store, "exam", ["new"]) is None


@pytest.mark.parametrize("separator", ";\t,")
def test_other_separators_of_csv(tmp_path: Path, separator: str) -> None:
    """What a spreadsheet of another language writes; a cell without text is None."""
    with (tmp_path / "p.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([["id", "b"], ["p", "x"], ["q", ""]])
    rows = [row.value for row in open_rows(tmp_path / "p.csv").scan()]
    assert rows == [{"id": "p", "b": "x"}, {"id": "q", "b": None}]


def test_what_columns_did_is_said(cli, tmp_path: Path) -> None:
    """Another truth for the same question, ids that are not unique, empty cells."""
    own, out = tmp_path / "own.csv", tmp_path / "p.jsonl"
    own.write_text("q,a,n\n1+1?,2,x\n1+1?,3,x\n2+2?,4,x\n3+3?,,y\n", encoding="utf-8")
    columns = ["--prompt", "q", "--truth", "a", "--id", "n"]
    status, _, err = cli("data", own, *columns, "--out", out)
    assert status == 0, err
    assert "1 of the duplicates have another ground truth" in err
    assert "2 values of 'n' are not unique" in err
    assert "1 the answer is empty" in err
    assert len(out.read_text(encoding="utf-8").splitlines()) == 2


def test_rollouts_of_own_columns(cli, tmp_path: Path, model_folder: Path) -> None:
    """`rollout` takes a file or data set with --prompt and --truth as `data` does: the same problems and rows."""
    own = tmp_path / "own.csv"
    own.write_text("q,a\n1+1?,2\n2+2?,4\n", encoding="utf-8")
    columns = ["--prompt", "q", "--truth", "a"]
    sampling = ["--model", model_folder, "--reward", "math", "--max-new-tokens", 4, "-n", 2]
    assert cli("data", own, *columns, "--out", tmp_path / "p.jsonl")[0] == 0
    status, _, err = cli("rollout", own, *columns, *sampling, "--out", tmp_path / "one.jsonl")
    assert status == 0, err
    assert "the first, own-" in err
    assert cli("rollout", tmp_path / "p.jsonl", *sampling, "--out", tmp_path / "two.jsonl")[0] == 0
    one, two = ((tmp_path / name).read_text(encoding="utf-8") for name in ("one.jsonl", "two.jsonl"))
    assert [json.loads(line)["response"] for line in one.splitlines()] == [
        json.loads(line)["response"] for line in two.splitlines()
    ]


@pytest.mark.parametrize(("options", "said"), [(["-n", 1], "one rollout"), (["-n", 2, "--temperature", 0], "the same")])
def test_rollouts_without_differing_rewards(cli, tmp_path: Path, model_folder: Path, options: list, said: str) -> None:
    """Said before they are sampled."""
    status, _, err = cli(
        "rollout", model_folder / "problems.jsonl", "--model", model_folder, "--reward", "math", "--as-text",
        "--max-new-tokens", 4, *options, "--out", tmp_path / "r.jsonl",
    )  # fmt: skip
    assert status == 0, err
    assert said in err.splitlines()[0]
    assert "no problem will have a gradient" in err.splitlines()[0]


def test_no_bar_of_another_library(model_folder: Path) -> None:
    """Neither in a terminal: that of the weights would stand between this program's own lines."""
    from transformers.utils import logging

    from gradstore.engine.gradients.models import load_model

    logging.enable_progress_bar()
    load_model(model_folder)
    assert not logging.is_progress_bar_enabled()


def test_bytes_on_disk(tmp_path: Path) -> None:
    """A preallocated file takes what was written to it."""
    with (tmp_path / "chunk").open("wb") as file:
        file.write(b"x" * 4096)
        file.truncate(10 << 20)
    assert folder_bytes(tmp_path) == 10 << 20
    assert folder_bytes(tmp_path, on_disk=True) < 1 << 20


def test_names_and_views_in_python(store: gradstore.Store) -> None:
    """Lists of benchmarks' names are taken, a view gives its ids, and what is no view is refused in a line."""
    view = store.view("pool")
    assert list(view) == view.ids.tolist()
    goal = engine.target(store, "bench")
    assert goal.to_pandas()["benchmark"].tolist() == ["bench"]
    both = engine.search_fused(view, ["bench", "bench"], 3)
    assert both.ids.tolist() == engine.search_fused(view, [goal, goal], 3).ids.tolist()
    assert engine.search_each(view, "bench", 3)[0].ids.tolist() == engine.search(view, goal, 3).ids.tolist()
    with pytest.raises(RequestError, match=r"store\.view"):
        engine.search(store, "bench", 3)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="not by View"):
        engine.select(store, view, "bench", 3)  # type: ignore[arg-type]
    for asked in (view.positions, partial(store.records, "pool"), view.take):
        with pytest.raises(RequestError, match=r"ids are 'pool0', expected a list of them: \['pool0'\]"):
            asked("pool0")
    with pytest.raises(RequestError, match="k is '3', expected a number"):
        engine.search(view, "bench", "3")  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match=r"gradstore\.engine has no 'serch'; did you mean 'search'\?"):
        _ = engine.serch


def test_a_place_without_rights(cli, store: gradstore.Store, tmp_path: Path, monkeypatch) -> None:
    """Said before any work is done for it: nothing is read of the store or the model."""
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and may(path, mode))
    rollouts = tmp_path / "rollouts.jsonl"
    rollouts.touch()
    for request in (
        ["data", "reasoning-gym:gcd:2", "--out", tmp_path / "p.jsonl"],
        ["select", store.path, "--pool", "pool", "--against", "bench", "-n", 2, "--out", tmp_path / "deep" / "picks"],
        ["report", store.path, "--out", tmp_path / "report.html"],
        ["collect", tmp_path / "new", "pool", rollouts, "--model", "nothing"],
    ):
        status, _, err = cli(*request)
        assert status == 2
        assert err == f"gradstore: {tmp_path}: cannot be written to (no permission): choose another place\n"


@pytest.mark.parametrize(("closed", "status"), [(">&-", 0), ("> /dev/full", 1)])
def test_an_output_that_cannot_be_written(store: gradstore.Store, closed: str, status: int) -> None:
    """Closed by the caller, or on a full disk: no traceback."""
    line = f'"{sys.executable}" -m gradstore info "{store.path}" --quiet {closed}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert done.stderr == ("gradstore: standard output, or a file: No space left on device\n" if status else "")
