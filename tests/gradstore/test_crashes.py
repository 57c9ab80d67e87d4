"""kill -9 at random moments: what was acknowledged is there and right, nothing else is visible, work goes on.

The victims are forked from a server process that has imported everything, so that fifty of them take seconds.
"""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

import gradstore
from gradstore import LockedError
from gradstore.manifest import read_manifest

N = 40

WRITER = """
import os, numpy as np, gradstore
log = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def say(what, rows): os.write(log, f"{what} {rows}\\n".encode())
rng = np.random.default_rng(SEED)
store = gradstore.open(PATH, mode="a")
rows = ROWS
while True:
    with store.writer("pool", step=rows // 50) as writer:
        for _ in range(rng.integers(1, 6)):
            for _ in range(rng.integers(1, 4)):
                n = int(rng.integers(1, 21))
                serial = np.arange(rows, rows + n)
                sketch = np.stack([np.cos(serial * (j + 1.0)) for j in range(DIM)], axis=1)
                writer.append([f"p{i % N}" for i in serial], sketch, n_rollouts=serial)
                rows += n
            say("try", rows)
            writer.publish()
            say("done", rows)
"""

COMPACTOR = """
import os, numpy as np, gradstore
log = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def say(what, rows): os.write(log, f"{what} {rows}\\n".encode())
store = gradstore.open(PATH, mode="a")
step = STEP
while True:
    step += 1
    with store.writer("pool", step=step) as writer:
        sketch = np.stack([np.cos((np.arange(N) + N * step) * (j + 1.0)) for j in range(DIM)], axis=1)
        writer.append([f"p{i}" for i in range(N)], sketch, n_rollouts=np.arange(N) + N * step)
        say("try", step)
    say("done", step)
    store.compact("pool", keep="newest")
    say("compacted", step)
"""

DIM = 24


@pytest.fixture(scope="module")
def fork() -> Iterator[Callable[..., BaseProcess]]:
    """Starts code in a process of its own; what is left of them ends with the tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "numpy",
            "pyarrow.parquet",
            "gradstore.store",
            "gradstore.compact",
            "gradstore.verify",
            "gradstore.problem_table",
        ]
    )
    started = []

    def start(code: str, **names: object) -> BaseProcess:
        process = context.Process(target=exec, args=(code, {"N": N, "DIM": DIM, **names}))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def last(log: Path, what: str) -> int:
    """The newest number after a word; 0 before there is one."""
    numbers = [
        int(line.split()[1]) for line in log.read_text(encoding="utf-8").splitlines() if line.startswith(f"{what} ")
    ]
    return numbers[-1] if numbers else 0


def wait_for(log: Path, what: str, process: BaseProcess) -> None:
    deadline = time.monotonic() + 60
    while not (log.exists() and what in log.read_text(encoding="utf-8")):
        assert process.is_alive(), "the writer failed by itself"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill(process: BaseProcess) -> None:
    assert process.pid is not None
    assert process.is_alive(), "the writer failed by itself"
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def check_every_row(path: Path, rows: int) -> None:
    """Every published row, superseded ones too, is the known function of its number."""
    from gradstore.header import read_header
    from gradstore.snapshot import open_snapshot
    from gradstore.stored_rows import StoredRows

    snapshot = open_snapshot(read_header(path), path / "collections/pool")
    assert snapshot.manifest.rows == rows
    serial = np.arange(rows)
    sketch = np.stack([np.cos(serial * (j + 1.0)) for j in range(DIM)], axis=1)
    norm = np.linalg.norm(sketch, axis=1)
    assert np.array_equal(snapshot.column("n_rollouts"), serial)
    assert np.array_equal(snapshot.column("problem"), serial % N)
    assert np.allclose(snapshot.column("norm"), norm, rtol=1e-5)
    assert np.allclose(StoredRows(snapshot, serial).unit_rows(serial), sketch / norm[:, None], atol=0.02)


def test_killed_writers_lose_and_invent_nothing(new_store: Callable, fork: Callable, tmp_path: Path) -> None:
    """Fifty writers in turn on one store, each killed while it opens, cleans up, appends, publishes or closes.

    Metadata that runs ahead of the data, or a checksum that is not extended from the published bytes, shows here.
    """
    store = new_store(n=N, chunk_rows=64)
    log = tmp_path / "log"
    log.touch()
    rng = np.random.default_rng(0)
    rows, interrupted = 0, 0
    for round_ in range(50):
        log.write_text(f"done {rows}\n")
        process = fork(WRITER, PATH=str(store.path), LOG=str(log), SEED=round_, ROWS=rows)
        if round_ % 5:
            wait_for(log, "try", process)
        time.sleep(float(rng.uniform(0, 0.06)))  # long enough for rows on a loaded machine too
        kill(process)
        reader = gradstore.open(store.path)
        report = reader.verify()
        assert report.ok, report.findings
        interrupted += any("interrupted" in note for note in report.notes)
        published = read_manifest(store.path / "collections/pool").rows
        assert published in {last(log, "done"), last(log, "try")}
        assert published >= last(log, "done")
        rows = published
        check_every_row(store.path, rows)
        view = reader.view("pool")
        newest = {f"p{i % N}": i for i in range(rows)}
        assert dict(zip(view.ids, view.n_rollouts.tolist(), strict=True)) == newest
    assert interrupted > 25
    assert rows > 500
    with store.writer("pool", step=10**6) as writer:
        sketch = np.stack([np.cos(np.array([rows]) * (j + 1.0)) for j in range(DIM)], axis=1)
        writer.append([f"p{rows % N}"], sketch, n_rollouts=[rows])
    check_every_row(store.path, rows + 1)
    report = store.verify()
    assert report.ok
    assert not report.notes
    shown = json.loads((store.path / "collections/pool/g0/codes/zarr.json").read_text())["shape"]
    assert shown == [rows + 1, DIM]


def test_killed_compactions_lose_nothing(new_store: Callable, fork: Callable, tmp_path: Path) -> None:
    """Killed anywhere between two generations, the problems keep their newest rows, and old files go in time."""
    store = new_store(n=N, chunk_rows=16)
    log = tmp_path / "log"
    rng = np.random.default_rng(1)
    step = 0
    for _ in range(15):
        log.write_text(f"done {step}\n")
        process = fork(COMPACTOR, PATH=str(store.path), LOG=str(log), STEP=step)
        wait_for(log, "try", process)
        time.sleep(float(rng.uniform(0, 0.1)))
        kill(process)
        reader = gradstore.open(store.path)
        report = reader.verify()
        assert report.ok, report.findings
        view = reader.view("pool")
        if not len(view):
            assert last(log, "done") == 0
            continue
        steps = set(view.steps.tolist())
        assert len(view) == N
        assert steps <= {last(log, "done"), last(log, "try")}
        assert len(steps) == 1
        step = steps.pop()
        serial = np.arange(N) + N * step
        assert view.n_rollouts.tolist() == serial.tolist()
        sketch = np.stack([np.cos(serial * (j + 1.0)) for j in range(DIM)], axis=1)
        assert np.allclose(view.rows(range(N)), sketch / np.linalg.norm(sketch, axis=1, keepdims=True), atol=0.02)
    assert step > 3
    del view, reader
    store.compact("pool", keep="newest")
    assert len(list((store.path / "collections/pool").glob("g*"))) == 1
    report = store.verify()
    assert report.ok
    assert not report.notes


def test_readers_see_whole_moments_during_writes_and_compactions(
    new_store: Callable, fork: Callable, tmp_path: Path
) -> None:
    """A reader that opens while files are replaced must get all problems at one step, each time it looks."""
    store = new_store(n=N, chunk_rows=16)
    log = tmp_path / "log"
    process = fork(COMPACTOR, PATH=str(store.path), LOG=str(log), STEP=0)
    wait_for(log, "compacted", process)
    kept, seen = [], set()
    deadline = time.monotonic() + 2.5
    while time.monotonic() < deadline:
        reader = gradstore.open(store.path)
        view = reader.view("pool")
        steps = set(view.steps.tolist())
        assert len(steps) == 1
        assert len(view) == N
        assert view.ids[5] == "p5"
        seen |= steps
        kept = [*kept[-5:], view]
        for held in kept:
            serial = np.arange(N) + N * int(held.steps[0])
            assert held.n_rollouts.tolist() == serial.tolist()
            sketch = np.stack([np.cos(serial * (j + 1.0)) for j in range(DIM)], axis=1)
            unit = sketch / np.linalg.norm(sketch, axis=1, keepdims=True)
            assert np.allclose(held.rows(range(N)), unit, atol=0.02)
        report = reader.verify()
        assert report.ok, report.findings
    kill(process)
    assert len(seen) > 3


def test_two_writers_are_refused(new_store: Callable, fork: Callable, tmp_path: Path) -> None:
    """The message names the holder; the lock of a killed holder is free at once; other collections go on."""
    store = new_store(n=N)
    log = tmp_path / "log"
    process = fork(WRITER, PATH=str(store.path), LOG=str(log), SEED=0, ROWS=0)
    wait_for(log, "done", process)
    os.kill(process.pid, signal.SIGSTOP)
    for attempt in (
        lambda: store.writer("pool", step=0).__enter__(),
        lambda: store.add_problems("pool", [{"id": "new", "prompt": "x"}]),
        lambda: store.delete("pool", ["p1"]),
        lambda: store.compact("pool"),
    ):
        with pytest.raises(LockedError, match=rf"process {process.pid} on .* is writing to it") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert store.add_problems("pool", store.records("pool")) == 0
    assert store.add_problems("other", [{"id": "a", "prompt": "x"}]) == 1
    assert store.verify().ok
    assert store.info()["collections"]["pool"]["writer"].startswith(f"process {process.pid} ")
    kill(process)
    assert store.info()["collections"]["pool"]["interrupted_writer"].startswith(f"process {process.pid} ")
    assert store.verify().ok
    with store.writer("pool", step=10**6) as writer:
        writer.append(["p1"], np.ones((1, DIM)))
    assert store.info()["collections"]["pool"]["interrupted_writer"] == ""


def test_two_writers_of_one_process_are_refused(new_store: Callable) -> None:
    """A lock that counts per process would let them write over each other's rows."""
    store = new_store()
    with store.writer("pool", step=0) as writer:
        with (
            pytest.raises(LockedError, match=f"process {os.getpid()} "),
            gradstore.open(store.path, mode="a").writer("pool", step=1),
        ):
            pass
        writer.append(["p1"], np.ones((1, DIM)))
    assert len(store.view("pool")) == 1
