"""A pushed store is the store: it survives kills, shows one commit, moves only what is new, and is not believed."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gradstore
from gradstore import GradstoreError, RequestError
from gradstore.durable import crc32c
from gradstore.travel import pushing
from gradstore.travel.cache import ChunkCache
from tests.s3 import S3

URL = "s3://stores/pool.gs"
KILLED = """
import os, signal, sys
import gradstore
from gradstore.travel.places import ObjectPlace

left = int(sys.argv[3])
def killing(real):
    def put(*arguments):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    return put
for name in ("put", "replace_state", "remove"):
    setattr(ObjectPlace, name, killing(getattr(ObjectPlace, name)))
gradstore.push(sys.argv[1], sys.argv[2])
"""


def files(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_pulled_store_is_the_pushed_one(s3: S3, new_store: Callable, tools: dict, tmp_path: Path) -> None:
    """Byte for byte, through appends into a half-full chunk, new problems, deletions and a compaction."""
    store = new_store(n=20)
    for change in (
        lambda: tools["append"](store, 0, list(range(12))),
        lambda: tools["append"](store, 1, list(range(5, 10))),
        lambda: store.add_problems("pool", tools["records"](3, first=20)),
        lambda: store.delete("pool", ["p3"]),
        lambda: store.compact("pool", keep="newest"),
        lambda: tools["append"](store, 2, list(range(4, 20))),
    ):
        change()
        gradstore.push(store.path, URL)
        copy = gradstore.pull(URL, tmp_path / "copy")
        assert files(copy.path) == files(store.path)
        report = copy.verify()
        assert report.ok
        assert not report.notes
        del copy  # An open copy keeps the files that a compaction replaced.
    s3.forget()
    assert not gradstore.push(store.path, URL).changed
    assert len(s3.requests) <= 3
    view, own = gradstore.open(URL).view("pool"), store.view("pool")
    assert np.array_equal(view.rows(np.arange(len(view))), own.rows(np.arange(len(own))))


@pytest.mark.parametrize("rows", [10_000, 8_150])
def test_only_new_rows_move(s3: S3, tmp_path: Path, rows: int) -> None:
    """1 % more rows cost at most 2 % of the bytes, where they cross the border of a chunk too."""
    random = np.random.default_rng(0)
    store = gradstore.create(tmp_path / "s", dim=512, fingerprint={}, chunk_rows=4096, column_rows=4096)
    ids = [f"p{i}" for i in range(rows)]
    store.add_problems("pool", [{"id": one, "prompt": "?"} for one in ids])
    for step, n in ((0, rows), (1, rows // 100)):
        with store.writer("pool", step=step) as writer:
            writer.append(ids[:n], random.standard_normal((n, 512)).astype(np.float32))
        s3.forget()
        report = gradstore.push(store.path, URL)
        assert report.bytes <= s3.received
        assert report.requests == len(s3.requests) or step == 0
        if step == 0:
            first = s3.received
    assert s3.received <= 0.02 * first


@pytest.mark.parametrize("puts", [0, 1, 9, 17, 20, 23])
def test_a_killed_push_leaves_the_old_state(
    s3: S3, new_store: Callable, tools: dict, tmp_path: Path, puts: int
) -> None:
    """After kill -9 at any request readers see the old commit; the next push completes."""
    store = new_store(n=20)
    tools["append"](store, 0, list(range(12)))
    gradstore.push(store.path, URL)
    before = files(gradstore.pull(URL, tmp_path / "before").path)
    tools["append"](store, 1, list(range(7)))
    done = subprocess.run([sys.executable, "-c", KILLED, str(store.path), URL, str(puts)], check=False)
    now = files(gradstore.pull(URL, tmp_path / "now").path)
    assert done.returncode == -9 or now == files(store.path)
    assert now in (before, files(store.path))
    gradstore.push(store.path, URL)
    copy = gradstore.pull(URL, tmp_path / "now")
    assert files(copy.path) == files(store.path)
    assert copy.verify().ok


def test_a_reader_in_a_loop_sees_whole_commits(s3: S3, new_store: Callable, tools: dict) -> None:
    """While another pushes: each time all rows of one commit, and never an older one than before."""
    store, rows_of, seen = new_store(n=20), {}, []

    def push(step: int) -> None:
        tools["append"](store, step, list(range(step, 20)))
        if step == 3:
            store.compact("pool", keep="newest")
        view = gradstore.open(store.path).view("pool")
        rows_of[view.commit] = (view.ids.tolist(), view.steps.tolist(), view.rows(np.arange(len(view))))
        gradstore.push(store.path, URL)

    push(0)
    pushing_all = threading.Thread(target=lambda: [push(step) for step in range(1, 6)])
    pushing_all.start()
    while True:
        last = not pushing_all.is_alive()
        view = gradstore.open(URL).view("pool")
        ids, steps, rows = rows_of[view.commit]
        assert (view.ids.tolist(), view.steps.tolist()) == (ids, steps)
        np.testing.assert_array_equal(view.rows(np.arange(len(view))), rows)
        seen.append(view.commit)
        if last:
            break
    pushing_all.join()
    assert seen == sorted(seen)
    assert seen[-1] == max(rows_of)


def test_damaged_files_of_the_cache_are_fetched_again(s3: S3, new_store: Callable, tools: dict, tmp_path: Path) -> None:
    """A flipped byte, a short file, an empty one, a folder of that name: right answers all the same."""
    store = new_store(n=40)
    tools["append"](store, 0, list(range(40)))
    gradstore.push(store.path, URL)
    own = store.view("pool").rows(np.arange(40))

    def read() -> tuple[np.ndarray, int]:
        s3.forget()
        return gradstore.open(URL).view("pool").rows(np.arange(40)), len(s3.requests)

    first, fetched = read()
    np.testing.assert_array_equal(first, own)
    kept = sorted((tmp_path / "cache" / "codes").iterdir())
    assert len(kept) >= 3
    second, from_cache = read()
    np.testing.assert_array_equal(second, own)
    assert from_cache < fetched
    data = bytearray(kept[0].read_bytes())
    data[3] ^= 1
    for path, wrong in zip(kept, (bytes(data), b"short", b""), strict=False):
        path.unlink()
        path.write_bytes(wrong)
    np.testing.assert_array_equal(read()[0], own)
    kept[0].unlink()
    kept[0].mkdir()
    np.testing.assert_array_equal(read()[0], own)


def test_the_cache_forgets_what_was_not_used_longest(tmp_path: Path) -> None:
    """Never above its bound; what a search has mapped stays readable; a file larger than the bound is not kept."""
    cache = ChunkCache(tmp_path, most_bytes=250)
    parts = {name: np.random.default_rng(j).bytes(100) for j, name in enumerate("abc")}
    crcs = {name: crc32c(data) for name, data in parts.items()}
    for age, name in enumerate("ab"):
        cache.put(name, parts[name])
        os.utime(tmp_path / name, ns=(age, age))
    mapped = cache.get("b", 100, crcs["b"])
    assert mapped is not None
    os.utime(tmp_path / "b", ns=(0, 0))
    used = cache.get("a", 100, crcs["a"])  # now the newest
    assert used is not None
    cache.put("c", parts["c"])
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c"}
    assert mapped.tobytes() == parts["b"]
    assert cache.get("b", 100, crcs["b"]) is None
    cache.put("large", bytes(251))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c"}
    (tmp_path / ".tmp-1-2-a").write_bytes(bytes(200))  # of a killed process
    os.utime(tmp_path / ".tmp-1-2-a", ns=(0, 0))
    cache.put("b", parts["b"])
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 250


def test_of_two_pushes_at_once_one_is_refused(s3: S3, new_store: Callable, tools: dict, monkeypatch) -> None:
    """The later state would forget the rows of the earlier one."""
    store, real = new_store(n=20), pushing._send
    tools["append"](store, 0, list(range(12)))

    def send(*arguments: object) -> None:
        monkeypatch.setattr(pushing, "_send", real)
        tools["append"](store, 1, [1])
        gradstore.push(store.path, URL)
        real(*arguments)

    monkeypatch.setattr(pushing, "_send", send)
    with pytest.raises(GradstoreError, match="another push changed it"):
        gradstore.push(store.path, URL)
    assert not gradstore.push(store.path, URL).changed


def test_another_store_is_refused(s3: S3, new_store: Callable, tools: dict, tmp_path: Path) -> None:
    """Other settings, other rows, an older copy: none may take the place of what is there."""
    store = new_store(n=20)
    tools["append"](store, 0, list(range(12)))
    gradstore.push(store.path, URL)
    other = new_store(n=20, name="other")
    tools["append"](other, 0, list(range(1, 14)))
    with pytest.raises(RequestError, match="has other rows"):
        gradstore.push(other.path, URL)
    with pytest.raises(RequestError, match="holds another store"):
        gradstore.push(new_store(n=20, name="third", dim=7).path, URL)
    copy = gradstore.pull(URL, tmp_path / "copy")
    tools["append"](store, 1, [3])
    gradstore.push(store.path, URL)
    with pytest.raises(RequestError, match="newer there"):
        gradstore.push(copy.path, URL)


def test_old_objects_go_after_a_grace(s3: S3, new_store: Callable, tools: dict, monkeypatch) -> None:
    """A reader of the last state reads on; two states later its objects are gone and nothing else is."""
    store = new_store(n=20)
    tools["append"](store, 0, list(range(12)))
    gradstore.push(store.path, URL)
    view = gradstore.open(URL).view("pool")
    store.compact("pool")
    tools["append"](store, 1, [1])
    gradstore.push(store.path, URL)
    assert len(view.rows(np.arange(12))) == 12
    monkeypatch.setattr(pushing, "GRACE", 0)
    tools["append"](store, 2, [1])
    assert gradstore.push(store.path, URL).removed > 0
    tools["append"](store, 3, [1])
    gradstore.push(store.path, URL)
    tools["append"](store, 4, [1])
    gradstore.push(store.path, URL)
    assert len([key for key in s3.objects("pool.gs/") if "manifest." in key]) == 1


@pytest.mark.parametrize(
    "url", ["s3://", "ftp://host/x", "s3://key:secret@bucket/x", "https://host/x?signature=secret", "s3://b/../x"]
)
def test_bad_urls_are_refused(new_store: Callable, url: str) -> None:
    """In one line, in which no credential stands."""
    with pytest.raises(RequestError) as caught:
        gradstore.push(new_store().path, url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
