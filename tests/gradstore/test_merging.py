"""Merging stores: equal to the undivided store, whatever the order, overlaps and kills; what differs is refused."""

import fcntl
import multiprocessing
import os
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstore
from gradstore import DamagedError, FingerprintError, LockedError, RequestError, State
from gradstore.snapshot import open_snapshot
from tests.gradstore.conftest import records as some_records
from tests.gradstore.conftest import vector
from tests.gradstore.test_probes import add as add_probes
from tests.gradstore.test_rounds import table as round_table

N = 60
FINGERPRINT = {"model": "m", "projection": {"kind": "random", "seed": 0}}


def fill(store: gradstore.Store, collection: str, problems: list[int]) -> None:
    """Rows of two steps: problems divisible by 7 have no signal, by 11 they fail, the second step lacks every third."""
    known = {record["id"]: record for record in some_records(N)}
    store.add_problems(collection, [known[f"p{i}"] for i in problems])
    for step in (0, 3):
        here = [i for i in problems if not (step and i % 3 == 0)]
        states = [State.FAILED if i % 11 == 0 else State.NO_SIGNAL if i % 7 == 0 else State.LIVE for i in here]
        with store.writer(collection, step=step) as writer:
            for start in range(0, len(here), 8):
                part = slice(start, start + 8)
                writer.append(
                    [f"p{i}" for i in here[part]],
                    np.stack([vector(i, step, store.dim) for i in here[part]]),
                    state=states[part],
                    pass_rate=[np.nan if i % 5 == 0 else i % 4 / 4 for i in here[part]],
                    n_rollouts=[i % 4 + 1 for i in here[part]],
                    reason=[f"reason {i % 2}" if i % 11 == 0 else None for i in here[part]],
                )


def rows_of(path: Path) -> dict[tuple, list[tuple]]:
    """(collection, id, step) -> the rows that are not deleted, as bytes, in their order. Read row by row."""
    store = gradstore.open(path)
    found: dict[tuple, list[tuple]] = {}
    for name in store.collections:
        snapshot = open_snapshot(store._header, path / "collections" / name)
        ids, alive = snapshot.problems.ids, snapshot.alive()
        chunk_rows = snapshot.header.chunk_rows
        for row in np.flatnonzero(alive).tolist():
            column = {one.name: snapshot.column(one.name)[row] for one in store._header.arrays if one.width is None}
            problem, reason, step = (column.pop(name) for name in ("problem", "reason", "step"))
            codes = snapshot.codes.chunk(row // chunk_rows)[row % chunk_rows].tobytes()
            value = (codes, snapshot.manifest.reasons[reason], *(one.tobytes() for one in column.values()))
            found.setdefault((name, ids[problem], int(step)), []).append((int(snapshot.bases()[row]), *value))
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def new(fast_path: Path) -> Callable[..., gradstore.Store]:
    def make(name: str, **changes: Any) -> gradstore.Store:
        settings = {"dim": 24, "fingerprint": FINGERPRINT, "chunk_rows": 16, "column_rows": 32} | changes
        return gradstore.create(fast_path / name, **settings)

    return make


@pytest.fixture
def shards(new: Callable[..., gradstore.Store]) -> list[Path]:
    """Seven shards of 60 problems that overlap, some without the benchmark, and `whole` beside them."""
    parts = [sorted({*range(index, N, 7), *range(5 * index, 5 * index + 9)}) for index in range(7)]
    made = []
    for index, part in enumerate(parts):
        store = new(f"shard{index}", chunk_rows=8 + index)
        fill(store, "pool", part)
        fill(store, "pool.even", part[::2])
        if index % 3 == 0:
            fill(store, "bench", list(range(12)))
        made.append(store.path)
    whole = new("whole")
    fill(whole, "pool", list(range(N)))
    fill(whole, "pool.even", sorted({i for part in parts for i in part[::2]}))
    fill(whole, "bench", list(range(12)))
    return made


def test_equal_to_the_undivided_store(shards: list[Path], fast_path: Path) -> None:
    before = [bytes_of(path) for path in shards]
    seen: list[tuple[int, int]] = []
    report = gradstore.merge(shards, fast_path / "out", progress=lambda n, total: seen.append((n, total)))
    assert rows_of(fast_path / "out") == rows_of(fast_path / "whole")
    merged, whole = gradstore.open(fast_path / "out"), gradstore.open(fast_path / "whole")
    assert merged.verify().ok
    assert merged.verify().notes == []
    assert merged.fingerprint == whole.fingerprint
    for name in ("pool", "pool.even", "bench"):
        assert {row["id"]: row for row in merged.records(name)} == {row["id"]: row for row in whole.records(name)}
        assert merged.steps(name) == whole.steps(name)
        for at in (0, 2, None):
            mine, other = merged.view(name, at), whole.view(name, at)
            same = other.positions(mine.ids.tolist())
            assert len(mine) == len(other)
            assert np.array_equal(mine.rows(range(len(mine))), other.rows(same))
            assert np.array_equal(mine.pass_rates, other.pass_rates[same], equal_nan=True)
            assert [mine.reasons, mine.steps.tolist()] == [
                np.array(other.reasons)[same].tolist(),
                other.steps[same].tolist(),
            ]
    assert report.left_out == []
    assert report.collections["bench"].again == 2 * sum(whole.steps("bench").values())
    assert sum(n for n, _ in seen) == seen[0][1] == sum(one.rows for one in report.collections.values())
    assert [bytes_of(path) for path in shards] == before


def test_the_order_of_the_sources_changes_nothing(shards: list[Path], fast_path: Path) -> None:
    """Nor do ties: of rows with one score the first in the view wins, and the view is the same."""
    gradstore.merge(shards, fast_path / "one")
    gradstore.merge(shards[::-1], fast_path / "other")
    assert bytes_of(fast_path / "one") == bytes_of(fast_path / "other")


MERGER = """
import os, signal, numpy as np, gradstore
from gradstore import merged_rows
merged_rows.PUBLISH_ROWS = 8
calls = 0
def counted(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
for name in ("fsync", "fdatasync", "rename", "pwrite", "unlink", "mkdir", "posix_fallocate"):
    setattr(os, name, counted(getattr(os, name)))
gradstore.merge(SHARDS, OUT)
os._exit(7)
"""


@pytest.fixture
def run() -> Iterator[Callable[..., int]]:
    """run(shards, out, kill_at) -> exit code of a merge that kills itself at its kill_at-th system call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["numpy", "pyarrow.parquet", "gradstore.merging", "gradstore.probes"])

    def merge(shards: list[Path], out: Path, kill_at: int) -> int:
        names = {"SHARDS": shards, "OUT": out, "KILL_AT": kill_at}
        process = context.Process(target=exec, args=(MERGER, names))
        process.start()
        process.join(60)
        assert process.exitcode is not None
        return process.exitcode

    return merge


@pytest.mark.parametrize("seed", range(3))
def test_killed_merges_end_with_the_same_bytes(
    shards: list[Path], fast_path: Path, run: Callable[..., int], seed: int
) -> None:
    """SIGKILL at random system calls, again and again, with rounds and probes: each run goes on where one ended."""
    store = gradstore.open(shards[2], mode="a")
    ids = store.view("pool").ids.tolist()[:3]
    for step in range(3):
        store.rounds("pool").add({"step": step}, round_table(ids))
        add_probes(store, ids, step=step, seed=step)
    assert run(shards, fast_path / "undisturbed", 0) == 7
    draw = random.Random(seed)
    for kills in count():
        status = run(shards, fast_path / "out", draw.randint(1, 400))
        if status == 7:
            break
        assert status == -9
        assert kills < 200
    assert kills >= 5
    assert bytes_of(fast_path / "out") == bytes_of(fast_path / "undisturbed")
    assert gradstore.open(fast_path / "out").verify().ok
    assert not (fast_path / "out.unfinished").exists()
    assert run(shards, fast_path / "out", 0) == 7
    assert bytes_of(fast_path / "out") == bytes_of(fast_path / "undisturbed")


def test_what_is_there_already(shards: list[Path], fast_path: Path) -> None:
    out = fast_path / "out"
    assert not gradstore.merge(shards[:2], out).was_there
    before = bytes_of(out)
    again = gradstore.merge(shards[:2], out)
    assert again.was_there
    assert again.collections["pool"].rows == sum(gradstore.open(out).steps("pool").values())
    with pytest.raises(RequestError, match="something else here already"):
        gradstore.merge(shards[:3], out)
    with pytest.raises(RequestError, match="something else here already"):
        gradstore.merge(shards[:3], shards[4])
    with pytest.raises(RequestError, match="lies in the store"):
        gradstore.merge(shards[:3], shards[4] / "out")
    assert bytes_of(out) == before
    (fast_path / "file").write_text("mine")
    with pytest.raises(RequestError, match="something else here already"):
        gradstore.merge(shards[:2], fast_path / "file")
    (fast_path / "folder.unfinished").mkdir()
    (fast_path / "folder.unfinished" / "mine").write_text("mine")
    with pytest.raises(RequestError, match="something here already"):
        gradstore.merge(shards[:2], fast_path / "folder")
    assert (fast_path / "folder.unfinished" / "mine").read_text() == "mine"


def test_an_unfinished_merge_of_other_stores(shards: list[Path], fast_path: Path, monkeypatch: Any) -> None:
    out = fast_path / "out"

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("gradstore.merging.write_parts", stop)
        with pytest.raises(KeyboardInterrupt):
            gradstore.merge(shards[:2], out)
    assert (fast_path / "out.unfinished").exists()
    assert not out.exists()
    with pytest.raises(RequestError, match=r"out\.unfinished: an unfinished merge of other stores"):
        gradstore.merge(shards[:3], out)
    fill(gradstore.open(shards[1], mode="a"), "more", [1])
    with pytest.raises(RequestError, match="or of these before they changed"):
        gradstore.merge(shards[:2], out)
    shutil.rmtree(fast_path / "out.unfinished")
    assert gradstore.merge(shards[:2], out).collections["more"].problems == 1


def test_two_merges_at_once(shards: list[Path], fast_path: Path) -> None:
    unfinished = fast_path / "out.unfinished"
    unfinished.mkdir()
    held = os.open(unfinished, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(LockedError, match="another process is merging"):
        gradstore.merge(shards[:2], fast_path / "out")
    os.close(held)
    gradstore.merge(shards[:2], fast_path / "out")


def test_one_store_is_copied_without_what_is_deleted(shards: list[Path], fast_path: Path) -> None:
    """Deletions are said, and undone where another store has the problem."""
    store = gradstore.open(shards[0], mode="a")
    store.delete("pool", ["p0", "p42"])
    report = gradstore.merge([shards[0]], fast_path / "copy")
    assert report.left_out == ["collection 'pool': 2 deleted rows and 2 deleted problems"]
    assert rows_of(fast_path / "copy") == rows_of(shards[0])
    assert "p0" not in gradstore.open(fast_path / "copy").problems("pool")["id"].to_pylist()
    both = gradstore.merge(shards, fast_path / "both")
    assert "p42" not in gradstore.open(fast_path / "both").view("pool").ids
    assert rows_of(fast_path / "both").keys() == {
        key for key in rows_of(fast_path / "whole") if key[:2] not in (("pool", "p42"), ("pool", "p0"))
    }
    assert both.left_out == ["collection 'pool': 2 deleted rows and 2 deleted problems"]
    gradstore.open(shards[1], mode="a").delete("pool", ["p8"])
    kept = gradstore.merge(shards, fast_path / "kept")
    assert "the deletion of 1 problems (first: 'p8'), which another store has rows of" in kept.left_out[-1]
    assert ("pool", "p8", 0) in rows_of(fast_path / "kept")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 25}, r"dim: \S+a has 24, \S+b has 25"),
        ({"dtype": "fp16"}, r"dtype: \S+a has 'int8', \S+b has 'fp16'"),
        ({"fingerprint": FINGERPRINT | {"model": "n"}}, r"model: \S+a has 'm', \S+b has 'n'"),
        (
            {"fingerprint": {"model": "m", "projection": {"kind": "random", "seed": 1}}},
            r"projection.seed: \S+a has 0, \S+b has 1",
        ),
        (
            {"fingerprint": {"model": "m", "projection": {"kind": "fitted", "basis": "abc"}}},
            r"projection.basis: \S+a has 'nothing', \S+b has 'abc'.*fitted apart: collect one with --like",
        ),
    ],
)
def test_other_settings(new: Callable, fast_path: Path, changes: dict, message: str) -> None:
    new("a")
    files = {"projection-abc.safetensors": b"x"} if "fitted" in message else {}
    new("b", **changes, attachments=files)
    with pytest.raises(FingerprintError, match=rf"b: cannot be merged with \S+a: .*{message}"):
        gradstore.merge([fast_path / "a", fast_path / "b"], fast_path / "out")
    assert not list(fast_path.glob("out*"))


def test_bases_of_one_continue_those_of_the_other(new: Callable, fast_path: Path) -> None:
    """Rows keep their basis; a store that was fitted anew apart cannot be merged."""
    one, other, third = (new(name) for name in "abc")
    for store, digest in ((other, "first"), (third, "second")):
        assert store.add_basis(digest, [("all", 0, 24)], {"why": digest}) == 1
    for store, basis, first in ((one, 0, 0), (other, 1, 10), (other, 0, 10), (third, 1, 20)):
        ids = [f"p{i}" for i in range(first, first + 3)]
        records = some_records(3, first)
        with store.writer("pool", step=basis, records=records) as writer:
            writer.append(ids, np.stack([vector(i, basis) for i in range(first, first + 3)]), basis=basis)
    gradstore.merge([one.path, other.path], fast_path / "out")
    assert rows_of(fast_path / "out") == rows_of(one.path) | rows_of(other.path)
    assert [basis.digest for basis in gradstore.open(fast_path / "out").bases] == ["", "first"]
    assert gradstore.open(fast_path / "out").verify().ok
    with pytest.raises(FingerprintError, match=r"c: cannot.*bases: \S+b has , first, \S+c has , second"):
        gradstore.merge([one.path, other.path, third.path], fast_path / "more")


def test_other_records_and_rows(new: Callable, fast_path: Path) -> None:
    """Each is refused with problem, field, values and both stores; nothing is written."""
    row = vector(1, 0)

    def make(name: str, record: dict, sketches: list, **changes: Any) -> Path:
        shutil.rmtree(fast_path / name, ignore_errors=True)
        store = new(name)
        with store.writer("pool", step=4, records=[record]) as writer:
            for sketch in sketches:
                writer.append(["p1"], sketch[None], **changes)
        return store.path

    record = some_records(2)[1]
    paths = [make("a", record, [row], pass_rate=0.5, n_rollouts=4), fast_path / "b"]
    other = np.where(np.arange(24) == 3, -row, row)
    for arguments, message in (
        (
            ({**record, "ground_truth": "2"}, [row]),
            r"'p1' has another ground_truth in \S+b \('2'\) than in \S+a \('1'\)",
        ),
        (({**record, "extra": {}}, [row]), r"'p1' has another extra in"),
        ((record, [row * 2], {"pass_rate": 0.5, "n_rollouts": 4}), r"'p1' has another norm at step 4 in \S+b \("),
        ((record, [row], {"pass_rate": 0.25, "n_rollouts": 4}), r"another pass_rate at step 4 in \S+b \(0.25\)"),
        ((record, [row], {"n_rollouts": 4}), r"another pass_rate at step 4 in \S+b \(nan\) than in \S+a \(0.5\)"),
        ((record, [row], {"state": 1, "pass_rate": 0.5, "n_rollouts": 4}), r"another scale at step 4"),
        ((record, [row, row], {"pass_rate": 0.5, "n_rollouts": 4}), r"number of rows at step 4 in \S+b \(2 rows\)"),
        ((record, [other], {"pass_rate": 0.5, "n_rollouts": 4}), r"'p1' has another sketch at step 4 in \S+b than in"),
    ):
        first, sketches, changes = (*arguments, {})[:3]
        make("b", first, sketches, **changes)
        with pytest.raises(RequestError, match=message):
            gradstore.merge(paths, fast_path / "out")
        assert not list(fast_path.glob("out*"))
    make("b", record, [row], pass_rate=0.5, n_rollouts=4)
    assert gradstore.merge(paths, fast_path / "out").collections["pool"].again == 1


def test_probes_are_united(new: Callable, fast_path: Path) -> None:
    stores = [new(name, dim=4) for name in "abc"]
    for store in stores:
        store.add_problems("pool", [{"id": name, "prompt": name} for name in "abc"])
    add_probes(stores[0], ["a", "b"], derivatives=[np.array([1.0, np.nan, 2, 3])] * 2)
    add_probes(stores[1], ["b"], derivatives=[np.array([1.0, np.nan, 2, 3])])
    add_probes(stores[1], ["c"], step=1)
    gradstore.merge([store.path for store in stores[:2]], fast_path / "out")
    merged = gradstore.open(fast_path / "out").probes("pool").table()
    assert list(zip(merged["id"].to_pylist(), merged["step"].to_pylist(), strict=True)) == [
        ("a", 0),
        ("b", 0),
        ("c", 1),
    ]
    assert merged["target_commit"].to_pylist() == [0, 0, 0]
    assert gradstore.open(fast_path / "out").verify().ok
    add_probes(stores[2], ["b"], derivatives=[np.array([1.0, 9, 2, 3])])
    with pytest.raises(RequestError, match=r"'b' has other probes at step 0 along 'bench' in \S+c than in \S+a"):
        gradstore.merge([store.path for store in stores], fast_path / "other")


def test_rounds_of_one_trainer(new: Callable, fast_path: Path) -> None:
    """The longest history of which the others are a beginning; two histories are left out, and that is said."""
    stores = [new(name, dim=4) for name in "abc"]
    for store in stores:
        store.add_problems("pool", [{"id": name, "prompt": name} for name in "abc"])
    for store, steps in zip(stores, [(0,), (0, 1), (5,)], strict=True):
        for step in steps:
            store.rounds("pool").add({"step": step}, round_table())
    report = gradstore.merge([store.path for store in stores[:2]], fast_path / "out")
    assert [one.step for one in gradstore.open(fast_path / "out").rounds("pool")] == [0, 1]
    assert report.left_out == []
    assert report.collections["pool"].rounds == 2
    report = gradstore.merge([store.path for store in stores], fast_path / "other")
    assert len(gradstore.open(fast_path / "other").rounds("pool")) == 0
    assert "'pool': all rounds" in report.left_out[0]
    assert "recorded another round 0" in report.left_out[0]


def test_attachments(new: Callable, fast_path: Path) -> None:
    new("a", attachments={"note.txt": b"1", "only-a": b"x"})
    new("b", attachments={"note.txt": b"1"})
    new("c", attachments={"note.txt": b"2"})
    gradstore.merge([fast_path / "a", fast_path / "b"], fast_path / "out")
    from gradstore.attachments import all_attachments

    kept = all_attachments(fast_path / "out")
    assert {name: kept[name] for name in ("note.txt", "only-a")} == {"note.txt": b"1", "only-a": b"x"}
    with pytest.raises(RequestError, match=r"attachment 'note.txt': \S+c and \S+a have others of this name"):
        gradstore.merge([fast_path / name for name in "abc"], fast_path / "more")
    (fast_path / "b" / "round-of-pool.json").write_text("{}")
    report = gradstore.merge([fast_path / "b", fast_path / "out"], fast_path / "again")
    assert "round-of-pool.json: the round under way" in report.left_out[0]
    assert b'"of":{"merged"' in all_attachments(fast_path / "again")["merged.json"]


def test_a_damaged_source(shards: list[Path], fast_path: Path) -> None:
    """Its bytes get no new checksum; once it is whole again the merge goes on."""
    chunk = shards[3] / "collections/pool/g0/codes/c.1.0"
    good = chunk.read_bytes()
    chunk.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(DamagedError, match=r"shard3/collections/pool/g0/codes/c\.1\.0: damaged"):
        gradstore.merge(shards, fast_path / "out")
    assert not (fast_path / "out").exists()
    chunk.write_bytes(good)
    gradstore.merge(shards, fast_path / "out")
    assert rows_of(fast_path / "out") == rows_of(fast_path / "whole")
    (shards[5] / "collections/pool/manifest.json").unlink()
    with pytest.raises(DamagedError, match=r"shard5/collections/pool/manifest\.json: the file is missing"):
        gradstore.merge(shards, fast_path / "more")


def test_requests_that_cannot_be(shards: list[Path], fast_path: Path) -> None:
    with pytest.raises(RequestError, match="at least one store"):
        gradstore.merge([], fast_path / "out")
    (fast_path / "link").symlink_to(shards[0])
    with pytest.raises(RequestError, match="given twice"):
        gradstore.merge([shards[0], fast_path / "link"], fast_path / "out")
    with pytest.raises(RequestError, match="there is nothing here"):
        gradstore.merge([shards[0], fast_path / "nothing"], fast_path / "out")
