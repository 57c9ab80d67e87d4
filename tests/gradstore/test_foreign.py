"""A store from elsewhere: whatever its names, numbers and links say, it is read rightly or refused in one line."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

import gradstore
from gradstore import GradstoreError

stores: Any = pytest.importorskip("tests.fuzz.stores")

N_RANDOM = int(os.environ.get("GRADSTORE_FOREIGN_STORES", "300"))
LIMIT_S, HANGS_S = 5.0, 60.0
"""Seconds of the processor that a reader may take, and seconds after which it counts as hung on a busy machine."""


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stores.honest_store(tmp_path_factory.mktemp("honest") / "store")


@pytest.fixture
def store(honest: Path, fast_path: Path) -> Path:
    """A copy to change, in a folder of its own, so that what lies beside it can be watched."""
    shutil.copytree(honest, fast_path / "place/store", symlinks=True)
    return fast_path / "place/store"


def picture(folder: Path) -> dict[str, Any]:
    """Kind, size and bytes of everything in a folder; of a link where it points."""
    found: dict[str, Any] = {}
    for place, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(place, name)
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            elif path.is_file():
                size = path.stat().st_size
                found[str(path)] = (size, path.read_bytes() if size < 1 << 24 else b"")
            else:
                found[str(path)] = path.stat().st_mode
    return found


def everything(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each way to read a store."""
    yield "open", lambda: gradstore.open(path)
    opened: list[gradstore.Store] = []
    yield "open again", lambda: opened.append(gradstore.open(path))
    if not opened:
        return
    (store,) = opened
    yield "info", store.info
    yield "verify", store.verify
    yield "layers", lambda: store.layers
    names: list[str] = []
    yield "collections", lambda: names.extend(store.collections)
    for name in {"pool", "bench", *names[:4]}:
        yield "problems", lambda name=name: store.problems(name).to_pylist()
        yield "records", lambda name=name: store.records(name)
        yield "history", lambda name=name: store.history(name).to_pylist()
        yield "deleted", lambda name=name: store.deleted(name)
        yield "rounds", lambda name=name: [one.picks for one in store.rounds(name)]
        yield "probes", lambda name=name: store.probes(name).table().to_pylist()
        yield "view", lambda name=name: use_view(store, name)
    yield "mirror", lambda: mirrored(path)


def use_view(store: gradstore.Store, name: str) -> None:
    view = store.view(name)
    columns = (
        view.ids,
        view.steps,
        view.norms,
        view.states,
        view.pass_rates,
        view.n_rollouts,
        view.reasons,
        view.bases,
    )
    assert all(len(column) == len(view) for column in columns)
    assert view.states.max(initial=0) <= 2
    assert not len(view) or set(view.positions(list(view.ids)).tolist()) == set(range(len(view)))
    for basis in view.live_bases:
        of_one = store.view(name, basis=basis)
        rows = of_one.rows(np.arange(len(of_one)))
        assert rows.shape == (len(of_one), view.dim)


def mirrored(path: Path) -> None:
    from zarr.storage import LocalStore

    target = path.parent / "copy"
    shutil.rmtree(target, ignore_errors=True)
    try:
        copy = gradstore.mirror(LocalStore(path), target)
        for name in copy.collections:
            use_view(copy, name)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def tried(path: Path) -> list[str]:
    """Read the store in every way; returns the errors. They must be GradstoreErrors of one line, and come soon."""
    before = picture(path.parent)
    errors = []
    for what, read in everything(path):
        started, busy = time.monotonic(), time.process_time()
        try:
            read()
        except GradstoreError as error:
            errors.append(str(error))
        assert time.process_time() - busy < LIMIT_S, what
        assert time.monotonic() - started < HANGS_S, what
    assert not [error for error in errors if "\n" in error or len(error) > 2000]
    assert picture(path.parent) == before
    return errors


def changes(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each way to change a store."""
    opened: list[gradstore.Store] = []
    yield "open", lambda: opened.append(gradstore.open(path, mode="a"))
    if not opened:
        return
    (store,) = opened
    yield "problems", lambda: store.add_problems("pool", [{"id": "new", "prompt": "?"}])
    yield "rows", lambda: append(store)
    yield "delete", lambda: store.delete("bench", ["bench1"])
    yield "rounds", lambda: store.rounds("pool").add({"step": 9}, stores.round_of(["pool1"]))
    yield "compact", lambda: store.compact(keep="newest")
    yield "new", lambda: store.add_problems("third", [{"id": "a", "prompt": "?"}])


def append(store: gradstore.Store) -> None:
    with store.writer("pool", step=2) as writer:
        writer.append(["pool0", "pool1"], np.ones((2, stores.DIM)), basis=1)


def changed(path: Path) -> None:
    """Change the store in every way: GradstoreErrors alone, and nothing beside its folder may change."""
    before = {name: one for name, one in picture(path.parent).items() if not name.startswith(f"{path}/")}
    for what, change in changes(path):
        busy = time.process_time()
        try:
            change()
        except GradstoreError as error:
            assert "\n" not in str(error), (what, str(error))  # noqa: PT017
        assert time.process_time() - busy < LIMIT_S, what
    assert {name: one for name, one in picture(path.parent).items() if not name.startswith(f"{path}/")} == before


def test_an_honest_store_is_read(store: Path) -> None:
    """The edits below start from this one, so it must give no error by itself."""
    assert tried(store) == []
    report = gradstore.open(store).verify()
    assert report.ok, report.findings


@pytest.mark.parametrize("seed", range(0, N_RANDOM, 20))
def test_random_edits(honest: Path, fast_path: Path, seed: int) -> None:
    """Twenty stores each, half of them with right checksums: a right answer or one line, nothing else."""
    for one in range(seed, seed + 20):
        path = fast_path / f"{one}/store"
        shutil.copytree(honest, path, symlinks=True)
        what = stores.mutated(path, Random(one))
        try:
            tried(path)
            changed(path)
        except Exception as error:
            raise AssertionError(f"store {one}: {what}: {type(error).__name__}: {error}") from error
        shutil.rmtree(path.parent)
