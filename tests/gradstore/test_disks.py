"""Full and read-only disks: one clear line, nothing stored is lost, and the next writer goes on.

Where this process may mount a small file system the disk is a real one; the simulated disks run everywhere.
"""

import errno
import functools
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import gradstore
from gradstore import GradstoreError, RequestError

WRITING_CALLS = ("pwrite", "fsync", "fdatasync", "rename", "posix_fallocate", "ftruncate", "mkdir")


@contextmanager
def failing_disk(monkeypatch: pytest.MonkeyPatch, after: int, *, recovers: bool) -> Iterator[list[str]]:
    """From the call number `after` on (or that one alone, if the disk recovers) writing says that it is full."""
    calls: list[str] = []
    lock = threading.Lock()

    def wrapped(name: str, real: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            with lock:
                calls.append(name)
                number = len(calls)
            if number == after or (number > after and not recovers):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in WRITING_CALLS:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        yield calls


def change_everything(store: gradstore.Store, tools: dict) -> None:
    """A bit of all that writes."""
    store.add_problems("pool", tools["records"](2, first=20))
    with store.writer("pool", step=1) as writer:
        writer.append([f"p{i}" for i in range(12)], np.stack([tools["vector"](i, 1) for i in range(12)]))
        writer.publish()
        writer.append(["p20", "p21"], np.stack([tools["vector"](i, 1) for i in (20, 21)]))
    store.delete("pool", ["p7"])
    store.compact("pool", keep="newest")


def error_of(call: Callable, *arguments: object) -> GradstoreError | None:
    """The error that a call ends with, if it does."""
    try:
        call(*arguments)
    except GradstoreError as error:
        return error
    return None


@pytest.mark.parametrize("recovers", [True, False], ids=["for a moment", "from then on"])
def test_a_disk_that_fills_at_any_call_loses_nothing(
    new_store: Callable, tools: dict, monkeypatch: pytest.MonkeyPatch, recovers: bool
) -> None:
    """Every writing call in turn fails; a half-written row, manifest or generation that is then believed shows here."""
    number, failed = 1, True
    while failed:
        store = new_store(n=20, name=f"store-{number}")
        tools["append"](store, 0, list(range(20)))
        with failing_disk(monkeypatch, number, recovers=recovers):
            told = error_of(change_everything, store, tools)
        failed = told is not None
        if told is not None:
            assert "the disk is full" in str(told)
            assert str(store.path) in str(told)
            assert "\n" not in str(told)
            assert told.exit_status == 1
        reader = gradstore.open(store.path)
        report = reader.verify()
        assert report.ok, (number, report.findings)
        view = reader.view("pool")
        deleted = {7} if 7 not in {int(name[1:]) for name in view.ids} else set()
        assert {f"p{i}" for i in set(range(20)) - deleted} <= set(view.ids)
        tools["check_rows"](view)
        del view, reader
        tools["append"](store, 2, [0, 9])
        tools["check_rows"](store.view("pool"))
        report = store.verify()
        assert report.ok, (number, report.findings)
        assert not report.notes
        number += 1 if number < 40 else 11
    assert number > 60


def test_creating_on_a_full_disk_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a store must neither open nor be in the way."""
    number, failed = 1, True
    while failed:
        path = tmp_path / f"store-{number}"
        with failing_disk(monkeypatch, number, recovers=False):
            told = error_of(functools.partial(gradstore.create, path, dim=3, fingerprint={}))
        failed = told is not None
        if failed:
            assert "the disk is full" in str(told)
            if not path.exists() or not (path / "zarr.json").exists():
                gradstore.create(path, dim=3, fingerprint={})
            assert gradstore.open(path).verify().ok
        number += 1
    assert number > 5


def test_what_a_manifest_names_is_on_the_disk_before_it(
    new_store: Callable, tools: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 does not show it, but after a power cut only what was synced is there."""
    store = new_store(n=20)
    unsynced: set[str] = set()
    published = []
    real = {
        name: getattr(os, name)
        for name in ("open", "pwrite", "posix_fallocate", "fsync", "fdatasync", "rename", "mkdir")
    }

    def path_of(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def traced_open(path: object, flags: int, *rest: object, **options: object) -> int:
        there = os.access(path, os.F_OK, dir_fd=options.get("dir_fd"))  # type: ignore[arg-type]
        new = flags & os.O_CREAT and not there
        descriptor = real["open"](path, flags, *rest, **options)
        if new:
            unsynced.add(os.path.dirname(path_of(descriptor)))
        return descriptor

    def traced_write(descriptor: int, *rest: object) -> object:
        unsynced.add(path_of(descriptor))
        return real["pwrite"](descriptor, *rest)

    def traced_allocation(descriptor: int, *rest: object) -> object:
        unsynced.add(path_of(descriptor))
        return real["posix_fallocate"](descriptor, *rest)

    def traced_sync(name: str) -> Callable:
        def sync(descriptor: int) -> None:
            real[name](descriptor)
            unsynced.discard(path_of(descriptor))

        return sync

    def traced_rename(source: object, target: object) -> None:
        if os.path.basename(target) == "manifest.json":
            waiting = unsynced - {os.path.dirname(target)}  # Of that folder the rename itself is what must last.
            published.append(waiting)
        real["rename"](source, target)
        unsynced.add(os.path.dirname(target))

    def traced_mkdir(path: object, *rest: object, **options: object) -> None:
        real["mkdir"](path, *rest, **options)
        unsynced.add(os.path.dirname(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", traced_open)
        patch.setattr(os, "pwrite", traced_write)
        patch.setattr(os, "posix_fallocate", traced_allocation)
        patch.setattr(os, "fsync", traced_sync("fsync"))
        patch.setattr(os, "fdatasync", traced_sync("fdatasync"))
        patch.setattr(os, "rename", traced_rename)
        patch.setattr(os, "mkdir", traced_mkdir)
        tools["append"](store, 0, list(range(20)))
        change_everything(store, tools)
        store.add_problems("new", tools["records"](3))
    assert len(published) == 8
    assert not any(published), [sorted(one) for one in published if one]
    assert not unsynced


@contextmanager
def mounted(path: Path, size: str) -> Iterator[None]:
    """A real file system of its own, or a skip that says why not."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"may not mount a file system here ({done.stderr.strip()}); the simulated disks were tested")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)  # A failed test may still map its files.


def test_a_real_full_disk(tmp_path: Path, tools: dict) -> None:
    """Rows are appended until nothing fits: all published ones stay, and after making room it goes on."""
    with mounted(tmp_path / "disk", "1500k"):
        store = gradstore.create(tmp_path / "disk/store", dim=4096, fingerprint={}, chunk_rows=16)
        store.add_problems("pool", tools["records"](8))
        ballast = tmp_path / "disk/ballast"
        ballast.write_bytes(bytes(200_000))
        step = 0
        while (told := error_of(tools["append"], store, step, list(range(8)))) is None:
            step += 1
        message = str(told)
        assert "the disk is full (No space left on device)" in message
        assert "nothing already stored is lost" in message
        view = gradstore.open(store.path).view("pool")
        assert set(view.steps) == {step - 1}
        tools["check_rows"](view, 0.2)
        assert store.verify().ok
        ballast.unlink()
        tools["append"](store, step, list(range(8)))
        report = store.verify()
        assert report.ok
        assert not report.notes
        del view, store


def check_read_only(path: Path, tools: dict) -> None:
    """Everything that reads works; everything that writes says that the disk does not allow it."""
    reader = gradstore.open(path)
    view = reader.view("pool")
    tools["check_rows"](view)
    assert list(view.ids) == [f"p{i}" for i in range(20)]
    assert reader.verify().ok
    assert reader.info()["collections"]["pool"]["rows"] == 20
    assert reader.records("pool") == tools["records"](20)
    store = gradstore.open(path, mode="a")
    for attempt in (
        lambda: store.add_problems("pool", tools["records"](1, first=99)),
        lambda: store.add_problems("other", tools["records"](1)),
        lambda: tools["append"](store, 1, [3]),
        lambda: store.delete("pool", ["p1"]),
        lambda: store.compact("pool"),
        lambda: gradstore.create(path.parent / "new", dim=3, fingerprint={}),
    ):
        with pytest.raises(RequestError, match=r"cannot be written \(Read-only file system\)") as caught:
            attempt()
        assert "\n" not in str(caught.value)
        assert caught.value.exit_status == 2


def test_a_simulated_read_only_disk(new_store: Callable, tools: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening for reading must not write a single byte, not even a lock."""
    store = new_store(n=20)
    tools["append"](store, 0, list(range(20)))
    real_open = os.open

    def open_only_to_read(path: object, flags: int, *rest: object, **options: object) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real_open(path, flags, *rest, **options)

    def refuse(path: object, *rest: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "open", open_only_to_read)
    for name in ("mkdir", "rename", "unlink", "ftruncate", "pwrite"):
        monkeypatch.setattr(os, name, refuse)
    check_read_only(store.path, tools)


def test_a_real_read_only_disk(tmp_path: Path, tools: dict) -> None:
    """The same on a file system that is mounted read-only."""
    disk = tmp_path / "disk"
    with mounted(disk, "16m"):
        store = gradstore.create(disk / "store", dim=24, fingerprint={}, chunk_rows=8)
        store.add_problems("pool", tools["records"](20))
        tools["append"](store, 0, list(range(20)))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        check_read_only(disk / "store", tools)


def test_a_copy_without_its_lock_files_reads_the_same(new_store: Callable, tools: dict) -> None:
    """A copy made by a tool that leaves out empty files is still a store, for readers and for writers."""
    store = new_store(n=20)
    tools["append"](store, 0, list(range(20)))
    for path in store.path.glob("**/*"):
        if path.name in ("LOCK", "IN-USE"):
            path.unlink()
    tools["check_rows"](gradstore.open(store.path).view("pool"))
    assert store.verify().ok
    store.delete("pool", ["p1"])
    store.compact()
    assert len(store.view("pool")) == 19
    assert store.verify().ok


def test_an_error_behind_the_writer_surfaces(new_store: Callable, tools: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are written while the caller goes on: a failure must reach it at the latest with the publication."""
    store = new_store(n=20)
    tools["append"](store, 0, list(range(20)))
    for call in ("pwrite", "posix_fallocate", "fdatasync"):
        with (
            monkeypatch.context() as patch,
            pytest.raises(GradstoreError, match="the disk is full"),
            store.writer("pool", step=1) as writer,
        ):
            patch.setattr(os, call, functools.partial(_refuse, os.strerror(errno.ENOSPC)))
            for i in range(20):
                writer.append([f"p{i}"], np.ones((1, 24)))
        view = gradstore.open(store.path).view("pool")
        assert set(view.steps) == {0}, call
        tools["check_rows"](view)
        tools["append"](store, 0, [1])
        assert store.verify().ok


def _refuse(reason: str, *arguments: object) -> None:
    raise OSError(errno.ENOSPC, reason)


def test_files_synced_beside_something_else(tmp_path: Path, monkeypatch) -> None:
    """Publications wait for all of them, whatever happens meanwhile: a descriptor closed under a sync that is still on
    its way could by then be another file's. And a failure names its file."""
    from gradstore import durable

    paths = [tmp_path / f"file-{i}" for i in range(25)]  # more than there are threads
    descriptors = {os.open(path, os.O_RDWR | os.O_CREAT): path for path in paths}
    synced: list[int] = []
    may_end = threading.Event()

    def held(descriptor: int) -> None:
        assert may_end.wait(60)
        synced.append(descriptor)

    monkeypatch.setattr(os, "fdatasync", held)
    with durable.syncing_beside(descriptors):
        assert not synced
        may_end.set()
    assert sorted(synced) == sorted(descriptors)
    synced.clear()
    may_end.clear()
    with pytest.raises(ZeroDivisionError), durable.syncing_beside(descriptors):
        threading.Timer(0.05, may_end.set).start()
        raise ZeroDivisionError
    assert sorted(synced) == sorted(descriptors)

    def broken(descriptor: int) -> None:
        if descriptors[descriptor].name == "file-7":
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(gradstore.GradstoreError, match="file-7: writing failed"), durable.syncing_beside(descriptors):
        pass
    monkeypatch.setattr(os, "fdatasync", held)
    with durable.syncing_beside(descriptors):  # the threads are there as before
        pass
    for descriptor in descriptors:
        os.close(descriptor)
