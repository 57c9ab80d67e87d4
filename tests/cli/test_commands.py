"""The command line as a person or a script meets it: real files, a real model, exit statuses, one line an error."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gradstore


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    write_lines(folder / "problems.jsonl", [{"id": "a", "prompt": "1+1=", "ground_truth": "2"}])
    return folder


def rollout_rows(prefix: str, n: int, seed: int = 0) -> list[dict]:
    random = np.random.default_rng(seed)
    return [
        {
            "problem_id": f"{prefix}{i}",
            "prompt": f"{i}+{i}=",
            "response": str(int(random.integers(0, 99))),
            "reward": float(j % 2 if i % 5 else 1),
            "source": f"source{i % 2}",
        }
        for i in range(n)
        for j in range(4)
    ]


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def store(cli, tmp_path, model_folder) -> Path:
    """A pool of 12 problems and a benchmark of 4, collected from the command line."""
    path = tmp_path / "store"
    for name, n in (("pool", 12), ("bench", 4)):
        rollouts = write_lines(tmp_path / f"{name}.jsonl", rollout_rows(name, n))
        status, _, err = cli("collect", path, name, rollouts, "--model", model_folder, "--rank", 4)
        assert status == 0, err
    return path


def snapshot(store: Path) -> dict:
    """Every row as published, to compare before and after a refused request."""
    opened = gradstore.open(store)
    return {
        name: (opened.commit(name), opened.view(name).ids.tolist(), opened.view(name).norms.tolist())
        for name in opened.collections
    }


def test_collect_query_select(cli, store, tmp_path) -> None:
    """The road from rollouts to files a trainer reads."""
    status, out, err = cli("query", store, "--against", "bench", "--top", 5, "--layers", 2, "--json")
    assert status == 0, err
    answer = json.loads(out)
    assert len(answer["hits"]) == 5
    assert {"rank", "id", "score", "pass_rate", "age", "source", "problem", "layers"} == set(answer["hits"][0])
    scores = [hit["score"] for hit in answer["hits"]]
    assert scores == sorted(scores, reverse=True)
    status, out, err = cli("query", store, "--against", "bench", "--top", 5)
    assert status == 0, err
    for hit in answer["hits"]:
        assert hit["id"] in out
        assert hit["problem"] in out
    status, out, err = cli("select", store, "--against", "bench", "-n", 5, "--out", tmp_path / "picked", "--json")
    assert status == 0, err
    picked = json.loads((tmp_path / "picked" / "selection.json").read_text())
    assert picked == json.loads(out)
    assert [p["id"] for p in picked["problems"]] == [hit["id"] for hit in answer["hits"]]
    assert picked["commit"] == gradstore.open(store).commit("pool")
    table = pq.read_table(tmp_path / "picked" / "train.parquet").to_pylist()
    lines = [json.loads(line) for line in (tmp_path / "picked" / "train.jsonl").read_text().splitlines()]
    assert [row["extra_info"]["index"] for row in table] == [p["id"] for p in picked["problems"]]
    assert [row["extra_info"]["index"] for row in lines] == [p["id"] for p in picked["problems"]]
    assert table[0]["prompt"] == [{"role": "user", "content": answer["hits"][0]["problem"]}]


def test_flat_index_answers_like_the_scan(cli, store) -> None:
    """Two roads, one answer."""
    found = [
        json.loads(cli("query", store, "--against", "bench", "--index", index, "--json", *more)[1])["hits"]
        for more in ((), ("--smallest",), ("--metric", "dot"), ("--where", "source=source1"))
        for index in ("scan", "flat")
    ]
    for scan, flat in zip(found[::2], found[1::2], strict=True):
        assert [hit["id"] for hit in scan] == [hit["id"] for hit in flat]
        assert scan


def test_info_verify_compact(cli, store) -> None:
    """What is in a store, whether it is whole, and its housekeeping."""
    status, out, _ = cli("info", store, "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["collections"]["pool"]["problems"] == 12
    assert facts["collections"]["pool"]["states"] == {"live": 9, "no_signal": 3, "failed": 0}
    assert cli("info", store)[0] == 0
    assert cli("verify", store)[0] == 0
    before = snapshot(store)
    assert cli("compact", store, "--keep", "newest")[0] == 0
    after = snapshot(store)
    assert {name: rows[1:] for name, rows in before.items()} == {name: rows[1:] for name, rows in after.items()}
    assert cli("verify", store)[0] == 0


def test_verify_names_the_damage(cli, store) -> None:
    """A flipped byte is found, with its file and chunk, and the exit status is 1."""
    codes = next(path for path in store.rglob("*") if path.is_file() and "/codes/c" in path.as_posix())
    raw = bytearray(codes.read_bytes())
    raw[7] ^= 16
    codes.write_bytes(raw)
    status, out, _ = cli("verify", store)
    assert status == 1
    assert codes.relative_to(store).as_posix() in out
    assert "chunk 0" in out
    status, out, _ = cli("verify", store, "--json")
    assert status == 1
    assert json.loads(out)["findings"][0]["chunk"] == 0


def test_rollout_then_collect(cli, tmp_path, model_folder) -> None:
    """Problems in, rollouts out, sketches in the store: with a reward function of one's own."""
    problems = write_lines(
        tmp_path / "problems.jsonl", [{"id": f"a{i}", "prompt": f"{i}=", "ground_truth": "1"} for i in range(6)]
    )
    (tmp_path / "mine.py").write_text(
        "def score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return float(len(solution_str) % 2)\n"
    )
    arguments = [
        "rollout",
        problems,
        "--model",
        model_folder,
        "--out",
        tmp_path / "r.jsonl",
        "-n",
        4,
        "--max-new-tokens",
        5,
        "--reward",
        f"{tmp_path / 'mine.py'}:score",
    ]
    status, out, err = cli(*arguments, "--json")
    assert status == 0, err
    assert json.loads(out)["rollouts"] == 24
    before = (tmp_path / "r.jsonl").read_bytes()
    assert cli(*arguments)[0] == 0
    assert (tmp_path / "r.jsonl").read_bytes() == before
    status, out, err = cli(
        "collect", tmp_path / "s", "pool", tmp_path / "r.jsonl", "--model", model_folder, "--rank", 4, "--json"
    )
    assert status == 0, err
    assert json.loads(out)["collected"] == 6
    status, out, err = cli(
        "collect", tmp_path / "s", "pool", tmp_path / "r.jsonl", "--model", model_folder, "--rank", 4, "--json"
    )
    assert json.loads(out)["skipped"] == 6


def test_import(cli, tmp_path) -> None:
    """Sketches made elsewhere get ids, steps and history like any other."""
    problems = write_lines(tmp_path / "p.jsonl", [{"id": f"a{i}", "prompt": "?"} for i in range(4)])
    sketches = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    table = pa.table({"id": [f"a{i}" for i in range(4)], "sketch": list(sketches), "pass_rate": [0.5] * 4})
    pq.write_table(table, tmp_path / "s.parquet")
    (tmp_path / "f.json").write_text('{"made": "elsewhere"}')
    arguments = ["import", tmp_path / "store", "pool", "--sketches", tmp_path / "s.parquet", "--step", 2]
    status, _, err = cli(*arguments)
    assert status == 2
    assert "--fingerprint" in err
    status, _, err = cli(*arguments, "--problems", problems, "--fingerprint", tmp_path / "f.json")
    assert status == 0, err
    view = gradstore.open(tmp_path / "store").view("pool")
    np.testing.assert_allclose(view.norms, np.linalg.norm(sketches, axis=1), rtol=1e-6)
    assert view.steps.tolist() == [2] * 4


def _line(row: dict, **changes: object) -> str:
    return json.dumps({k: v for k, v in (row | changes).items() if v is not ...}) + "\n"


GOOD = rollout_rows("new", 2)
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
def test_bad_rollouts_are_refused(cli, store, tmp_path, model_folder, name: str) -> None:
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
        (["query", "{store}", "--against", "bench", "--top", "0"], ["k is 0"]),
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
        (["serve", "{tmp}/nothing"], ["nothing"]),
    ],
    ids=lambda value: " ".join(value[:1] + value[2:]) if isinstance(value, list) else None,
)
def test_wrong_requests(cli, store, tmp_path, model_folder, arguments, wanted) -> None:
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
def test_bad_sketches_are_refused(cli, store, tmp_path, name: str) -> None:
    """Sketches from elsewhere are checked whole before a row is written."""
    columns, wanted = BAD_SKETCHES[name]
    dim = gradstore.open(store).dim
    table = pa.table(columns | {"sketch": [np.full(dim, value, np.float32) for value in columns["sketch"]]})
    pq.write_table(table, tmp_path / "bad.parquet")
    before = snapshot(store)
    assert_refused(*cli("import", store, "pool", "--sketches", tmp_path / "bad.parquet", "--step", 1), wanted)
    assert snapshot(store) == before


def test_wrong_dimension_is_refused(cli, store, tmp_path) -> None:
    """Rows of another width are not cut or padded."""
    pq.write_table(pa.table({"id": ["pool0"], "sketch": [np.ones(3, np.float32)]}), tmp_path / "bad.parquet")
    before = snapshot(store)
    dim = gradstore.open(store).dim
    refused = cli("import", store, "pool", "--sketches", tmp_path / "bad.parquet", "--step", 1)
    assert_refused(*refused, ["3", str(dim)])
    assert snapshot(store) == before


def test_duplicate_problems_are_refused(cli, store, tmp_path) -> None:
    """Two problems with one id would share their history."""
    rows = [{"id": "x", "prompt": "1"}, {"id": "x", "prompt": "2"}]
    before = snapshot(store)
    refused = cli("import", store, "pool", "--problems", write_lines(tmp_path / "p.jsonl", rows))
    assert_refused(*refused, ["'x'", "p.jsonl"])
    assert snapshot(store) == before


def test_a_model_with_broken_weights_is_refused(cli, store, tmp_path, tiny_model, tiny_tokenizer) -> None:
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


def test_demo(cli, tmp_path, monkeypatch) -> None:
    """The command a newcomer runs first, at a size a test can afford: tables for people, JSON for scripts."""
    from trainer.demo import run

    small = run.DemoSettings(n_pool=100, n_benchmark=20, n_selected=10, n_rollouts=6, dim=200, n_fitted=30)
    monkeypatch.setattr(run, "DemoSettings", lambda: small)
    status, out, err = cli("demo", "--out", tmp_path / "demo", "--seeds", 1)
    assert status == 0, err
    for text in ("pool against benchmark", "cosine", "accgreedy", "target family", "bytes per problem"):
        assert text in out
    status, out, err = cli("demo", "--out", tmp_path / "demo", "--seeds", 1, "--json")
    assert status == 0, err
    assert json.loads(out)["shares"]["rand"]["family"][1] == 0.0


@pytest.mark.parametrize(("code", "status"), [(errno.EROFS, 2), (errno.ENOSPC, 1)], ids=["read-only", "full"])
def test_a_disk_that_cannot_be_written(cli, store, tmp_path, model_folder, monkeypatch, code, status) -> None:
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
