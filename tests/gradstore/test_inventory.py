"""Inventories: what is listed, when, and what a crash, a copy or another writer makes of them."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from zarr.storage import LocalStore

import gradstore
from gradstore import DamagedError, GradstoreError, additions, mirror, presence
from gradstore.attachments import keep_coverage
from gradstore.inventory import INVENTORY, Inventory, read_inventory
from gradstore.lock import WriterLock
from gradstore.projection_digest import projection_digest


def probe(store: gradstore.Store, step: int = 0) -> None:
    ones = [np.ones(2)]
    store.probes("pool").add(["p1"], ones, ones, ones, step=step, target="bench")


@pytest.fixture
def store(new_store: Callable, tools: dict) -> gradstore.Store:
    """Twenty rows, and three parts of probes."""
    made = new_store(n=20)
    tools["append"](made, 0, list(range(20)))
    for step in range(3):
        probe(made, step)
    return made


def parts(store: gradstore.Store) -> list[Path]:
    return sorted((store.path / "collections/pool/probes").glob("part-*"))


def test_it_names_every_part_and_the_commit(store: gradstore.Store) -> None:
    """Exact bytes, so that any language can read and write it."""
    inventory = read_inventory(store.path / "collections/pool", store.path)
    assert inventory == Inventory({"probes": tuple(path.name for path in parts(store))}, store.commit("pool"))
    raw = (store.path / "collections/pool" / INVENTORY).read_bytes()
    assert Inventory.from_bytes(raw, Path("x")) == inventory
    assert inventory.to_bytes() == raw
    assert json.loads(raw)["inventory"]["format"] == 1


def test_every_changed_byte_of_it_is_found(store: gradstore.Store) -> None:
    """A list that could lose a name unseen would vouch for nothing."""
    file = store.path / "collections/pool" / INVENTORY
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedError, match=INVENTORY):
            store.check_files()
    file.write_bytes(whole)
    store.check_files()


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b'{"commit":1,"files":[],"format":1}',
        b'{"commit":1,"files":{"probes":3},"format":1}',
        b'{"commit":1,"files":{"probes":["../../x-00000000.parquet"]},"format":1}',
        b'{"commit":true,"files":{},"format":1}',
        b'{"commit":1,"files":{},"format":2}',
        b"[" * 100_000,
    ],
)
def test_one_with_a_right_checksum_and_wrong_content_is_damage(body: bytes) -> None:
    """A checksum says that bytes are as somebody wrote them, not who."""
    from gradstore.durable import crc32c

    with pytest.raises(DamagedError, match="file: damaged: ") as caught:
        Inventory.from_bytes(b'{"crc32c":"%08x","inventory":%s}\n' % (crc32c(body), body), Path("file"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_only_an_ordinary_file_is_read(store: gradstore.Store, tmp_path: Path, kind: str) -> None:
    """A pipe would wait for ever, and a link leads to what somebody else chose."""
    file = store.path / "collections/pool" / INVENTORY
    (tmp_path / "outside").write_bytes(file.read_bytes())
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "link":
        file.symlink_to(tmp_path / "outside")
    else:
        file.mkdir()
    for attempt in (store.check_files, lambda: len(store.probes("pool").table()), lambda: probe(store, 3)):
        with pytest.raises(GradstoreError, match=INVENTORY) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not store.verify().ok


def test_a_crash_before_it_is_written_costs_nothing(store: gradstore.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part is there, is read, and is listed with the next one."""

    def dies(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gradstore.collection.take_inventory", dies)
    with pytest.raises(KeyboardInterrupt):
        probe(store, 3)
    monkeypatch.undo()
    opened = gradstore.open(store.path, "a")
    assert opened.probes("pool").table().num_rows == 4
    opened.check_files()
    assert opened.verify().ok
    probe(opened, 4)
    inventory = read_inventory(store.path / "collections/pool", store.path)
    assert inventory is not None
    assert len(inventory.files["probes"]) == 5


def test_a_full_disk_while_it_is_written_is_a_warning(store: gradstore.Store, monkeypatch, caplog) -> None:
    """The part is on the disk: an error would make the caller add it again."""

    def full(*arguments: object) -> None:
        raise GradstoreError("the disk is full")

    monkeypatch.setattr("gradstore.inventory.replace_file", full)
    probe(store, 3)
    assert [record.message for record in caplog.records if "not listed yet" in record.message]
    assert store.probes("pool").table().num_rows == 4
    store.check_files()


def test_a_copy_lists_what_its_source_listed(store: gradstore.Store, tmp_path: Path) -> None:
    """A source that lost its newest part must not make a copy that looks whole."""
    mirror(LocalStore(store.path), tmp_path / "copy").check_files()
    newest = parts(store)[-1]
    newest.unlink()
    mirror(LocalStore(store.path), tmp_path / "copy").check_files()  # This copy has the part still.
    with pytest.raises(DamagedError, match=newest.name):
        mirror(LocalStore(store.path), tmp_path / "other").check_files()


def test_rows_on_their_way_are_no_older_manifest(store: gradstore.Store, tmp_path: Path, monkeypatch, tools) -> None:
    """While a copy or a writer is at work there are rows that no manifest counts yet."""
    with store.writer("pool", step=1) as writer:
        writer.append(["p1"], np.ones((1, 24)))
        gradstore.open(store.path).check_files()
    mirror(LocalStore(store.path), tmp_path / "copy")
    tools["append"](store, 2, [4, 5])
    looked = []

    def publish(folder: Path, manifest: object) -> None:
        gradstore.open(tmp_path / "copy").check_files()
        looked.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr("gradstore.remote.publish_manifest", publish)
    with pytest.raises(KeyboardInterrupt):
        mirror(LocalStore(store.path), tmp_path / "copy")
    monkeypatch.undo()
    assert looked
    gradstore.open(tmp_path / "copy").check_files()
    copy = mirror(LocalStore(store.path), tmp_path / "copy")
    copy.check_files()
    report = copy.verify()
    assert report.ok
    assert not report.notes


def test_a_writer_that_comes_and_gives_up_is_no_damage(store: gradstore.Store, monkeypatch) -> None:
    """It leaves no rows; only the moment between two looks could make it seem so."""
    real, looks = presence._has_rows_beyond, []

    def seen_once(snapshot: object) -> bool:
        looks.append(snapshot)
        return len(looks) == 1 or real(snapshot)

    monkeypatch.setattr(presence, "_has_rows_beyond", seen_once)
    store.check_files("pool")
    assert len(looks) == 2
    lock = WriterLock(store.path / "collections/pool")
    store.check_files("pool")
    lock.release(clean=True)


def test_nothing_is_added_beside_a_lost_attachment(new_store: Callable) -> None:
    """The next inventory would no longer name it."""
    store = new_store()
    keep_coverage(store.path, b"{}")
    next((store.path / "attachments").glob("coverage*")).unlink()
    with pytest.raises(DamagedError, match=r"coverage\.json.*the file is missing"):
        store.add_basis("other", [("a", 0, 24)])
    assert not store.verify().ok
    (store.path / INVENTORY).unlink()
    assert store.add_basis("other", [("a", 0, 24)]) == 1
    store.check_files()


def test_a_lost_basis_is_noticed_without_an_inventory(new_store: Callable) -> None:
    """The manifest names it: its rows could not be told from those of another basis."""
    store = new_store()
    store.add_basis("other", [("a", 0, 24)])
    with store.writer("pool", step=0) as writer:
        writer.append(["p1"], np.ones((1, 24)), basis=1)
    (store.path / INVENTORY).unlink()
    next((store.path / "attachments").glob("basis-*")).unlink()
    with pytest.raises(DamagedError, match=r"basis"):
        gradstore.open(store.path).check_files()


@pytest.mark.parametrize("content", ["another", "no projection"])
def test_a_projection_with_another_content_is_found(tmp_path: Path, content: str) -> None:
    """A file may be whole and still not be the one that the rows were made with."""
    left_OR, layout = np.eye(4, 2, dtype=np.float32), [("layer", 0, 4)]
    digest = projection_digest(layout, [(layout[0], (left_OR, None, None))], None)
    about = {"kind": "fitted", "captured": None, "layout": layout, "layers": layout}
    if content == "another":
        data = save({"0.left": 2 * left_OR}, {"projection": json.dumps(about)})
    else:
        data = b"not safetensors"
    fingerprint = {"projection": {"kind": "fitted", "basis": digest}, "layout": [["layer", 0, 4]]}
    store = gradstore.create(
        tmp_path / "store",
        dim=4,
        fingerprint=fingerprint,
        attachments={f"projection-{digest}.safetensors": data},
    )
    (finding,) = store.verify().findings
    assert finding.file.startswith(f"attachments/projection-{digest}.safetensors.")
    assert ("digest" if content == "another" else "cannot be read as a projection") in finding.message


def test_a_gap_is_found_by_names_alone(store: gradstore.Store) -> None:
    """Before a ranking nothing is read that it does not need."""
    folder = store.path / "collections/pool/probes"
    assert additions.missing_part(folder) is None
    parts(store)[1].unlink()
    assert additions.missing_part(folder) == folder / "part-000001"
