"""Wrong requests and broken input: one line, an exit status, and the store as it was."""

import errno
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gradstore


def _line(row: dict, **changes: object) -> str:
    return json.dumps({k: v for k, v in (row | changes).items() if v is not ...}) + "\n"


GOOD = [
    {"problem_id": "new0", "prompt": "0+0=", "response": "85", "reward": reward, "source": "source0"}
    for reward in (0.0, 1.0)
]
BAD_ROLLOUTS = {
    "missing field": ([_line(GOOD[0]), _line(GOOD[1], reward=...)], ["line 2", "reward"]),
    "non-finite reward": ([_line(GOOD[0]), _line(GOOD[1], reward=float("nan"))], ["line 2", "reward"]),
    "infinite reward": ([_line(GOOD[0], reward=float("inf"))], ["line 1", "reward"]),
    "truncated JSON line": ([_line(GOOD[0]), _line(GOOD[1])[:25]], ["line 2"]),
    "not an object": ([_line(GOOD[0]), "[1, 2]\n"], ["line 2"]),
    "empty file": ([], ["bad.jsonl"]),
    "response longer than the context": (
        [_line(GOOD[0], response="9" * 200), _line(GOOD[1])],
        ["'new0'", "context is 128"],
    ),
    "another prompt": ([_line(GOOD[0]), _line(GOOD[1], prompt="another")], ["new0", "prompt"]),
    "text where a number belongs": ([_line(GOOD[0], reward="high")], ["line 1", "reward"]),
}


@pytest.mark.parametrize("name", BAD_ROLLOUTS)
def test_bad_rollouts_are_refused(cli, store, tmp_path, model_folder, name: str, snapshot) -> None:
    """One clear line with file, row and field; status 2; the store as it was."""
    lines, wanted = BAD_ROLLOUTS[name]
    before = snapshot(store)
    (tmp_path / "bad.jsonl").write_text("".join(lines))
    status, out, err = cli("collect", store, "pool", tmp_path / "bad.jsonl", "--model", model_folder, "--rank", 4)
    assert_refused(status, out, err, wanted)
    assert snapshot(store) == before
    assert cli("verify", store)[0] == 0


def assert_refused(status: int, out: str, err: str, wanted: list[str]) -> None:
    assert status == 2, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("gradstore: ")
    for text in wanted:
        assert text in err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["query", "{tmp}/nothing", "--against", "bench"], ["nothing"]),
        (["query", "{tmp}", "--against", "bench"], ["not a gradstore store"]),
        (["query", "{store}", "--against", "nobody", "--pool", "pool"], ["nobody"]),
        (["query", "{store}", "--against", "bench", "--pool", "nobody"], ["nobody"]),
        (["query", "{store}"], ["--against"]),
        (["query", "{store}", "--against", "bench", "--metric", "l2"], ["metric 'l2'"]),
        (["query", "{store}", "--against", "bench", "--top", "0"], ["--top is 0"]),
        (["query", "{store}", "--against", "bench", "--where", "colour=red"], ["colour=red"]),
        (["query", "{store}", "--against", "bench", "--index", "best"], ["index 'best'"]),
        (["select", "{store}", "--against", "bench", "-n", "100", "--out", "{tmp}/out"], ["9 of 100"]),
        (
            ["select", "{store}", "--against", "bench", "-n", "2", "--out", "{tmp}/out", "--selector", "best"],
            ["'best'"],
        ),
        (["select", "{store}", "-n", "2", "--out", "{tmp}/out", "--pool", "pool"], ["needs a target"]),
        (["collect", "{store}", "pool", "{tmp}/none.jsonl", "--model", "{model}"], ["none.jsonl"]),
        (["collect", "{store}", "pool", "{tmp}/pool.jsonl", "--model", "{tmp}"], ["{tmp}"]),
        (
            ["collect", "{store}", "pool", "{tmp}/pool.jsonl", "--model", "{model}", "--rank", "5"],
            ["projection.rank", "4", "5"],
        ),
        (["collect", "{store}", "pool", "{tmp}/pool.jsonl", "--model", "{model}", "--objective", "ppo"], ["'ppo'"]),
        (["collect", "{store}", "pool", "{tmp}/pool.jsonl", "--model", "{model}", "--step", "-1"], ["step is -1"]),
        (["collect", "{store}", "po/ol", "{tmp}/pool.jsonl", "--model", "{model}", "--rank", "4"], ["po/ol"]),
        (
            ["rollout", "{tmp}/pool.jsonl", "--model", "{model}", "--out", "{tmp}/r.jsonl", "--reward", "best"],
            ["'pool0' occurs twice", "line 2"],
        ),
        (
            ["rollout", "{model}/problems.jsonl", "--model", "{model}", "--out", "{tmp}/r.jsonl", "--reward", "best"],
            ["best"],
        ),
        (
            ["rollout", "{tmp}/none.jsonl", "--model", "{model}", "--out", "{tmp}/r.jsonl", "--reward", "math"],
            ["none.jsonl"],
        ),
        (["info", "{tmp}/nothing"], ["nothing"]),
        (["verify", "{tmp}/nothing"], ["nothing"]),
        (["compact", "{store}", "--collection", "nobody"], ["nobody"]),
        (["import", "{store}", "pool"], ["--problems"]),
        (["train"], ["--model", "--pool", "--out"]),
        (["train", "--backend", "jax"], ["jax", "local or verl"]),
        (["train", "--no-such-option"], ["--no-such-option", "NAME=VALUE"]),
        (
            [
                "train",
                "--model",
                "{model}",
                "--pool",
                "{tmp}/none.jsonl",
                "--out",
                "{tmp}/run",
                "k=20",
                "itersperselect=3",
            ],
            ["itersperselect", "iters_per_select"],
        ),
        (["report", "{store}", "--against", "nobody", "--out", "{tmp}/out"], ["nobody"]),
        (["report", "{store}", "--metric", "best", "--out", "{tmp}/out"], ["best", "cosine"]),
        (["report", "{store}", "--format", "pdf", "--out", "{tmp}/out"], ["pdf", "html"]),
        (["report", "{store}", "--rollouts", "{tmp}/none.jsonl", "--out", "{tmp}/out"], ["none.jsonl"]),
        (["report", "{tmp}/nothing", "--out", "{tmp}/out"], ["nothing"]),
        (["serve", "{store}", "--against", "nobody"], ["nobody"]),
        (["serve", "{store}", "--port", "70000"], ["70000"]),
        (["serve", "{store}", "--host", "0.0.0.0", "--no-token"], ["0.0.0.0", "--no-token"]),
        (["serve", "{tmp}/nothing"], ["nothing"]),
    ],
    ids=lambda value: " ".join(value[:1] + value[2:]) if isinstance(value, list) else None,
)
def test_wrong_requests(cli, store, tmp_path, model_folder, arguments, wanted, snapshot) -> None:
    """Whatever was asked wrongly, the answer is a line and nothing changes."""
    names = {"tmp": tmp_path, "store": store, "model": model_folder}
    before = snapshot(store)
    status, out, err = cli(*(argument.format(**names) for argument in arguments))
    assert_refused(status, out, err, [text.format(**names) for text in wanted])
    assert snapshot(store) == before
    assert not (tmp_path / "out").exists()


BAD_SKETCHES = {
    "unknown id": ({"id": ["pool0", "nobody"], "sketch": [1.0, 2.0]}, ["nobody"]),
    "duplicate id": ({"id": ["pool0", "pool0"], "sketch": [1.0, 2.0]}, ["pool0"]),
    "non-finite gradient": ({"id": ["pool0", "pool1"], "sketch": [1.0, float("nan")]}, ["pool1"]),
    "missing field": ({"name": ["pool0"], "sketch": [1.0]}, ["'id'"]),
}


@pytest.mark.parametrize("name", BAD_SKETCHES)
def test_bad_sketches_are_refused(cli, store, tmp_path, name: str, snapshot) -> None:
    """Sketches from elsewhere are checked whole before a row is written."""
    columns, wanted = BAD_SKETCHES[name]
    dim = gradstore.open(store).dim
    table = pa.table(columns | {"sketch": [np.full(dim, value, np.float32) for value in columns["sketch"]]})
    pq.write_table(table, tmp_path / "bad.parquet")
    before = snapshot(store)
    assert_refused(*cli("import", store, "pool", "--sketches", tmp_path / "bad.parquet", "--step", 1), wanted)
    assert snapshot(store) == before


def test_wrong_dimension_is_refused(cli, store, tmp_path, snapshot) -> None:
    """Rows of another width are not cut or padded."""
    pq.write_table(pa.table({"id": ["pool0"], "sketch": [np.ones(3, np.float32)]}), tmp_path / "bad.parquet")
    before = snapshot(store)
    dim = gradstore.open(store).dim
    refused = cli("import", store, "pool", "--sketches", tmp_path / "bad.parquet", "--step", 1)
    assert_refused(*refused, ["3", str(dim)])
    assert snapshot(store) == before


def test_duplicate_problems_are_refused(cli, store, tmp_path, write_lines, snapshot) -> None:
    """Two problems with one id would share their history."""
    rows = [{"id": "x", "prompt": "1"}, {"id": "x", "prompt": "2"}]
    before = snapshot(store)
    refused = cli("import", store, "pool", "--problems", write_lines(tmp_path / "p.jsonl", rows))
    assert_refused(*refused, ["'x'", "p.jsonl"])
    assert snapshot(store) == before


def test_a_model_with_broken_weights_is_refused(cli, store, tmp_path, tiny_model, tiny_tokenizer, snapshot) -> None:
    """Every gradient of such a model is non-finite; one line is better than a store of failures."""
    import copy

    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    broken = copy.deepcopy(tiny_model)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    tiny_tokenizer.save_pretrained(tmp_path / "broken")
    before = snapshot(store)
    refused = cli(
        "collect", store, "pool", tmp_path / "pool.jsonl", "--model", tmp_path / "broken", "--rank", 4, "--step", 1
    )
    assert_refused(*refused, ["model.layers.0.mlp.up_proj.weight", "not finite"])
    assert snapshot(store) == before


def test_unknown_options_are_usage_errors(cli, store) -> None:
    """A mistyped option must not be ignored."""
    status, _, err = cli("query", store, "--agianst", "bench")
    assert status == 2
    assert "--agianst" in err


@pytest.mark.parametrize(("code", "status"), [(errno.EROFS, 2), (errno.ENOSPC, 1)], ids=["read-only", "full"])
def test_a_disk_that_cannot_be_written(cli, store, tmp_path, model_folder, monkeypatch, code, status, snapshot) -> None:
    """A read-only disk is a wrong request, a full one is work that failed; both are one line and lose nothing."""
    before = snapshot(store)
    real_open, real_mkdir = os.open, os.mkdir

    def refuse(path: object) -> None:
        if str(store) in str(path):
            raise OSError(code, os.strerror(code), str(path))

    def open_(path, flags, *rest, **named):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return real_open(path, flags, *rest, **named)

    def mkdir(path, *rest, **named):
        refuse(path)
        return real_mkdir(path, *rest, **named)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "mkdir", mkdir)
    found, out, err = cli("collect", store, "pool", tmp_path / "pool.jsonl", "--model", model_folder, "--step", 1)
    monkeypatch.undo()
    assert found == status, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert str(store) in err
    assert snapshot(store) == before
