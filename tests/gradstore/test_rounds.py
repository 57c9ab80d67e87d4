"""Selection rounds: kept as given, numbered, covered by verify, carried through compaction."""

import numpy as np
import pyarrow as pa
import pytest

import gradstore
from gradstore.errors import DamagedError, GradstoreError, LockedError, RequestError

IDS = ["a", "b", "c"]


@pytest.fixture
def store(tmp_path):
    store = gradstore.create(tmp_path / "store", dim=4, fingerprint={"made": "up"})
    store.add_problems("pool", [{"id": name, "prompt": f"What is {name}?"} for name in IDS])
    with store.writer("pool", step=0) as writer:
        writer.append(IDS, np.eye(4, dtype=np.float32)[:3])
    return store


def table(ids=IDS, **changes):
    n = len(ids)
    columns = {
        "id": ids,
        "score": [0.5, float("nan"), 0.25][:n],
        "low": [float("nan")] * n,
        "high": [float("nan")] * n,
        "state": ["live", "no_signal", "unmeasured"][:n],
        "step": [3, 3, -1][:n],
        "pass_rate": [0.25, 1.0, float("nan")][:n],
        "rolled_out": [True, True, False][:n],
        "picked": [1, -1, 0][:n],
        "weight": [1.0, 0.0, 1.0][:n],
        "rollouts": [8, 0, 8][:n],
    }
    return pa.table(columns | changes)


def test_what_was_recorded_comes_back(store) -> None:
    """A round that reads back otherwise tells another story of the training."""
    assert list(store.rounds("pool")) == []
    first = {"step": 3, "selector": "cosine", "target": {"benchmark": "v"}, "warnings": ["42 % had no signal"]}
    assert store.rounds("pool").add(first, table()) == 0
    assert store.rounds("pool").add({"step": 4, "score": float("nan")}, table(IDS[:1], picked=[0])) == 1
    rounds = gradstore.open(store.path).rounds("pool")
    assert [found.number for found in rounds] == [0, 1]
    assert rounds[0].about == first
    for name in table().column_names:
        np.testing.assert_array_equal(rounds[0].table[name].to_pylist(), table()[name].to_pylist())
    assert rounds[0].picks == ["c", "a"]
    assert store.rounds("pool")[1].picks == ["a"]
    assert store.rounds("pool")[-2].about == first
    assert [found.number for found in store.rounds("pool")[::-1]] == [1, 0]
    report = store.verify()
    assert report.ok
    assert not report.notes


def test_compaction_carries_them_over(store) -> None:
    """What was chosen is history, also of problems that were deleted since."""
    store.rounds("pool").add({"step": 0}, table())
    store.delete("pool", ["b"])
    store.compact()
    assert store.rounds("pool")[0].table["id"].to_pylist() == IDS
    report = store.verify()
    assert report.ok
    assert not report.notes


def test_damage_is_found(store) -> None:
    """A changed byte or a lost round must not become a result."""
    for step in range(3):
        store.rounds("pool").add({"step": step}, table())
    parts = sorted((store.path / "collections/pool/rounds").iterdir())
    data = bytearray(parts[1].read_bytes())
    data[len(data) // 2] ^= 1
    parts[1].write_bytes(data)
    findings = store.verify().findings
    assert [finding.file for finding in findings] == [parts[1].relative_to(store.path).as_posix()]
    with pytest.raises(DamagedError, match="do not match the checksum"):
        list(store.rounds("pool"))
    assert store.rounds("pool")[2].about == {"step": 2}
    parts[1].unlink()
    assert [finding.message for finding in store.verify().findings] == ["missing"]
    with pytest.raises(DamagedError, match="missing"):
        _ = store.rounds("pool")[1]


def test_an_interrupted_record_leaves_nothing(store, monkeypatch) -> None:
    """A round is there whole or not at all, and takes the number that a failure left free."""
    store.rounds("pool").add({"step": 0}, table())

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gradstore.durable.os.rename", fail)
        with pytest.raises(GradstoreError, match="disk is full"):
            store.rounds("pool").add({"step": 1}, table())
    assert len(store.rounds("pool")) == 1
    assert store.verify().ok
    assert store.rounds("pool").add({"step": 1}, table()) == 1
    report = store.verify()
    assert report.ok
    assert not report.notes


def test_files_of_others_are_noted(store) -> None:
    """What a person put there is theirs to look at."""
    store.rounds("pool").add({"step": 0}, table())
    (store.path / "collections/pool/rounds/notes.txt").write_text("mine")
    report = store.verify()
    assert report.ok
    assert report.notes == ["collections/pool/rounds/notes.txt: not a file of the store"]


@pytest.mark.parametrize(
    ("about", "changes", "message"),
    [
        ({}, {"id": ["a", "b", "x"]}, "'x'"),
        ({}, {"id": ["a", "b", "a"]}, "'a' occurs more than once"),
        ({}, {"more": [1, 2, 3]}, r"has \['more'\] more"),
        ({}, {"step": ["x", "y", "z"]}, "columns of other types"),
        ({}, {"step": [1, None, 2]}, "columns of other types"),
        ({}, {"state": ["live", "dead", "live"]}, "state 'dead' is not one of"),
        ({}, {"picked": [0, 0, -1]}, "must count the picks"),
        ({"target": object()}, {}, "not JSON"),
    ],
)
def test_wrong_requests(store, about, changes, message: str) -> None:
    """Each names what was wrong, and records nothing."""
    with pytest.raises(RequestError, match=message):
        store.rounds("pool").add(about, table(**changes))
    assert list(store.rounds("pool")) == []


def test_requests_that_cannot_be_met(store) -> None:
    """No such round, another writer, a store opened for reading."""
    with pytest.raises(RequestError, match="has 0 rounds, there is no round 0"):
        _ = store.rounds("pool")[0]
    with store.writer("pool", step=1), pytest.raises(LockedError):
        store.rounds("pool").add({}, table())
    with pytest.raises(RequestError, match="opened for reading"):
        gradstore.open(store.path).rounds("pool").add({}, table())
