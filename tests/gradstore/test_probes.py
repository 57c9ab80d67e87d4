"""Derivatives beside the rows: kept as given, covered by verify, carried through compaction."""

import numpy as np
import pytest

import gradstore
from gradstore import additions
from gradstore.errors import DamagedError, LockedError, RequestError

IDS = ["a", "b", "c"]


@pytest.fixture
def store(tmp_path):
    store = gradstore.create(tmp_path / "store", dim=4, fingerprint={"made": "up"})
    store.add_problems("pool", [{"id": name, "prompt": f"What is {name}?"} for name in IDS])
    with store.writer("pool", step=0) as writer:
        writer.append(IDS, np.eye(4, dtype=np.float32)[:3])
    return store


def add(store, ids=IDS, step=0, target="bench", seed=0, **changes):
    random = np.random.default_rng(seed)
    arrays = {
        "derivatives": [random.normal(size=4).astype(np.float32) for _ in ids],
        "rewards": [np.array([0.0, 1, 1, 0]) for _ in ids],
        "lengths": [np.array([3, 4, 5, 6]) for _ in ids],
    } | changes
    store.probes("pool").add(ids, *arrays.values(), step=step, target=target, target_commit=7, objective={"b": 1})
    return arrays


def test_what_was_added_comes_back(store) -> None:
    """A derivative that changed in storage would move every score that is made of it."""
    assert store.probes("pool").table().num_rows == 0
    first = add(store)
    second = add(store, ["b"], step=2, target="other", seed=1, derivatives=[np.array([1.0, np.nan, 2, 3])])
    table = gradstore.open(store.path).probes("pool").table()
    assert table["id"].to_pylist() == [*IDS, "b"]
    assert table["step"].to_pylist() == [0, 0, 0, 2]
    assert table["target_commit"].to_pylist() == [7] * 4
    assert table["objective"].to_pylist() == ['{"b":1}'] * 4
    np.testing.assert_array_equal(table["derivatives"].to_pylist()[:3], first["derivatives"])
    np.testing.assert_array_equal(table["derivatives"].to_pylist()[3], second["derivatives"][0])
    assert table["lengths"].to_pylist()[0] == [3, 4, 5, 6]
    assert store.probes("pool").table(step=2)["id"].to_pylist() == ["b"]
    assert store.probes("pool").table(target="bench").num_rows == 3
    report = store.verify()
    assert report.ok
    assert not report.notes


def test_a_step_is_read_without_the_others(store, monkeypatch) -> None:
    """A run asks for its newest probes in every round: what that costs must not grow with the rounds before, nor the
    answer depend on what was asked before."""
    read = []
    whole = additions.read_inside
    monkeypatch.setattr(
        additions,
        "read_inside",
        lambda path, *more, **named: (read.append(path.name), whole(path, *more, **named))[1],
    )
    for step in range(5):
        for target in ("bench", "other"):
            add(store, IDS[: 1 + step % 3], step, target, seed=step)
        for asked in ({}, {"step": step}, {"step": step - 1, "target": "other"}, {"target": "bench"}, {"step": 99}):
            expected = gradstore.open(store.path).probes("pool").table(**asked)
            read.clear()
            assert store.probes("pool").table(**asked).equals(expected)
        n = len([name for name in read if name.startswith("part")])
        assert n == 0, "no part holds step 99, and all are known"
    read.clear()
    assert store.probes("pool").table(step=2, target="bench").num_rows == 3
    assert len([name for name in read if name.startswith("part")]) == 1


def test_compaction_carries_them_over(store) -> None:
    """Probes belong to no generation of files; those of deleted problems are hidden."""
    add(store)
    store.delete("pool", ["b"])
    assert store.probes("pool").table()["id"].to_pylist() == ["a", "c"]
    store.compact()
    assert store.probes("pool").table()["id"].to_pylist()[0] == "a"
    assert store.verify().ok
    assert not store.verify().notes


def test_damage_is_found(store) -> None:
    """A changed byte or a lost part must not become a score."""
    for seed in range(3):
        add(store, seed=seed)
    parts = sorted((store.path / "collections/pool/probes").iterdir())
    data = bytearray(parts[1].read_bytes())
    data[len(data) // 2] ^= 1
    parts[1].write_bytes(data)
    findings = store.verify().findings
    assert [finding.file for finding in findings] == [parts[1].relative_to(store.path).as_posix()]
    with pytest.raises(DamagedError, match="do not match the checksum"):
        store.probes("pool").table()
    parts[1].unlink()
    assert [finding.message for finding in store.verify().findings] == ["missing"]
    with pytest.raises(DamagedError, match="missing"):
        store.probes("pool").table()


def test_an_interrupted_addition_leaves_nothing(store, monkeypatch) -> None:
    """A part is there whole or not at all, and the next writer clears what a failure left."""
    add(store)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gradstore.durable.os.rename", fail)
        with pytest.raises(gradstore.errors.GradstoreError, match="disk is full"):
            add(store, seed=1)
    assert store.probes("pool").table().num_rows == 3
    assert store.verify().ok
    add(store, seed=1)
    assert store.probes("pool").table().num_rows == 6
    report = store.verify()
    assert report.ok
    assert not report.notes


def test_files_of_others_are_noted(store) -> None:
    """What a person put there is theirs to look at."""
    add(store)
    (store.path / "collections/pool/probes/notes.txt").write_text("mine")
    report = store.verify()
    assert report.ok
    assert report.notes == ["collections/pool/probes/notes.txt: not a file of the store"]


@pytest.mark.parametrize(
    ("ids", "changes", "message"),
    [
        (["a", "x"], {}, "'x'"),
        (["a", "a"], {}, "'a' occurs more than once"),
        (["a"], {"rewards": []}, "1 ids but rewards of 0 problems"),
        (["a"], {"rewards": [np.ones(3)]}, "problem 'a': 4 derivatives, 3 rewards and 4 lengths"),
        (["a"], {"rewards": [np.array([0, 1, 2, np.inf])]}, "problem 'a': a reward is not finite"),
        (["a"], {"step": -1}, "step must be a whole number"),
    ],
)
def test_wrong_requests(store, ids, changes, message: str) -> None:
    """Each names what was wrong, and adds nothing."""
    with pytest.raises(RequestError, match=message):
        add(store, ids, **changes)
    assert store.probes("pool").table().num_rows == 0


def test_one_writer_at_a_time(store) -> None:
    """Two additions at once would take the same number."""
    with store.writer("pool", step=1), pytest.raises(LockedError):
        add(store)
    with pytest.raises(RequestError, match="opened for reading"):
        add(gradstore.open(store.path))
