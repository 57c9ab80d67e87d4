"""A store whose projection was fitted anew: rows know their basis, and rows of different ones never meet."""

import json
from pathlib import Path

import numpy as np
import pytest

import gradstore
from gradstore.errors import DamagedError, NotAStoreError, RequestError

FINGERPRINT = {"projection": {"basis": "first"}, "layout": [["a", 0, 3], ["b", 3, 4]]}


def make_store(path: Path) -> gradstore.Store:
    """Six problems, all measured at step 0 in basis 0, two of them again at step 1 in basis 1."""
    store = gradstore.create(path, dim=4, fingerprint=FINGERPRINT, dtype="fp32", chunk_rows=4)
    store.add_problems("pool", [{"id": f"p{i}", "prompt": "?"} for i in range(6)])
    with store.writer("pool", step=0) as writer:
        writer.append([f"p{i}" for i in range(6)], np.eye(6, 4) + 1)
    assert store.add_basis("second", [("a", 0, 2), ("b", 2, 4)], {"step": 1}, {"projection-second": b"x"}) == 1
    with store.writer("pool", step=1) as writer:
        writer.append(["p4", "p1"], np.eye(2, 4) + 2, basis=1)
    return store


def test_rows_know_their_basis(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    view = store.view("pool")
    assert dict(zip(view.ids, view.bases.tolist(), strict=True)) == {
        "p0": 0, "p1": 1, "p2": 0, "p3": 0, "p4": 1, "p5": 0
    }  # fmt: skip
    assert view.live_bases == [0, 1]
    assert store.view("pool", 0).live_bases == [0]
    assert store.view("pool", basis=1).ids.tolist() == ["p1", "p4"]
    assert store.view("pool", basis=0).steps.tolist() == [0] * 6
    assert [basis.digest for basis in store.bases] == ["first", "second"]
    assert store.layers == [("a", 0, 2), ("b", 2, 4)]
    assert gradstore.open(tmp_path / "s").verify().ok


def test_a_store_of_one_basis_is_written_as_ever(tmp_path: Path) -> None:
    """Older versions read it; one with rows of a second basis they must refuse, not rank by the wrong dimensions."""
    store = gradstore.create(tmp_path / "s", dim=4, fingerprint=FINGERPRINT, dtype="fp32")
    store.add_problems("pool", [{"id": "a", "prompt": "?"}])
    with store.writer("pool", step=0) as writer:
        writer.append(["a"], np.ones((1, 4)))
    manifest = tmp_path / "s" / "collections" / "pool" / "manifest.json"
    body = json.loads(manifest.read_bytes())["manifest"]
    assert (body["format"], "bases" in body) == (1, False)
    store.add_basis("second", [("a", 0, 4)])
    with store.writer("pool", step=1) as writer:
        writer.append(["a"], np.ones((1, 4)), basis=1)
    body = json.loads(manifest.read_bytes())["manifest"]
    assert (body["format"], body["bases"]) == (2, [[1, 1]])


def test_rows_of_several_bases_are_not_decoded_together(tmp_path: Path) -> None:
    """Their dimensions mean different things: a product of two of them is a number that means nothing."""
    view = make_store(tmp_path / "s").view("pool")
    with pytest.raises(RequestError, match="bases 0, 1"):
        view.rows(np.arange(6))
    with pytest.raises(RequestError, match="bases 0, 1"):
        list(view.blocks())
    assert view.take(["p0", "p2"]).shape == (2, 4)
    assert view.take(["p1", "p4"]).shape == (2, 4)


def test_compaction_keeps_each_row_in_its_basis(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    with store.writer("pool", step=1) as writer:
        writer.append(["p4"], np.ones((1, 4)), basis=0)  # the same step in the other basis, as a benchmark has it
        writer.append(["p4"], np.ones((1, 4)), basis=1)
    store.delete("pool", ["p0"])
    before = {b: store.view("pool", basis=b).take(["p4"]) for b in (0, 1)}
    store.compact("pool", keep="newest")
    view = store.view("pool")
    assert dict(zip(view.ids, view.bases.tolist(), strict=True)) == {"p1": 1, "p2": 0, "p3": 0, "p4": 1, "p5": 0}
    for basis in (0, 1):
        assert np.array_equal(store.view("pool", basis=basis).take(["p4"]), before[basis])
    assert store.view("pool", basis=0).steps.max() == 1
    assert store.verify().ok


def test_what_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    with store.writer("pool", step=2) as writer:
        for basis in (None, 2, -1):
            with pytest.raises(RequestError, match="the store has 0 to 1"):
                writer.append(["p0"], np.ones((1, 4)), basis=basis)
    with pytest.raises(RequestError, match="4 dimensions"):
        store.add_basis("third", [("a", 0, 5)])
    assert store.add_basis("second", [("a", 0, 4)]) == 1, "a projection that is there is not added again"
    assert store.add_basis("first", [("a", 0, 4)]) == 0


def test_damage_shows(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    (path,) = (tmp_path / "s" / "attachments").glob("basis-*")
    path.write_bytes(path.read_bytes() + b" ")
    store = gradstore.open(tmp_path / "s")
    assert not store.verify().ok
    with pytest.raises(DamagedError):
        _ = store.bases
    path.rename(path.with_name(path.name.replace("000001", "000002")))
    with pytest.raises(DamagedError, match="basis 1 is missing"):
        _ = store.bases


def test_an_unknown_format_is_refused(tmp_path: Path, monkeypatch) -> None:
    store = make_store(tmp_path / "s")
    monkeypatch.setattr("gradstore.manifest.FORMAT_OF_BASES", 3)
    with pytest.raises(NotAStoreError, match="upgrade"):
        gradstore.open(store.path).view("pool")
