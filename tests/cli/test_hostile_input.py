"""The command line on files of others: no control characters on the terminal, no output where it does harm."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradstore.wording import json_shown, shown
from tests.fuzz.inputs import honest_rows

CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
NASTY = "\x1b[2J\x1b]0;owned\x07\u009b31m\u202egnp.exe\u2066\r\nforged é∂😀 [red]:smile:\\"


@pytest.fixture
def nasty_store(cli, tmp_path: Path, write_lines: Callable) -> Path:
    """A pool and a benchmark whose ids, sources and prompts would drive a terminal."""
    store = tmp_path / "store"
    (tmp_path / "f.json").write_text(json.dumps({"model": NASTY}), encoding="utf-8")
    for name in ("pool", "bench"):
        ids = [f"{NASTY}{i}" for i in range(6)]
        rows = honest_rows("sketches")
        pq.write_table(
            pa.Table.from_pylist([r | {"id": i} for r, i in zip(rows, ids, strict=True)]), tmp_path / "s.parquet"
        )
        problems = [{"id": i, "prompt": NASTY, "source": NASTY} for i in ids]
        arguments = ("--problems", write_lines(tmp_path / "p.jsonl", problems), "--fingerprint", tmp_path / "f.json")
        done = cli("import", store, name, "--sketches", tmp_path / "s.parquet", "--step", 0, *arguments)
        assert done[0] == 0, done
    return store


def test_no_control_characters_on_the_terminal(cli, nasty_store: Path, tmp_path: Path) -> None:
    """Tables, lists and errors escape them; other letters stay readable, and JSON says what it said."""
    against = ("--against", "bench", "--pool", "pool")
    for command in (("query", nasty_store, *against), ("info", nasty_store), ("verify", nasty_store)):
        status, out, err = cli(*command)
        assert status == 0, err
        assert not CONTROL.search(out + err), (command, out + err)
    status, out, _ = cli("query", nasty_store, *against, "--json")
    assert not CONTROL.search(out)
    hits = json.loads(out)["hits"]
    assert {hit["id"] for hit in hits} == {f"{NASTY}{i}" for i in range(6)}
    assert {hit["source"] for hit in hits} == {NASTY}
    status, out, _ = cli("query", nasty_store, *against)
    assert "é∂😀 [red]:smile" in out
    for command in (
        ("query", nasty_store, "--against", NASTY, "--pool", "pool"),
        ("import", nasty_store, "pool", "--problems", tmp_path / f"none{NASTY.replace('/', '')}"),
        ("info", tmp_path / NASTY),
    ):
        status, out, err = cli(*command)
        assert status == 2
        assert err.count("\n") == 1
        assert not CONTROL.search(out + err), err


def test_shown() -> None:
    """Escapes as Python and JSON spell them."""
    assert shown("a\x1b\n\t\u202e\ud800\x9b é∂😀") == r"a\x1b\n\t\u202e\ud800\x9b é∂😀"
    assert shown("x" * 5000, most=1000) == "x" * 500 + " … " + "x" * 500
    value = {"a\x9b": [NASTY, "\u2066\x7f"]}
    text = json_shown(json.dumps(value, ensure_ascii=False, indent=2))
    assert json.loads(text) == value
    assert not CONTROL.search(text)


def test_outputs_inside_a_store_or_over_an_input(
    cli, store: Path, tmp_path: Path, model_folder: Path, snapshot
) -> None:
    """The store's folder is its own: a selection or a report in it looks like a part of it, links followed."""
    (tmp_path / "link").symlink_to(store)
    problems = model_folder / "problems.jsonl"
    before, files = snapshot(store), sorted(store.rglob("*"))
    for inside in (store / "out", tmp_path / "link/collections/out", store / "x" / ".." / "out"):
        file = inside.with_suffix(".jsonl")
        for command in (
            ("select", store, "--against", "bench", "-n", 2, "--out", inside),
            ("report", store, "--out", inside.with_suffix(".html")),
            ("report", store, "--out", tmp_path / "r.html", "--figures", inside),
            ("rollout", problems, "--model", model_folder, "--out", file, "--reward", "math"),
            ("data", problems, "--out", file),
            ("train", "--model", model_folder, "--pool", problems, "--out", inside, "candidates=4", "selected=1"),
        ):
            status, _, err = cli(*command)
            assert status == 2, err
            assert "lies in the store" in err, err
            assert err.count("\n") == 1
    for command in (
        ("select", store, "--against", "bench", "-n", 2, "--out", store),
        ("train", "--model", model_folder, "--pool", problems, "--out", store, "candidates=4", "selected=1"),
    ):
        status, _, err = cli(*command)
        assert status == 2
        assert "is a store" in err, err
    pool = tmp_path / "pool.jsonl"
    status, _, err = cli("rollout", pool, "--model", model_folder, "--out", pool, "--reward", "math")
    assert (status, "is also an input" in err) == (2, True), err
    status, _, err = cli("report", store, "--out", pool, "--rollouts", pool)
    assert (status, "the suffix '.jsonl' is not one of" in err) == (2, True), err
    link = tmp_path / "report"
    link.symlink_to(pool)
    status, _, err = cli("report", store, "--out", link, "--rollouts", pool)
    assert (status, "is also an input" in err) == (2, True), err
    assert snapshot(store) == before
    assert sorted(store.rglob("*")) == files


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", "-1", "temperature is -1"),
        ("--temperature", "0", "temperature is 0"),
        ("--temperature", "nan", "temperature is nan"),
        ("--top-p", "0", "top_p is 0"),
        ("-n", "0", "n is 0"),
    ],
)
def test_settings_that_make_no_sense(cli, tmp_path: Path, model_folder: Path, option, value, message) -> None:
    """They are refused before anything is sampled or written; temperature 0 makes sense for rollouts, not to train."""
    problems = model_folder / "problems.jsonl"
    commands = []
    if option == "--temperature":
        asked = ("--model", model_folder, "--pool", problems, "--out", tmp_path / "run", "candidates=4", "selected=1")
        commands.append(("train", *asked, option, value))
    if value != "0" or option != "--temperature":
        asked = (problems, "--model", model_folder, "--out", tmp_path / "r.jsonl", "--reward", "math")
        commands.append(("rollout", *asked, option, value))
    for command in commands:
        status, _, err = cli(*command)
        assert status == 2, err
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "r.jsonl").exists()


def test_pipes_are_refused_by_every_command(cli, store: Path, tmp_path: Path, model_folder: Path, snapshot) -> None:
    """`<(zcat rollouts.gz)` would hang or be half read; the way on is said."""
    pipe, before = tmp_path / "pipe.jsonl", snapshot(store)
    os.mkfifo(pipe)
    for command in (
        ("collect", store, "pool", pipe, "--model", model_folder, "--step", 1),
        ("collect", store, "pool", tmp_path / "pool.jsonl", "--model", model_folder, "--step", 1, "--problems", pipe),
        ("rollout", pipe, "--model", model_folder, "--out", tmp_path / "r.jsonl", "--reward", "math"),
        ("data", pipe, "--out", tmp_path / "d.jsonl"),
        ("import", store, "pool", "--problems", pipe),
        ("import", store, "pool", "--sketches", pipe, "--step", 1),
        ("import", tmp_path / "new", "pool", "--sketches", tmp_path / "none", "--step", 1, "--fingerprint", pipe),
        ("report", store, "--out", tmp_path / "r.html", "--rollouts", pipe),
        ("train", "--model", model_folder, "--pool", pipe, "--out", tmp_path / "run", "candidates=4", "selected=1"),
        ("train", "--config", pipe, "--out", tmp_path / "run"),
    ):
        status, _, err = cli(*command)
        assert status == 2, err
        assert err.count("\n") == 1, err
        assert "a pipe" in err or "none" in err, err
    assert snapshot(store) == before


def test_a_bad_group_makes_no_store(cli, tmp_path: Path, model_folder: Path, rollout_files, accepted) -> None:
    """The last group is too long for the model: found after the store's projection was made, before any row."""
    row = {"problem_id": "z", "prompt": "1+1=", "response": "9" * 200, "reward": 0.0}
    with rollout_files["pool"].open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row | {"reward": reward}) + "\n" for reward in (0.0, 1.0))
    for basis in ("random", "fitted"):
        arguments = ("--model", model_folder, "--rank", 4, "--basis", basis, *accepted)
        status, _, err = cli("collect", tmp_path / "new", "pool", rollout_files["pool"], *arguments)
        assert status == 2, err
        assert "'z'" in err
        assert not (tmp_path / "new").exists()
