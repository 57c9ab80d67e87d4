"""Rows of every size of append, whole pages or not, past the page cache or through it, are the same on the disk."""

import errno
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gradstore
import gradstore.appender
from gradstore.durable import write_all, write_past_cache
from gradstore.quantise import encode

DIM = 4096
N = 1500


def refused_at_once(path: Path, data: np.ndarray, offset: int) -> None:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def refused_half_way(path: Path, data: np.ndarray, offset: int) -> None:
    write_past_cache(path, data[: len(data) // 2], offset)
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def full(path: Path, data: np.ndarray, offset: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def sketches() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N, DIM)).astype(np.float32)


def make(path: Path) -> gradstore.Store:
    store = gradstore.create(path, dim=DIM, fingerprint={}, chunk_rows=700)
    store.add_problems("pool", [{"id": f"p{i}", "prompt": "?"} for i in range(N)])
    return store


@pytest.mark.parametrize("other", [None, refused_at_once, refused_half_way])
def test_every_size_of_append_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: Callable | None
) -> None:
    """A write past the cache that is not of whole pages, or overtakes one through it, leaves other bytes in a chunk."""
    calls = []

    def counted(path: Path, data: np.ndarray, offset: int) -> None:
        calls.append(path.stat().st_size)
        (other or write_past_cache)(path, data, offset)

    monkeypatch.setattr(gradstore.appender, "write_past_cache", counted)
    store, rows_ND = make(tmp_path / "store"), sketches()
    sizes = np.random.default_rng(1).choice([1, 3, 64, 255, 256, 257, 300], 50)
    done = 0
    with store.writer("pool", step=0) as writer:
        for size in sizes[: int(np.searchsorted(np.cumsum(sizes), N, side="right"))].tolist():
            ids = [f"p{i}" for i in range(done, done + size)]
            writer.append(ids, rows_ND[done : done + size])
            if size == 64:
                writer.publish()
            done += size
    folder = store.path / "collections/pool/g0/codes"
    chunks = [np.fromfile(folder / f"c.{chunk}.0", np.int8).reshape(700, DIM) for chunk in range(-(-done // 700))]
    whole = np.concatenate(chunks)
    assert np.array_equal(whole[:done], encode(rows_ND[:done], "int8")[0])
    assert not whole[done:].any()
    assert calls
    assert set(calls) == {700 * DIM}
    assert store.verify().ok


def test_a_full_disk_past_the_cache_surfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a refusal of the way may be answered by the other way: an error of the disk must reach the caller."""
    store, rows_ND = make(tmp_path / "store"), sketches()
    ids = [f"p{i}" for i in range(N)]
    with monkeypatch.context() as patch:
        patch.setattr(gradstore.appender, "write_past_cache", full)
        with pytest.raises(gradstore.GradstoreError, match="the disk is full"), store.writer("pool", step=0) as writer:
            writer.append(ids, rows_ND)
    assert len(gradstore.open(store.path).view("pool")) == 0
    with store.writer("pool", step=0) as writer:
        writer.append(ids, rows_ND)
    assert store.view("pool").ids.tolist() == ids
    assert store.verify().ok


def test_a_file_stays_open_for_writes_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor closed after another write's error may be another file's by the time a slow write comes to it."""
    store, rows_ND = make(tmp_path / "store"), sketches()
    calls = itertools.count()
    written = []

    def slow_after_full(path: Path, data: np.ndarray, offset: int) -> None:
        if next(calls) == 0:
            full(path, data, offset)
        time.sleep(0.3)
        refused_at_once(path, data, offset)

    def told(descriptor: int, data: np.ndarray, offset: int) -> None:
        if data.nbytes == 256 * DIM:
            written.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        write_all(descriptor, data, offset)

    monkeypatch.setattr(gradstore.appender, "write_past_cache", slow_after_full)
    monkeypatch.setattr(gradstore.appender, "write_all", told)
    with pytest.raises(gradstore.GradstoreError, match="the disk is full"), store.writer("pool", step=0) as writer:
        for start in (0, 256, 512):
            writer.append([f"p{i}" for i in range(start, start + 256)], rows_ND[start : start + 256])
    assert written == [str(store.path / "collections/pool/g0/codes/c.0.0")]


def test_ids_in_any_order_find_their_problems(tmp_path: Path) -> None:
    """Ids that go on where the last ones ended are compared, others looked up: a slip would file rows under others."""
    store = gradstore.create(tmp_path / "store", dim=1, fingerprint={}, dtype="fp32")
    store.add_problems("pool", [{"id": f"p{i}", "prompt": "?"} for i in range(20)])
    random = np.random.default_rng(0)
    known: dict[str, int] = {}
    serial = 0
    for step in range(30):
        with store.writer("pool", step=step) as writer:
            for _ in range(4):
                first, n = int(random.integers(20)), int(random.integers(1, 8))
                runs = [(first, n), (first + n, n)] if random.random() < 0.7 else [(first, 20)]
                for start, length in runs:
                    numbers = np.arange(start, start + length) % 20
                    if random.random() < 0.3:
                        numbers = random.permutation(numbers)
                    ids = [f"p{i}" for i in numbers]
                    counts = serial + np.arange(len(ids))
                    writer.append(ids, np.ones((len(ids), 1)), n_rollouts=counts)
                    known |= dict(zip(ids, counts.tolist(), strict=True))
                    serial += len(ids)
        view = store.view("pool")
        assert dict(zip(view.ids.tolist(), view.n_rollouts.tolist(), strict=True)) == known
