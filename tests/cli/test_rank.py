"""`query` and `select` with metrics, indexes, several benchmarks and diversity."""

import json

import numpy as np
import pytest

import gradstore
from engine import fuse_scores, search, target

DIM = 16


@pytest.fixture
def store(tmp_path):
    """A pool of 300 rows and two benchmarks."""
    random = np.random.default_rng(0)
    made = gradstore.create(tmp_path / "store", dim=DIM, fingerprint={})
    for name, n in (("pool", 300), ("algebra", 6), ("logic", 6)):
        ids = [f"{name}{i}" for i in range(n)]
        made.add_problems(name, [{"id": i, "prompt": f"What is {i}?"} for i in ids])
        with made.writer(name, step=0) as writer:
            writer.append(ids, random.normal(size=(n, DIM)).astype(np.float32), pass_rate=np.full(n, 0.5, np.float32))
    return made


@pytest.mark.parametrize("how", ["mean", "minimum", "rrf"])
def test_two_benchmarks(cli, store, how: str) -> None:
    """What is printed is the combined ranking, with the score against each benchmark beside it."""
    both = ("--against", "algebra", "--against", "logic", "--pool", "pool")
    status, out, err = cli("query", store.path, *both, "--fuse", how, "-k", 5, "--json")
    assert status == 0, err
    answer = json.loads(out)
    view = store.view("pool")
    every = [search(view, target(store, name), 300) for name in ("algebra", "logic")]
    of = [dict(zip(hits.ids.tolist(), hits.scores.tolist(), strict=True)) for hits in every]
    fused = dict(zip(of[0], fuse_scores(np.array([[s[i] for i in of[0]] for s in of]), how), strict=True))
    assert [hit["id"] for hit in answer["hits"]] == sorted(fused, key=lambda i: (-fused[i], i))[:5]
    first = answer["hits"][0]
    assert first["scores"] == pytest.approx({"algebra": of[0][first["id"]], "logic": of[1][first["id"]]})
    assert [goal["benchmark"] for goal in answer["targets"]] == ["algebra", "logic"]
    status, out, _ = cli("query", store.path, *both, "--fuse", how, "-k", 5)
    assert status == 0
    assert f"algebra and logic ({how})" in out


def test_weights(cli, store) -> None:
    """All the weight on one benchmark is that benchmark's ranking."""
    both = ("--against", "algebra", "--against", "logic", "--pool", "pool")
    _, out, _ = cli("query", store.path, *both, "--weight", 1, "--weight", 0, "-k", 5, "--json")
    _, alone, _ = cli("query", store.path, "--against", "algebra", "--pool", "pool", "-k", 5, "--json")
    assert [hit["id"] for hit in json.loads(out)["hits"]] == [hit["id"] for hit in json.loads(alone)["hits"]]


def test_fisher(cli, store) -> None:
    """The damping given is the damping used, and is in the record."""
    options = ("--against", "logic", "--pool", "pool", "--metric", "fisher", "-k", 7, "--layers", 1, "--json")
    for damping in (0.1, 5.0):
        status, out, err = cli("query", store.path, *options, "--damping", damping)
        assert status == 0, err
        answer = json.loads(out)
        hits = search(store.view("pool"), target(store, "logic"), 7, metric="fisher", damping=damping)
        assert [hit["id"] for hit in answer["hits"]] == hits.ids.tolist()
        assert answer["damping"] == damping
        assert answer["hits"][0]["layers"]["all"] == pytest.approx(answer["hits"][0]["score"], rel=1e-4)


@pytest.mark.parametrize("index", ["auto", "flat", "sq", "rabitq", "ivf"])
def test_indexes(cli, store, index: str) -> None:
    """An index from the command line answers as the scan does, or says that it is refused."""
    options = ("query", store.path, "--against", "logic", "--pool", "pool", "-k", 5, "--json")
    _, expected, _ = cli(*options)
    status, out, err = cli(*options, "--index", index)
    assert status == 0, err
    found = {hit["id"] for hit in json.loads(out)["hits"]}
    assert len(found & {hit["id"] for hit in json.loads(expected)["hits"]}) >= 4
    assert cli("verify", store.path)[0] == 0


def test_a_refused_index_is_told(cli, store, monkeypatch) -> None:
    """The exact scan answers and a line says why."""
    monkeypatch.setattr("engine.indexes.serve.self_test", refused)
    options = ("query", store.path, "--against", "logic", "--pool", "pool", "-k", 5, "--json")
    status, out, err = cli(*options, "--index", "sq")
    assert status == 0
    assert "warning: the sq index is refused" in err
    assert json.loads(out)["hits"] == json.loads(cli(*options)[1])["hits"]


def refused(index, view, recall, k, queries):
    from engine.indexes.kinds import Effort
    from engine.indexes.rows import Tested

    return Tested(k, 0.4, 0.1, Effort())


@pytest.mark.parametrize("method", ["mmr", "kmeans"])
def test_diverse_selection(cli, store, tmp_path, method: str) -> None:
    """The record says how the picks were spread."""
    out = tmp_path / method
    arguments = ("--against", "logic", "--pool", "pool", "-n", 10, "--out", out)
    status, _, err = cli("select", store.path, *arguments, "--diversity", method)
    assert status == 0, err
    record = json.loads((out / "selection.json").read_text())
    assert record["diversity"]["method"] == method
    assert len({problem["id"] for problem in record["problems"]}) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--against", "logic", "--fuse", "rrf"], "several benchmarks"),
        (["--against", "logic", "--against", "algebra", "--layers", "2"], "for one benchmark"),
        (["--against", "logic", "--against", "algebra", "--fuse", "median"], "'median' is not one of"),
        (["--against", "logic", "--against", "algebra", "--weight", "1"], "1 weights for 2"),
        (["--against", "logic", "--metric", "fisher", "--damping", "0"], "damping is 0.0"),
        (["--against", "logic", "--index", "annoy"], "'annoy' is not one of"),
    ],
)
def test_wrong_requests(cli, store, options: list, message: str) -> None:
    """One line, exit status 2."""
    status, out, err = cli("query", store.path, "--pool", "pool", *options)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not out
