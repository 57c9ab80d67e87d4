"""Indexes against the exact scan: the answer, the recall they vouch for, and that they are never stale."""

import io
import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest

import gradstore
from gradstore.durable import canonical_json, crc32c
from gradstore.engine import Index, Where, index_for, search, search_each
from gradstore.engine.searching import products
from gradstore.engine.searching.indexes import KINDS, auto, recall, serve
from gradstore.engine.searching.indexes import index as index_module
from gradstore.engine.searching.indexes.kinds import installed, kind_class
from gradstore.errors import RequestError

GOOD = ["flat", "turbovec"]


def need(kind: str) -> None:
    if not installed(kind):
        pytest.skip(f"the library of {kind} is not installed")


def heavy_tailed(n: int, dim: int, seed: int = 0) -> np.ndarray:
    """Low rank plus noise, log-normal norms: what sketches look like."""
    random = np.random.default_rng(seed)
    base = random.normal(size=(8, dim)) / np.sqrt(dim)
    body = random.normal(size=(n, 8)) * np.linspace(1, 0.2, 8) @ base + random.normal(size=(n, dim)) / np.sqrt(dim)
    return (body * random.lognormal(sigma=1.5, size=(n, 1))).astype(np.float32)


@pytest.fixture
def store(tmp_path):
    return fill(tmp_path / "store", heavy_tailed(2000, 64))


def fill(path, gradients: np.ndarray, dtype: str = "int8"):
    made = gradstore.create(path, dim=gradients.shape[1], fingerprint={}, dtype=dtype)
    ids = [f"p{i:05d}" for i in range(len(gradients))]
    made.add_problems("pool", [{"id": name, "prompt": "?", "source": f"s{i % 2}"} for i, name in enumerate(ids)])
    with made.writer("pool", step=0) as writer:
        writer.append(ids, gradients)
    return made


def shared(found, expected) -> float:
    return len(set(found.ids.tolist()) & set(expected.ids.tolist())) / len(expected)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("metric", ["cosine", "dot", "fisher"])
@pytest.mark.parametrize("kind", GOOD)
def test_recall_and_scores(store, kind: str, metric: str, largest: bool) -> None:
    """What is found is nearly all of the exact best, with exactly the scan's scores: also by inner product, where a
    few rows of enormous norm are the answer, and for the smallest."""
    need(kind)
    view = store.view("pool")
    index = index_for(view, 100, metric=metric, kind=kind)
    assert index is not None
    random = np.random.default_rng(4)
    shares = []
    targets = view.rows(np.arange(128)).reshape(8, 16, 64).mean(axis=1)
    targets[::2] += random.normal(size=(4, 64)) * np.linalg.norm(targets[::2], axis=1, keepdims=True) / 8
    for query in targets:
        exact = search(view, query, 100, metric=metric, largest=largest)
        found = search(view, query, 100, metric=metric, largest=largest, index=index)
        shares.append(shared(found, exact))
        of = dict(zip(exact.ids.tolist(), exact.scores.tolist(), strict=True))
        assert all(
            of[name] == score for name, score in zip(found.ids, found.scores.tolist(), strict=True) if name in of
        )
        order = np.lexsort((found.ids.astype(str), -found.scores if largest else found.scores))
        assert order.tolist() == list(range(100))
    assert np.mean(shares) >= 0.97


@pytest.mark.parametrize("kind", GOOD)
def test_an_index_is_never_stale(store, kind: str) -> None:
    """New problems, refreshed ones, deleted ones and compacted files: each changes the next answer, in this process and
    in one that opens what was kept."""
    need(kind)
    query = np.random.default_rng(1).normal(size=64).astype(np.float32)

    def check(view) -> None:
        exact = search(view, query, 50)
        for opened in (view, gradstore.open(store.path).view("pool", view.at)):
            assert shared(search(opened, query, 50, index=kind), exact) >= 0.96

    check(store.view("pool"))
    best = search(store.view("pool"), query, 1).ids[0]
    store.add_problems("pool", [{"id": "new", "prompt": "?"}])
    with store.writer("pool", step=1) as writer:
        writer.append(["new", best], np.stack([query, -query]))
    view = store.view("pool")
    hits = search(view, query, 50, index=kind)
    assert hits.ids[0] == "new"
    assert best not in hits.ids
    assert search(view, query, 1, largest=False, index=kind).ids[0] == best
    check(view)
    check(store.view("pool", at=0))
    store.delete("pool", ["new"])
    assert "new" not in search(store.view("pool"), query, 50, index=kind).ids
    store.compact("pool", keep="newest")
    check(store.view("pool"))
    with store.writer("pool", step=2) as writer:  # Most entries superseded: built anew.
        writer.append([f"p{i:05d}" for i in range(1500)], heavy_tailed(1500, 64, seed=7))
    check(store.view("pool"))


@pytest.mark.parametrize("kind", GOOD)
def test_filters(store, kind: str) -> None:
    """A filter holds for an index too, whether or not its library can search among some entries only."""
    need(kind)
    view = store.view("pool")
    query = np.random.default_rng(1).normal(size=64)
    where = Where(sources=("s1",))
    exact = search(view, query, 20, where=where)
    found = search(view, query, 20, where=where, index=kind)
    assert {int(name[1:]) % 2 for name in found.ids} == {1}
    assert shared(found, exact) >= 0.95
    few = np.zeros(len(view), bool)
    few[:30] = True
    assert (
        search(view, query, 20, where=few, index=kind).ids.tolist() == search(view, query, 20, where=few).ids.tolist()
    )


def test_below_the_asked_recall(store, monkeypatch, caplog) -> None:
    """An index that finds the wrong rows, and says nothing, is refused loudly; that is remembered, and the exact scan
    answers. Asked for less recall it serves."""
    need("turbovec")
    kind = kind_class("turbovec")
    real = kind.search

    def half(self, queries, m, mask):
        scores, entries = real(self, queries, m, mask)
        return scores, np.where(entries % 2 == 0, entries, -1)

    monkeypatch.setattr(kind, "search", half)
    view = store.view("pool")
    query = np.random.default_rng(1).normal(size=64)
    found = search(view, query, 100, index="turbovec")
    assert re.search(r"turbovec index is refused: recall 0\.\d+ at k 100", caplog.text)
    assert "exact scan serves" in caplog.text
    caplog.clear()
    assert found.ids.tolist() == search(view, query, 100).ids.tolist()
    record = json.loads((store.path / "collections/pool/indexes/turbovec-cosine/index.json").read_text())
    assert record["index"]["refusals"][0]["recall"] < 0.99
    assert index_for(view, 100, kind="turbovec", recall=0.3, keep=False) is not None
    again = gradstore.open(store.path).view("pool")
    monkeypatch.setattr(Index, "build", None)
    assert index_for(again, 100, kind="turbovec") is None
    assert "refused" in caplog.text


@pytest.mark.parametrize("kind", ["sq", "rabitq", "rabitq_fastscan", "ivf"])
def test_dropped_kinds(store, kind: str) -> None:
    """What an earlier version left on disk is not opened, and asking for it says what to build instead."""
    (store.path / f"collections/pool/indexes/{kind}-cosine").mkdir(parents=True)
    with pytest.raises(RequestError, match=f"{kind}' is gone, .*: rebuild it as turbovec"):
        search(store.view("pool"), np.ones(64), 3, index=kind)
    assert store.verify().ok


def test_larger_k_is_tested_before_it_is_served(store) -> None:
    """Recall at 100 says nothing about recall at 1000."""
    need("turbovec")
    view = store.view("pool")
    index = index_for(view, 100, kind="turbovec")
    assert index is not None
    assert [tested.k for tested in index.tested] == [100]
    assert not index.serves(view, 200, "cosine", len(view))
    index = index_for(view, 200, kind="turbovec")
    assert index is not None
    assert [tested.k for tested in index.tested] == [100, 300]
    assert all(tested.recall >= 0.99 for tested in index.tested)
    untested = Index.build(view, "turbovec")
    query = np.random.default_rng(1).normal(size=64)
    assert search(view, query, 50, index=untested).ids.tolist() == search(view, query, 50).ids.tolist()


@pytest.mark.parametrize("kind", GOOD)
def test_damage_and_interrupted_builds(store, kind: str) -> None:
    """Half a build opens nowhere, a flipped byte is noticed, and neither troubles the store."""
    need(kind)
    view = store.view("pool")
    index_for(view, 100, kind=kind)
    folder = store.path / f"collections/pool/indexes/{kind}-cosine"
    (folder / "entries-0000").write_bytes(b"half")
    assert store.verify().ok
    assert store.verify().notes == []
    (entries,) = (path for path in folder.glob("entries-*") if path.name != "entries-0000")
    query = np.random.default_rng(1).normal(size=64)
    expected = search(view, query, 50)
    for file in (entries, folder / "index.json"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0x10
        file.write_bytes(data)
        found = search(gradstore.open(store.path).view("pool"), query, 50, index=kind)
        assert shared(found, expected) >= 0.96
        (entries,) = folder.glob("entries-*")  # What was damaged or half there is gone.
    assert store.verify().ok


def test_a_killed_build_leaves_nothing_that_opens(store) -> None:
    """Killed at each step of keeping it, the next process builds anew and answers."""
    need("turbovec")
    program = """
import os, sys
import gradstore
from gradstore.engine.searching.indexes import folder, index_for
step = int(sys.argv[2])
seen = [0]
def counted(real):
    def call(*arguments):
        seen[0] += 1
        if seen[0] == step:
            os.kill(os.getpid(), 9)
        return real(*arguments)
    return call
folder.crc32c, folder.fsync_folder = counted(folder.crc32c), counted(folder.fsync_folder)
folder.replace_file, folder.os.fsync = counted(folder.replace_file), counted(os.fsync)
index_for(gradstore.open(sys.argv[1]).view("pool"), 100, kind="turbovec")
"""
    for step in (1, 3, 5, 7, 9):
        killed = subprocess.run([sys.executable, "-c", program, str(store.path), str(step)], capture_output=True)
        assert killed.returncode == -9, killed.stderr
        assert not (store.path / "collections/pool/indexes/turbovec-cosine/index.json").exists()
    assert store.verify().ok
    with store.writer("pool", step=5) as writer:
        writer.append(["p00000"], np.ones((1, 64), np.float32))
    hits = search(store.view("pool"), np.ones(64), 3, index="turbovec")
    assert hits.ids[0] == "p00000"
    assert len(list((store.path / "collections/pool/indexes/turbovec-cosine").glob("entries-*"))) == 1


def test_a_folder_that_cannot_be_written(store) -> None:
    """A store on a read-only medium is searched all the same."""
    need("turbovec")
    (store.path / "collections/pool/indexes").write_text("in the way")
    view = store.view("pool")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = index_for(view, 100, kind="turbovec")
    assert index is not None
    assert len(search(view, np.ones(64), 10, index=index)) == 10


def test_an_index_of_other_rows_is_refused(store, tmp_path) -> None:
    """Row numbers of another collection, or of files before a compaction, mean other problems."""
    need("flat")
    index = Index.build(store.view("pool"), "flat")
    other = fill(tmp_path / "other", heavy_tailed(100, 64, seed=3))
    with pytest.raises(RequestError, match="index was built for"):
        search(other.view("pool"), np.ones(64), 3, index=index)
    with pytest.raises(RequestError, match="index was built for cosine"):
        search(store.view("pool"), np.ones(64), 3, metric="dot", index=index)
    with pytest.raises(RequestError, match="is not one of"):
        search(store.view("pool"), np.ones(64), 3, index="annoy")


def test_a_kept_index_is_opened_not_built(store, monkeypatch) -> None:
    """Building takes seconds to minutes; the second process must not do it again, nor for a few new rows."""
    for kind in GOOD:
        if installed(kind):
            index_for(store.view("pool"), 100, kind=kind)
    with store.writer("pool", step=1) as writer:
        writer.append(["p00003"], np.ones((1, 64), np.float32))
    monkeypatch.setattr(Index, "build", None)
    monkeypatch.setattr(serve, "self_test", None)
    view = gradstore.open(store.path).view("pool")
    for kind in GOOD:
        if installed(kind):
            assert search(view, np.ones(64), 5, index=kind).ids[0] == "p00003"


def test_widths_that_are_not_a_multiple_of_eight(tmp_path) -> None:
    """turbovec wants them; a sketch has whatever its layers give."""
    need("turbovec")
    view = fill(tmp_path / "store", heavy_tailed(800, 29)).view("pool")
    assert shared(search(view, np.ones(29), 20, index="turbovec"), search(view, np.ones(29), 20)) >= 0.95


def test_the_self_test_asks_what_is_asked() -> None:
    """Rungs above k, never more than there are rows."""
    assert [recall.rung(k, 10**6) for k in (1, 100, 101, 300, 5000, 50_000)] == [100, 100, 300, 300, 10_000, 100_000]
    assert recall.rung(200, 250) == 250


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("metric", ["cosine", "dot", "fisher"])
@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("kernel", ["compiled", "plain"])
def test_many_queries_through_an_index(store, kind: str, metric: str, largest: bool, kernel: str, monkeypatch) -> None:
    """Asked together, each query gets what it gets alone, bit for bit, and nearly all of the exact best; a filter holds
    for all, and one that leaves few rows is scanned."""
    need(kind)
    if kernel == "plain":
        monkeypatch.setattr(products, "_kernel", lambda: None)
    view = store.view("pool")
    index = index_for(view, 50, metric=metric, kind=kind)
    monkeypatch.setattr(index_module, "_QUERIES_AT_ONCE", 5)  # Several passes.
    targets = view.rows(np.arange(192)).reshape(12, 16, 64).mean(axis=1)
    few = np.arange(len(view)) < 60
    shares = []
    for where in (None, Where(sources=("s1",)), few):
        asked = {"metric": metric, "largest": largest, "where": where}
        each = search_each(view, targets, 50, index=index, **asked)
        for query, hits, exact in zip(targets, each, search_each(view, targets, 50, **asked), strict=True):
            alone = search(view, query, 50, index=index, **asked)
            if metric != "fisher":  # Preconditioned alone or together, a query differs in its last digits.
                assert hits.positions.tolist() == alone.positions.tolist()
                assert np.array_equal(hits.scores, alone.scores)
            assert hits.ids.tolist() == view.ids_at(hits.positions).tolist()
            assert hits.n_eligible == exact.n_eligible
            of = dict(zip(exact.positions.tolist(), exact.scores.tolist(), strict=True))
            assert all(of.get(p, s) == s for p, s in zip(hits.positions.tolist(), hits.scores.tolist(), strict=True))
            shares.append(np.isin(exact.positions, hits.positions).mean())
    assert np.mean(shares) >= 0.97


def test_auto_for_many_queries() -> None:
    """Measured (docs/benchmarks.md): with AVX512 a built index is the faster for many queries together, with AVX2 the
    scan is as fast and exact, and without the kernel the index is four times as fast."""
    of = {"built": frozenset({"turbovec"}), "together": True}
    for registers, way in ((512, "turbovec"), (256, "scan"), (0, "turbovec")):
        situation = auto.Situation(1_000_000, 1024, 100, 256, registers=registers, **of)
        assert auto.choose(situation, {"turbovec"}) == way
    assert auto.choose(auto.Situation(1_000_000, 1024, 100, 16, together=True), {"turbovec"}) == "scan"


def test_auto_rule() -> None:
    """One query of a pool that was never indexed is scanned; many are worth an index; a large k is not."""
    both = {"turbovec", "flat"}
    once = auto.Situation(200_000, 4096, 100)
    assert auto.choose(once, both) == "scan"
    assert auto.choose(auto.Situation(200_000, 4096, 100, built=frozenset({"turbovec"})), both) == "turbovec"
    assert auto.choose(auto.Situation(200_000, 4096, 100, built=frozenset({"turbovec"})), {"flat"}) == "scan"
    assert auto.choose(auto.Situation(200_000, 4096, 10_001, built=frozenset({"turbovec"})), both) == "scan"
    assert auto.choose(auto.Situation(1000, 1024, 10, built=frozenset({"turbovec"})), both) == "scan"
    assert auto.choose(auto.Situation(200_000, 4096, 100, built=frozenset({"flat"}), gpu_bytes=10**11), both) == "flat"
    assert set(KINDS) == both


def sealed(folder, change) -> None:
    """Change what index.json says, and give it the checksum that fits."""
    body = json.loads((folder / "index.json").read_bytes())["index"]
    change(body)
    text = canonical_json(body)
    (folder / "index.json").write_bytes(b'{"crc32c":%d,"index":%s}\n' % (crc32c(text), text))


def replaced(folder, name: str, data: bytes) -> None:
    """Replace one file of an index, with the checksum that fits: nothing but its content is wrong."""
    other = f"{name}-{'0' * 16}"
    (folder / other).write_bytes(data)
    sealed(folder, lambda body: body["files"].update({name: {"name": other, "crc32c": crc32c(data)}}))


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


WRONG = {
    "cut": lambda folder, path: path.write_bytes(path.read_bytes()[:100]),
    "cut, right checksum": lambda folder, path: replaced(folder, "entries", path.read_bytes()[:100]),
    "empty": lambda folder, path: replaced(folder, "entries", b""),
    "zeroed": lambda folder, path: path.write_bytes(bytes(path.stat().st_size)),
    "zeros, right checksum": lambda folder, path: replaced(folder, "entries", bytes(path.stat().st_size)),
    "gone": lambda folder, path: path.unlink(),
    "of another version": lambda folder, path: replaced(folder, "entries", b"XxXx" + path.read_bytes()[4:]),
    "many entries claimed": lambda folder, path: replaced(
        folder, "entries", path.read_bytes()[:8] + (10**12).to_bytes(8, "little") + path.read_bytes()[16:]
    ),
    "rows of other problems": lambda folder, path: replaced(folder, "rows", saved(np.arange(2000)[::-1].copy())),
    "rows twice": lambda folder, path: replaced(folder, "rows", saved(np.zeros(2000, np.int64))),
    "rows beyond all": lambda folder, path: replaced(folder, "rows", saved(np.full(2000, 2**62))),
    "rows of another type": lambda folder, path: replaced(folder, "rows", saved(np.zeros(2000, "S8"))),
    "not an object": lambda folder, path: (folder / "index.json").write_text("[1]"),
    "no JSON": lambda folder, path: (folder / "index.json").write_bytes(b"\xff\xfe"),
    "fields missing": lambda folder, path: sealed(folder, lambda body: body.pop("tested")),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", GOOD)
def test_an_index_that_cannot_be_used_is_built_anew(store, kind: str, wrong: str, caplog) -> None:
    """Damaged, foreign, or written by another version of its library: one warning, and the right answer."""
    need(kind)
    query = np.random.default_rng(1).normal(size=64)
    search(store.view("pool"), query, 50, index=kind)
    folder = store.path / f"collections/pool/indexes/{kind}-cosine"
    (entries,) = folder.glob("entries-*")
    WRONG[wrong](folder, entries)
    noted = any("it will be built anew" in note for note in store.verify().notes)
    assert noted == (wrong in ("cut", "zeroed", "gone", "not an object", "no JSON"))
    view = gradstore.open(store.path).view("pool")
    found, exact = search(view, query, 50, index=kind), search(view, query, 50)
    assert shared(found, exact) >= 0.96
    assert len(set(found.ids)) == 50
    assert [record.message for record in caplog.records if "it is built anew" in record.message], wrong
    caplog.clear()
    assert index_for(gradstore.open(store.path).view("pool"), 50, kind=kind) is not None
    assert not caplog.records
    assert store.verify().notes == []


@pytest.mark.parametrize("kind", GOOD)
def test_where_the_folder_cannot_be_written_the_scan_answers(store, kind: str, caplog) -> None:
    """A damaged index on a read-only disk must not be built anew by every command."""
    need(kind)
    query = np.random.default_rng(1).normal(size=64)
    search(store.view("pool"), query, 50, index=kind)
    folder = store.path / f"collections/pool/indexes/{kind}-cosine"
    (folder / "index.json").write_text("{")
    (folder / "LOCK").unlink()
    (folder / "LOCK").mkdir()
    view = gradstore.open(store.path).view("pool")
    assert index_for(view, 50, kind=kind) is None
    assert [record.message for record in caplog.records if "the exact scan serves" in record.message]
    assert search(view, query, 50, index=kind).ids.tolist() == search(view, query, 50).ids.tolist()
    assert (folder / "index.json").read_text() == "{"


@pytest.mark.parametrize("kind", GOOD)
def test_without_file_locks_indexes_are_read_and_built(store, kind: str, monkeypatch) -> None:
    """Lustre without flock: reading needs no lock, and builders without one only waste work."""
    need(kind)

    def fails(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("gradstore.exclusive.fcntl.flock", fails)
    query = np.random.default_rng(1).normal(size=64)
    search(store.view("pool"), query, 50, index=kind)
    monkeypatch.setattr(Index, "build", lambda *arguments: pytest.fail("built again"))
    view = gradstore.open(store.path).view("pool")
    assert shared(search(view, query, 50, index=kind), search(view, query, 50)) >= 0.96
