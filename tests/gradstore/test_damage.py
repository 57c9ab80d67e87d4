"""`verify` finds every changed byte, missing file and short file, and names the file and the chunk."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gradstore
from gradstore import DamagedError, NotAStoreError, Report
from gradstore.manifest import publish_manifest, read_manifest
from gradstore.verify import verify


@pytest.fixture
def stored(new_store: Callable, tools: dict) -> gradstore.Store:
    """Two collections; several chunks, the last partial; problem parts, tombstones, reasons, a compacted generation."""
    store = new_store(n=30)
    tools["append"](store, 0, list(range(30)))
    store.delete("pool", ["p3"])
    store.compact("pool")
    store.add_problems("pool", tools["records"](2, first=30))
    with store.writer("pool", step=1) as writer:
        writer.append(["p30", "p31"], np.ones((2, 24)), state=[0, 2], reason=[None, "broken"])
    store.delete("pool", ["p5"])
    store.add_problems("bench", tools["records"](3))
    tools["append"](store, 0, [0, 1, 2], collection="bench")
    return store


def data_files(store: gradstore.Store) -> list[Path]:
    return sorted(path for path in store.path.glob("**/*") if path.is_file() and path.stat().st_size)


def chunk_of(path: Path) -> int | None:
    return int(path.name.split(".")[1]) if path.name.startswith("c.") else None


def report_or_error(path: Path) -> Report | str:
    """What `gradstore verify` tells: a report, or the one line of a root that cannot be read."""
    try:
        return gradstore.open(path).verify()
    except DamagedError as error:
        return str(error)


def assert_found(store: gradstore.Store, path: Path) -> None:
    told = report_or_error(store.path)
    if isinstance(told, str):
        assert path == store.path / "zarr.json"
        assert str(path) in told
        return
    name = path.relative_to(store.path).as_posix()
    assert not told.ok, f"nothing found in {name}"
    assert (name, chunk_of(path)) in {(finding.file, finding.chunk) for finding in told.findings}


def test_an_undamaged_store_is_whole(stored: gradstore.Store) -> None:
    """The files that the other tests damage must give no findings by themselves."""
    report = stored.verify()
    assert report.ok, report.findings
    assert not report.notes
    assert report.chunks_checked == (4 + 1) + 8 * (3 + 1)
    assert report.bytes_checked == sum(path.stat().st_size for path in data_files(stored))


def test_every_kind_of_file_every_flip_is_found(stored: gradstore.Store) -> None:
    """Three random bits of every file, the first and the last byte among them."""
    rng = np.random.default_rng(0)
    files = data_files(stored)
    assert {path.name for path in files} >= {
        "manifest.json",
        "zarr.json",
        "c.3.0",
        "c.2",
        "part-000000.parquet",
    }
    for path in files:
        whole = path.read_bytes()
        for place in {0, len(whole) - 1, int(rng.integers(len(whole)))}:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            assert_found(stored, path)
        path.write_bytes(whole)
    assert stored.verify().ok


@pytest.mark.parametrize("name", ["zarr.json", "manifest.json", "g1/step/zarr.json"])
def test_every_byte_of_the_metadata_counts(stored: gradstore.Store, name: str) -> None:
    """White space and digits too: a text that parses to something else, or to the same, was still changed."""
    path = stored.path / name if name == "zarr.json" else stored.path / "collections/pool" / name
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert_found(stored, path)


def test_missing_and_short_files_are_found(stored: gradstore.Store) -> None:
    """A file that is gone or cut must not read as fewer rows."""
    for path in data_files(stored):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert_found(stored, path)
        path.write_bytes(whole[:-1])
        assert_found(stored, path)
        path.unlink()
        assert_found(stored, path)
        path.write_bytes(whole)
    assert stored.verify().ok


def test_a_later_chunk_file_or_bytes_in_the_tail_are_found(stored: gradstore.Store) -> None:
    """Beyond the published rows everything is zero or absent, or another writer was here."""
    path = stored.path / "collections/pool/g1/norm/c.9"
    path.write_bytes(b"1234")
    assert_found(stored, path)
    path.unlink()
    path = stored.path / "collections/pool/g1/norm/c.2"
    path.write_bytes(path.read_bytes() + b"x")
    assert_found(stored, path)


def test_a_manifest_of_an_older_moment_is_found(stored: gradstore.Store, tools: dict) -> None:
    """A manifest restored from a backup is whole in itself and wrong beside newer files."""
    path = stored.path / "collections/pool/manifest.json"
    old = path.read_bytes()
    tools["append"](stored, 7, [1])
    path.write_bytes(old)
    assert not stored.verify().ok


def test_reading_damaged_rows_says_so(stored: gradstore.Store) -> None:
    """A reader names the damaged file instead of ranking by garbage, and a shortened one does not kill it."""
    path = stored.path / "collections/pool/g1/step/c.1"
    whole = path.read_bytes()
    path.write_bytes(b"x" + whole[1:])
    with pytest.raises(DamagedError, match=r"step/c\.1: damaged"):
        gradstore.open(stored.path).view("pool")
    path.write_bytes(whole)
    path = stored.path / "collections/pool/g1/codes/c.1.0"
    view = gradstore.open(stored.path).view("pool")
    path.write_bytes(b"")
    with pytest.raises(DamagedError, match=r"codes/c\.1\.0: damaged: shorter"):
        view.rows([9])
    path.unlink()
    with pytest.raises(DamagedError, match=r"codes/c\.1\.0: the file is missing"):
        view.rows([9])
    path = next((stored.path / "collections/pool/g1/problems").glob("*"))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DamagedError, match=r"part-.*parquet: damaged"):
        _ = gradstore.open(stored.path).problems("pool")


def test_compaction_does_not_launder_damage(stored: gradstore.Store) -> None:
    """Copying a damaged row under a fresh checksum would hide it for ever."""
    path = stored.path / "collections/pool/g1/codes/c.2.0"
    damaged = bytearray(path.read_bytes())
    damaged[7] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DamagedError, match=r"codes/c\.2\.0"):
        stored.compact("pool")
    assert_found(stored, path)
    assert gradstore.open(stored.path).view("pool").commit == stored.commit("pool")


def test_appending_beside_damage_keeps_it_findable(stored: gradstore.Store, tools: dict) -> None:
    """The checksum of a partial chunk grows from the published one, not from what is on the disk now."""
    path = stored.path / "collections/pool/g1/codes/c.3.0"
    damaged = bytearray(path.read_bytes())
    damaged[0] ^= 1
    path.write_bytes(damaged)
    tools["append"](stored, 9, [1])
    assert_found(stored, path)


def test_what_an_interrupted_writer_left_is_a_note(stored: gradstore.Store, tools: dict) -> None:
    """It is no damage; the next writer clears it, and then the same bytes would be."""
    folder = stored.path / "collections/pool"
    path = folder / "g1/codes/c.3.0"
    whole = bytearray(path.read_bytes())
    whole[-1] = 1
    path.write_bytes(whole)
    (folder / "g1/codes/c.4.0").write_bytes(b"half a chunk")
    (folder / "g2").mkdir()
    (folder / "g2/.tmp-zarr.json").write_bytes(b"{")
    (folder / ".tmp-manifest.json").write_bytes(b"{")
    assert not stored.verify().ok
    (folder / "LOCK").write_text(json.dumps({"pid": 2**22 + 1, "host": "elsewhere", "program": "x", "started": "y"}))
    report = stored.verify()
    assert report.ok, report.findings
    assert "left by an interrupted writer: process 4194305 on elsewhere" in report.notes[0]
    assert "2 files hold bytes that are not published" in report.notes[1]
    with stored.writer("pool", step=0):
        pass
    report = stored.verify()
    assert report.ok
    assert not report.notes
    assert sorted(path.name for path in folder.iterdir()) == ["LOCK", "g1", "manifest.json", "zarr.json"]


def test_not_a_store(tmp_path: Path) -> None:
    """One line for each way a path can be wrong."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "group").mkdir()
    (tmp_path / "group/zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    (tmp_path / "text").mkdir()
    (tmp_path / "text/zarr.json").write_text("hello")
    for name, what in [
        ("nothing", "there is nothing here"),
        ("empty", "not a gradstore store"),
        ("file", "not a gradstore store"),
        ("group", "not a gradstore store"),
        ("text", "not a gradstore store"),
    ]:
        with pytest.raises(NotAStoreError, match=f"{name}: {what}") as caught:
            gradstore.open(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_status == 2


def test_a_newer_format_is_refused(stored: gradstore.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it as this format would give wrong rows."""
    monkeypatch.setattr("gradstore.header.FORMAT_OF_COLUMN_ROWS", 4)
    newer = gradstore.create(stored.path.with_name("newer"), dim=3, fingerprint={})
    monkeypatch.undo()
    with pytest.raises(NotAStoreError, match="written in store format 4, this version reads up to 3"):
        gradstore.open(newer.path)
    manifest = read_manifest(stored.path / "collections/bench")
    monkeypatch.setattr("gradstore.manifest.FORMAT", 2)
    publish_manifest(stored.path / "collections/bench", manifest)
    monkeypatch.undo()
    with pytest.raises(NotAStoreError, match="written in store format 2"):
        gradstore.open(stored.path).view("bench")


def test_verify_alone_takes_a_path(stored: gradstore.Store) -> None:
    """A function for scripts that have no store open."""
    assert verify(stored.path).ok
