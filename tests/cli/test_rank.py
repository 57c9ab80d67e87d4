"""`query` and `select` with metrics, indexes, several benchmarks and diversity."""

import json

import numpy as np
import pytest

import gradstore
from gradstore.engine import PRESETS, SELECTORS, ProbeBatch, fuse_scores, search, select, target
from gradstore.engine.rollouts import Group

DIM = 16


@pytest.fixture
def store(tmp_path):
    """A pool of 300 rows and two benchmarks."""
    random = np.random.default_rng(0)
    made = gradstore.create(tmp_path / "store", dim=DIM, fingerprint={})
    for name, n in (("pool", 300), ("algebra", 6), ("logic", 6)):
        ids = [f"{name}{i}" for i in range(n)]
        records = [{"id": i, "prompt": f"What is {i}?", "source": f"s{len(i) % 2}"} for i in ids]
        made.add_problems(name, records)
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


@pytest.mark.parametrize("index", ["auto", "flat", "turbovec"])
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
    monkeypatch.setattr("gradstore.engine.searching.indexes.serve.self_test", refused)
    options = ("query", store.path, "--against", "logic", "--pool", "pool", "-k", 5, "--json")
    status, out, err = cli(*options, "--index", "turbovec")
    assert status == 0
    assert "warning: the turbovec index is refused" in err
    assert json.loads(out)["hits"] == json.loads(cli(*options)[1])["hits"]


def refused(index, view, recall, k, queries):
    from gradstore.engine.searching.indexes.index import Tested

    return Tested(k, 0.4, 0.1, 1.0)


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


def select_record(cli, store, out, *options: object) -> dict:
    status, printed, err = cli("select", store.path, "--pool", "pool", "--out", out, *options, "--json")
    assert status == 0, err
    record = json.loads(printed)
    record.pop("notices")
    assert record == json.loads((out / "selection.json").read_text())
    return record


def test_select_with_everything(cli, store, tmp_path) -> None:
    """Several benchmarks, a mixture, quotas and a temperature: the record says it all and Python picks the same."""
    options = ("--against", "algebra", "--against", "logic", "-n", 12, "--selector", "cropi:3+random:1", "--seed", 7)
    record = select_record(cli, store, tmp_path / "a", *options, "--temperature", 0.5, "--quota", "s1=0.25")
    goals = [target(store, name) for name in ("algebra", "logic")]
    quotas = {"s1": 0.25}
    same = select(store, "pool", goals, 12, "cropi:0.75+rand:0.25", seed=7, temperature=0.5, quotas=quotas)
    assert [problem["id"] for problem in record["problems"]] == same.ids
    assert [problem["picked_by"] for problem in record["problems"]] == ["cropi"] * 9 + ["rand"] * 3
    assert record["selector"] == "cropi:0.75+rand:0.25"
    assert [goal["benchmark"] for goal in record["targets"]] == ["algebra", "logic"]
    assert record["target"] is None
    assert (record["temperature"], record["quotas"], record["seed"]) == (0.5, quotas, 7)


def test_select_by_stored_probes(cli, store, tmp_path) -> None:
    """The benchmark's name leads to its probes; intervals are in the record, at the confidence asked for."""
    random = np.random.default_rng(0)
    ids = [f"pool{i}" for i in range(40)]
    rewards = [np.array([0.0, 1, *random.integers(0, 2, 6)]) for _ in ids]
    some = [random.normal(size=8) for _ in ids]
    ProbeBatch.of(
        [Group(i, np.arange(2), [np.arange(3)] * 8, r) for i, r in zip(ids, rewards, strict=True)],
        some,
        PRESETS["grpo"],
    ).save(store, "pool", step=4, target="logic")
    options = ("--against", "logic", "-n", 5, "--selector", "lcb")
    record = select_record(cli, store, tmp_path / "a", *options, "--confidence", 0.5)
    wide = select_record(cli, store, tmp_path / "b", *options)
    assert (record["probe_step"], record["confidence"], wide["confidence"]) == (4, 0.5, 0.95)
    for narrow, wider in zip(record["problems"], wide["problems"], strict=True):
        assert wider["low"] < narrow["low"] < narrow["score"] < narrow["high"] < wider["high"]
    wrong = cli("select", store.path, "--pool", "pool", *options, "--out", tmp_path / "c", "--confidence", 95)
    assert (wrong[0], "confidence is 95" in wrong[2]) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--selector", "lcb"], "goes by probes along one benchmark, not 0"),
        (["--selector", "lcb", "--against", "logic"], "has no probes along 'logic'"),
        (["--selector", "less"], "'less' needs a target"),
        (["--selector", "norm:x"], "weight 'x'"),
        (["--selector", "norm", "--quota", "half"], "expected SOURCE=SHARE"),
        (["--selector", "norm", "--quota", "s=0.5"], "quota of source 's'"),
        (["--selector", "norm", "--temperature", "-1"], "temperature is -1"),
        (["--selector", "norm", "--confidence", "0.9"], "--confidence: norm has no intervals"),
        (["--selector", "norm", "--seed", "-1"], "seed is -1"),
    ],
)
def test_wrong_selections(cli, store, tmp_path, options: list, message: str) -> None:
    """One line, exit status 2, nothing written."""
    out = tmp_path / "out"
    status, printed, err = cli("select", store.path, "--pool", "pool", "-n", 5, "--out", out, *options)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not printed
    assert not out.exists()


def test_selectors_are_listed(cli) -> None:
    """Every name with what it needs."""
    status, printed, _ = cli("selectors", "--json")
    assert status == 0
    rows = {row["name"]: row for row in json.loads(printed)}
    assert set(rows) == set(SELECTORS)
    assert (rows["cosine"]["aliases"], rows["cosine"]["needs"]) == ("sim", "target")
    assert (rows["snr"]["needs"], rows["rand"]["chooses_among"]) == ("probes", "all")
    status, printed, _ = cli("selectors")
    assert all(name in printed for name in rows)
