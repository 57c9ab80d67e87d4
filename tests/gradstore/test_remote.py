"""A copy of a remote store equals it after every change of it, fetches only what is new, and believes no wrong byte."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from zarr.storage import LocalStore

import gradstore
from gradstore import DamagedError, NotAStoreError, RequestError, engine, mirror, open_remote
from gradstore.attachments import adding, read_attachment, write_attachment
from gradstore.durable import crc32c
from gradstore.manifest import publish_manifest, read_manifest
from tests.s3 import S3


class Counting(LocalStore):
    """Counts the keys that are fetched."""

    fetched: list[str]

    async def get(self, key, *arguments, **options):
        self.__dict__.setdefault("fetched", []).append(key)
        return await super().get(key, *arguments, **options)


def same(copy: gradstore.Store, store: gradstore.Store) -> None:
    """Views equal in every row, and nothing wrong in any byte."""
    assert copy.collections == store.collections
    for name in store.collections:
        ours, theirs = copy.view(name), store.view(name)
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.commit == theirs.commit
        assert np.array_equal(ours.rows(np.arange(len(ours))), theirs.rows(np.arange(len(theirs))))
        assert np.array_equal(ours.norms, theirs.norms)
        assert copy.records(name) == store.records(name)
    report = copy.verify()
    assert report.ok, report.findings
    assert not report.notes


@pytest.mark.parametrize("column_rows", [None, 12])
def test_a_copy_follows(new_store: Callable, tools: dict, tmp_path: Path, column_rows: int | None) -> None:
    """Rows added to a chunk that was copied half full, new problems, deletions and compactions all arrive."""
    store = new_store(n=20, column_rows=column_rows)
    assert store.info()["format"] == (3 if column_rows else 1)
    source, path = Counting(store.path), tmp_path / "copy"
    with adding(store.path):
        write_attachment(store.path, "bases", b"kept as they are")
    tools["append"](store, 0, list(range(12)))
    same(mirror(source, path), store)
    assert read_attachment(path, "bases") == b"kept as they are"
    held = gradstore.open(path).view("pool")
    before = held.rows(np.arange(12))
    source.fetched.clear()
    mirror(source, path)
    assert len([key for key in source.fetched if "/c." in key]) == 0
    tools["append"](store, 1, list(range(5, 10)))
    store.add_problems("pool", tools["records"](3, first=20))
    store.add_problems("bench", tools["records"](2))
    tools["append"](store, 0, [0, 1], collection="bench")
    source.fetched.clear()
    same(mirror(source, path), store)
    assert not any(key.endswith("g0/codes/c.0.0") and "pool" in key for key in source.fetched)
    store.delete("pool", ["p3"])
    same(mirror(source, path), store)
    store.compact("pool", keep="newest")
    same(mirror(source, path), store)
    assert np.array_equal(held.rows(np.arange(12)), before)


def test_wrong_bytes_are_refused(new_store: Callable, tools: dict, tmp_path: Path) -> None:
    """A flipped bit on the way must not get a place in the copy, and what was there stays."""
    store = new_store(n=20)
    tools["append"](store, 0, list(range(20)))
    mirror(LocalStore(store.path), tmp_path / "copy")
    tools["append"](store, 1, list(range(20)))
    file = store.path / "collections/pool/g0/codes/c.3.0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=r"c\.3\.0.*do not match their checksum"):
        mirror(LocalStore(store.path), tmp_path / "copy")
    copy = gradstore.open(tmp_path / "copy")
    assert set(copy.view("pool").steps) == {0}
    tools["check_rows"](copy.view("pool"))


def test_what_is_no_store_is_refused(new_store: Callable, tmp_path: Path) -> None:
    """Two stores must not become one, and nothing must not become an empty one."""
    with pytest.raises(NotAStoreError, match="no gradstore store"):
        mirror(LocalStore(tmp_path), tmp_path / "copy")
    mirror(LocalStore(new_store(name="a").path), tmp_path / "copy")
    other = new_store(name="b", dim=7)
    with pytest.raises(RequestError, match="another store"):
        mirror(LocalStore(other.path), tmp_path / "copy")
    with pytest.raises(RequestError, match="no collection 'nowhere'"):
        mirror(LocalStore(other.path), tmp_path / "other", ["nowhere"])


def test_read_in_place(new_store: Callable, tools: dict, tmp_path: Path) -> None:
    """A store too large to copy is searched where it is: codes are fetched when read, once, and kept in a cache."""
    store = new_store(n=20)
    tools["append"](store, 0, list(range(20)))
    source, path = Counting(store.path), tmp_path / "kept"
    remote = open_remote(source, path)
    assert not any("/codes/c" in key for key in source.fetched)
    view, own = remote.view("pool"), store.view("pool")
    assert np.array_equal(view.rows(np.arange(20)), own.rows(np.arange(20)))
    query = np.random.default_rng(0).standard_normal(view.dim).astype(np.float32)
    assert engine.search(view, query, 5).ids.tolist() == engine.search(own, query, 5).ids.tolist()
    assert sorted(key for key in source.fetched if "/codes/c" in key) == [
        f"collections/pool/g0/codes/c.{chunk}.0" for chunk in range(3)
    ]
    assert not list(path.glob("**/codes/c.*"))
    for wrong in (lambda: gradstore.open(path), lambda: mirror(source, path), lambda: open_remote(source, store.path)):
        with pytest.raises(RequestError, match="open_remote"):
            wrong()
    tools["append"](store, 1, [3])
    assert np.array_equal(open_remote(source, path).view("pool").steps, store.view("pool").steps)


def test_a_chunk_changed_in_place_is_refused(new_store: Callable, tools: dict, tmp_path: Path) -> None:
    """Rows of another moment or a flipped bit must not be scored as if they were those the manifest names."""
    store = new_store(n=20)
    tools["append"](store, 0, list(range(20)))
    view = open_remote(LocalStore(store.path), tmp_path / "kept").view("pool")
    file = store.path / "collections/pool/g0/codes/c.1.0"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=r"c\.1\.0.*not those of commit"):
        view.rows(np.arange(20))


def test_probes_and_rounds_are_copied(new_store: Callable, tools: dict, tmp_path: Path) -> None:
    """What was measured and picked belongs to the history that a copy is made for."""
    import pyarrow as pa

    store = new_store(n=20)
    tools["append"](store, 0, list(range(20)))
    ones = np.ones(4)
    store.probes("pool").add(["p1"], [ones], [ones], [ones.astype(int)], step=0, target="bench")
    one = {"id": ["p1"], "state": ["live"], "rolled_out": [True], "picked": [0]}
    numbers = {key: [1] for key in ("score", "low", "high", "step", "pass_rate", "weight", "rollouts")}
    number = store.rounds("pool").add({"step": 0}, pa.table(one | numbers))
    copy = mirror(LocalStore(store.path), tmp_path / "copy")
    assert copy.probes("pool").table().equals(store.probes("pool").table())
    assert copy.rounds("pool")[number].about == store.rounds("pool")[number].about


def test_from_an_s3_server(s3: S3, new_store: Callable, tools: dict, tmp_path: Path) -> None:
    """What a local folder stands in for above: keys, listings and missing objects of a real object store."""
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

    store = new_store(n=20)

    def upload() -> None:
        files = [file for file in store.path.glob("**/*") if file.is_file()]
        for file in sorted(files, key=lambda file: file.name == "manifest.json"):
            s3.client.put_object(Bucket="stores", Key=f"pool.gs/{file.relative_to(store.path)}", Body=file.read_bytes())

    remote = S3Store("stores", prefix="pool.gs", client_options={"allow_http": True})
    source = ObjectStore(remote, read_only=True)
    tools["append"](store, 0, list(range(20)))
    upload()
    same(mirror(source, tmp_path / "copy"), store)
    tools["append"](store, 1, [3, 4])
    store.compact("pool", keep="newest")
    upload()
    same(mirror(source, tmp_path / "copy"), store)
    remote_view, own = open_remote(source, tmp_path / "kept").view("pool"), store.view("pool")
    assert np.array_equal(remote_view.rows(np.arange(20)), own.rows(np.arange(20)))


def test_a_refresh_that_fails_leaves_the_copy(new_store: Callable, tools: dict, tmp_path: Path) -> None:
    """Right checksums over values that readers refuse: the copy answers as before, and holds nothing new."""
    store, path = new_store(n=20), tmp_path / "copy"
    tools["append"](store, 0, list(range(12)))
    mirror(LocalStore(store.path), path)
    files = {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    tools["append"](store, 1, list(range(5, 10)))
    folder = store.path / "collections/pool"
    manifest = read_manifest(folder)
    chunk = folder / manifest.folder / "norm/c.0"
    norm = np.fromfile(chunk, "<f4")
    norm[0] = -1.0
    norm.tofile(chunk)
    array = next(array for array in store._header.arrays if array.name == "norm")
    signed = (crc32c(norm[: array.rows_in(0, manifest.rows)].tobytes()), *manifest.chunks["norm"][1:])
    publish_manifest(folder, dataclasses.replace(manifest, chunks={**manifest.chunks, "norm": signed}))
    with pytest.raises(DamagedError, match="norm") as caught:
        mirror(LocalStore(store.path), path)
    assert str(path) not in str(caught.value)
    assert files == {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
