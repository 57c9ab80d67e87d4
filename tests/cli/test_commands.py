"""The command line as a person or a script meets it: real files, a real model, one road after another."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gradstore


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
    assert {**picked, "notices": []} == json.loads(out)
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


def test_info_verify_compact(cli, store, snapshot) -> None:
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


def test_rollout_then_collect(cli, tmp_path, model_folder, write_lines, accepted) -> None:
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
    collect = ["collect", tmp_path / "s", "pool", tmp_path / "r.jsonl", "--model", model_folder, "--rank", 4, "--json"]
    status, out, err = cli(*collect, *accepted)
    assert status == 0, err
    assert json.loads(out)["collected"] == 6
    status, out, err = cli(*collect)
    assert json.loads(out)["skipped"] == 6


def test_import(cli, tmp_path, write_lines) -> None:
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


@pytest.fixture
def small_demo(monkeypatch) -> None:
    """The demo at a size a test can afford."""
    from gradstore.demo import course, run

    small = run.DemoSettings(n_pool=100, n_benchmark=20, n_selected=10, n_rollouts=6, dim=200, n_fitted=30)
    monkeypatch.setattr(run, "DemoSettings", lambda: small)
    monkeypatch.setattr(course, "SHOWN", course.CourseSettings())


def test_demo(cli, tmp_path, small_demo) -> None:
    """The command a newcomer runs first: tables for people, JSON for scripts."""
    status, out, err = cli("demo", "--out", tmp_path / "demo", "--seeds", 1)
    assert status == 0, err
    for text in ("pool against benchmark", "cosine", "accgreedy", "target family", "bytes per problem"):
        assert text in out
    status, out, err = cli("demo", "--out", tmp_path / "demo", "--seeds", 1, "--json")
    assert status == 0, err
    assert json.loads(out)["shares"]["rand"]["family"][1] == 0.0
    assert json.loads(out)["report"] == str(tmp_path / "demo" / "report.html")


def test_demo_without_what_the_report_needs(cli, tmp_path, small_demo, monkeypatch) -> None:
    """After a plain `pip install gradstore[cpu]`: everything but the report, and one line on how to come by it."""
    for name in ("plotly", "matplotlib", "dash", "waitress", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    folder = tmp_path / "demo"
    status, out, err = cli("demo", "--out", folder, "--seeds", 1)
    assert status == 0, err
    assert "target family" in out
    assert "± " not in out
    (line,) = [line for line in (out + err).splitlines() if "pip install" in line]
    assert line == out.splitlines()[-1]
    assert "the report needs plotly: pip install 'gradstore[plots]'" in line
    assert not (folder / "report.html").exists()
    status, out, err = cli("demo", "--out", folder, "--seeds", 1, "--json")
    assert status == 0, err
    assert json.loads(out)["report"] is None
    assert err.splitlines()[-1] == line
    monkeypatch.undo()
    assert cli(*line.split("then: gradstore ")[1].split())[0] == 0
    assert (folder / "report.html").stat().st_size > 1_000_000
