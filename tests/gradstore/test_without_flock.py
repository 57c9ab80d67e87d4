"""Where the file system has no flock: writers still exclude each other, a dead one is told from a living one, and
reading and searching need no lock at all."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstore
from gradstore import Store, exclusive
from gradstore.durable import alone
from gradstore.errors import GradstoreError, LockedError
from gradstore.exclusive import held_file

NONE = ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"]
REFUSING = """
import errno, fcntl, os
def refuse(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = refuse
"""


@pytest.fixture(params=NONE)
def without(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    def refuse(*_: object) -> None:
        number = getattr(errno, request.param)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    return str(request.param)


def make(path: Path) -> Store:
    store = gradstore.create(path, dim=4, fingerprint={"a": 1})
    store.add_problems("pool", [{"id": f"p{p}", "prompt": "?"} for p in range(8)])
    return store


def append(store: Store, step: int) -> None:
    with store.writer("pool", step=step) as writer:
        writer.append([f"p{p}" for p in range(8)], np.eye(8, 4, dtype=np.float32) + 1)


def process(code: str, *given: object, flock: bool = False) -> subprocess.Popen:
    """A process without flock, in which `code` runs; it writes a line when it has come as far as it is to come."""
    text = ("" if flock else REFUSING) + textwrap.dedent(code)
    command = [sys.executable, "-c", text, *map(str, given)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


HOLDING = """
import sys, gradstore
store = gradstore.open(sys.argv[1], "a")
with store.writer("pool", step=5) as writer:
    print("holding", flush=True)
    sys.stdin.readline()
"""


def test_everything_works_without_flock(without: str, tmp_path: Path) -> None:
    """Writing, reading, deleting, compacting, attachments, verifying; and no lock file stays behind."""
    store = make(tmp_path / "store")
    append(store, 0)
    append(store, 1)
    store.delete("pool", ["p3"])
    old = store.view("pool")
    store.compact(keep="newest")
    store.add_problems("pool", [{"id": "p3", "prompt": "?"}])
    append(store, 2)
    store.add_basis("other", [("all", 0, 4)], {}, {"file": b"1"})
    again = gradstore.open(tmp_path / "store")
    assert len(again.view("pool")) == 8
    assert len(old) == 7
    assert np.isfinite(old.rows(np.arange(7))).all()  # its files are still there
    assert again.verify().ok
    assert not list(tmp_path.glob(f"**/*{exclusive.SUFFIX}"))


def test_files_that_readers_may_use_stay(without: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can know whether a reader maps them; with flock they go."""
    store = make(tmp_path / "store")
    append(store, 0)
    append(store, 1)
    assert store.compact(keep="newest").collections[0].kept_for_readers
    monkeypatch.undo()
    gradstore.open(tmp_path / "store", "a").compact()
    assert len(list((tmp_path / "store" / "collections" / "pool").glob("g[0-9]*"))) == 1


def test_two_writers_exclude_each_other(without: str, tmp_path: Path) -> None:
    """Across processes; the error names the holder, and what it published before stays."""
    store = make(tmp_path / "store")
    append(store, 0)
    other = process(HOLDING, tmp_path / "store")
    assert other.stdout is not None
    assert other.stdout.readline() == "holding\n"
    with pytest.raises(LockedError, match=rf"process {other.pid} on ") as raised:
        append(store, 1)
    assert "\n" not in str(raised.value)
    other.communicate("\n", timeout=60)
    append(store, 1)
    assert store.verify().ok


def test_a_dead_writer_locks_nobody_out(without: str, tmp_path: Path) -> None:
    """Killed, it leaves its lock file; on its machine the next writer sees that it is gone, and cleans up."""
    store = make(tmp_path / "store")
    other = process(HOLDING, tmp_path / "store")
    assert other.stdout is not None
    other.stdout.readline()
    other.send_signal(signal.SIGKILL)
    other.communicate(timeout=60)
    assert held_file(tmp_path / "store/collections/pool/LOCK").exists()
    append(store, 1)
    assert store.verify().ok
    assert not held_file(tmp_path / "store/collections/pool/LOCK").exists()


@pytest.mark.parametrize("flock", [False, True])
def test_a_writer_of_another_machine_is_named_with_what_to_do(tmp_path: Path, flock: bool, monkeypatch: Any) -> None:
    """Nobody here can know whether it runs. A machine whose mount has flock respects the file too."""
    store = make(tmp_path / "store")
    held = held_file(tmp_path / "store/collections/pool/LOCK")
    held.write_text("17\nelsewhere\n", encoding="utf-8")
    if not flock:
        monkeypatch.setattr(fcntl, "flock", _refuse)
    with pytest.raises(LockedError, match=r"process 17 on 'elsewhere' holds this lock; .* remove the file"):
        append(store, 0)
    held.unlink()
    append(store, 0)


@pytest.mark.parametrize("content", ["", "x", "99999999999999999999\nhere\n", "17", "\x1b[2J\nhost\x1b\n", "\n" * 9])
def test_foreign_lock_files_are_one_line(tmp_path: Path, content: str, monkeypatch: Any) -> None:
    store = make(tmp_path / "store")
    held_file(tmp_path / "store/collections/pool/LOCK").write_text(content, encoding="utf-8")
    for flock in (fcntl.flock, _refuse):
        monkeypatch.setattr(fcntl, "flock", flock)
        try:
            append(store, 0)
        except GradstoreError as error:
            line = str(error)
            assert "\n" not in line
            assert "\x1b" not in line


def _refuse(*_: object) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def test_other_faults_of_flock_are_not_taken_for_its_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path / "store")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(GradstoreError, match="writing failed"):
        append(store, 0)


def test_a_folder_is_one_processes_at_a_time(without: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And waiting ends with a line, not never."""
    monkeypatch.setattr(exclusive, "PATIENCE", 0.3)
    code = """
    import sys
    from pathlib import Path
    from gradstore.durable import alone
    with alone(Path(sys.argv[1])):
        print("holding", flush=True)
        sys.stdin.readline()
    """
    other = process(code, tmp_path)
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(LockedError, match=rf"process {other.pid} "), alone(tmp_path):
        pass
    other.communicate("\n", timeout=60)
    with alone(tmp_path):
        pass


def test_searches_and_indexes_need_no_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index is built, saved and used again; where even the lock file is refused, it is built in memory."""
    from gradstore.engine.searching.indexes.folder import IndexFolder

    store = make(tmp_path / "store")
    append(store, 0)
    monkeypatch.setattr(fcntl, "flock", _refuse)
    folder = IndexFolder(gradstore.open(tmp_path / "store").view("pool"), "flat", "cosine")
    with folder.building() as may_write:
        assert may_write
    held = held_file(folder.path / "LOCK")
    assert not held.exists()
    monkeypatch.setattr(exclusive, "PATIENCE", 0.2)
    held.write_text("17\nelsewhere\n", encoding="utf-8")
    with folder.building() as may_write:
        assert not may_write


def test_rollouts_are_one_runs(without: str, tmp_path: Path) -> None:
    from gradstore.trainer.sampling.rollout import _locked

    path = tmp_path / "rollouts.jsonl"
    held_file(path).write_text("17\nelsewhere\n", encoding="utf-8")
    with pytest.raises(LockedError, match="remove the file"), _locked(path):
        pass
    held_file(path).unlink()
    with _locked(path), pytest.raises(LockedError), _locked(path):
        pass
    with _locked(path):
        pass


def test_closing_from_another_thread_unlocks(without: str, tmp_path: Path) -> None:
    import threading

    store = make(tmp_path / "store")
    writer = store.writer("pool", step=0)
    writer.__enter__()
    closing = threading.Thread(target=lambda: writer.__exit__(None, None, None))
    closing.start()
    closing.join()
    append(store, 1)


def test_the_lock_file_says_who_writes(without: str, tmp_path: Path) -> None:
    """`info` and `verify` go by LOCK, as they do with flock."""
    store = make(tmp_path / "store")
    with store.writer("pool", step=0):
        assert json.loads((tmp_path / "store/collections/pool/LOCK").read_text("utf-8"))["pid"] == os.getpid()
        assert gradstore.open(tmp_path / "store").info()["collections"]["pool"]["writer"]


def test_a_reader_whose_files_another_machine_removed_gets_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader without flock cannot show that it reads: what it has not opened yet may be gone. No row is wrong."""
    store = make(tmp_path / "store")
    append(store, 0)
    append(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", _refuse)
        reader = gradstore.open(tmp_path / "store")
        old = reader.view("pool")
    gradstore.open(tmp_path / "store", "a").compact(keep="newest")
    expected = gradstore.open(tmp_path / "store").view("pool").rows(np.arange(8))
    try:
        assert np.array_equal(old.rows(np.arange(8)), expected)
    except GradstoreError as error:
        line = str(error)
        assert "\n" not in line
        assert "open the store again" in line
    assert np.array_equal(reader.view("pool").rows(np.arange(8)), expected)
