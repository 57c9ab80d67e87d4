"""Problems go by number: ids are found without a string for each, records are read by row group, known ones compared.

Each is checked against a dict or a list of all of them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import gradstore
from gradstore import DamagedError, RequestError, id_lookup, problem_table
from gradstore.id_lookup import IdLookup, hashes_of, id_array
from gradstore.problem_rows import plain_table, to_table
from gradstore.problems import canonical

CHAT = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1?"}]


def names(n: int) -> list[str]:
    return [f"{'äß🙂x'[i % 4] * (i % 3)}-{i}" for i in range(n)]


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_table, "GROUP_ROWS", 4)
    monkeypatch.setattr(problem_table, "PART_ROWS", 11)


def make(path: Path, n: int) -> tuple[gradstore.Store, list[dict]]:
    """A store whose problems came in pieces, and their records."""
    store = gradstore.create(path, dim=2, fingerprint={})
    records = [
        canonical(
            {
                "id": name,
                "prompt": CHAT if i % 3 == 0 else f"Problem {i}",
                "source": f"s{i % 2}",
                "ground_truth": str(i),
                "tags": ["a"] * (i % 4),
                "extra": {"n": i} if i % 5 == 0 else {},
            },
            "",
        )
        for i, name in enumerate(names(n))
    ]
    for start in range(0, n, 13):
        store.add_problems("pool", records[start : start + 13])
    return store, records


@pytest.mark.parametrize("mask", [0, 3, 2**64 - 1])
def test_ids_are_found_as_in_a_dict(monkeypatch: pytest.MonkeyPatch, mask: int) -> None:
    """Also where all or many ids have the same hash (mask), at odd places, and for what is no id at all."""
    monkeypatch.setattr(id_lookup, "hashes_of", lambda ids: hashes_of(ids) & np.uint64(mask))
    known = names(200)
    column = pa.array(["before", *known, "after"], pa.large_string()).slice(1, 200)
    row_of = {name: row for row, name in enumerate(known)}
    asked: list[Any] = [
        *reversed(known),
        "before",
        "",
        None,
        7,
        b"x-3",
        "\ud800",
        "x" * 5000,
        known[3],
        np.str_(known[4]),
    ]
    expected = [row_of.get(name, -1) if isinstance(name, str) else -1 for name in asked]
    lookup = IdLookup(column)
    assert lookup.find(id_array(asked)).tolist() == expected
    assert lookup.find(id_array([])).tolist() == []
    assert lookup.repeated() is None
    assert IdLookup(pa.array([*known, "ß-1", known[77]], pa.large_string())).repeated() in ("ß-1", known[77])
    assert IdLookup(pa.array([], pa.large_string())).find(id_array(["a"])).tolist() == [-1]


def test_hashes_spread_and_do_not_depend_on_the_place_in_a_column() -> None:
    ids = pa.array([f"p{i:06d}" for i in range(70_000)], pa.large_string())
    whole = hashes_of(ids)
    assert len(np.unique(whole)) == len(ids)
    assert (hashes_of(ids.slice(65_000, 1000)) == whole[65_000:66_000]).all()
    assert len(np.unique(whole >> np.uint64(48))) > 40_000


def test_a_repeated_id_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = make(tmp_path / "store", 5)
    table = store._collection("pool").snapshot().problems
    table.id_column = pa.array(["a", "b", "a", "c", "d"], pa.large_string())
    with pytest.raises(DamagedError, match="'a' occurs more than once"):
        table.find(["c"])


@pytest.mark.usefixtures("small_groups")
def test_records_read_by_row_group_are_those_of_the_whole_table(tmp_path: Path) -> None:
    """In any order, with repeats, of any columns, from parts that a later writer merges meanwhile."""
    store, records = make(tmp_path / "store", 60)
    assert store.records("pool") == records
    draw = np.random.default_rng(0)
    for size in (0, 1, 2, 7, 60, 90):
        rows = draw.integers(0, 60, size)
        fresh = gradstore.open(tmp_path / "store")
        assert fresh.records("pool", [records[row]["id"] for row in rows]) == [records[row] for row in rows]
        table = fresh.problems("pool", [records[row]["id"] for row in rows], columns=["source", "id"])
        assert table.column_names == ["id", "source"]
        assert table["id"].to_pylist() == [records[row]["id"] for row in rows]
    held = gradstore.open(tmp_path / "store")._collection("pool").snapshot().problems
    held.take(np.array([3]))  # keeps the footer of the first part
    again = gradstore.open(tmp_path / "store")._collection("pool").snapshot().problems
    store.add_problems("pool", [{"id": f"new{i}", "prompt": "?"} for i in range(2)])
    for row in (59, 3, 14):
        assert held.take(np.array([row]))["id"].to_pylist() == [records[row]["id"]]
        assert again.take(np.array([row]))["id"].to_pylist() == [records[row]["id"]]
        assert held.ids_at(np.array([row])).tolist() == [records[row]["id"]]
    with pytest.raises(RequestError, match="column 'text'"):
        store.problems("pool", columns=["text"])


@pytest.mark.usefixtures("small_groups")
def test_only_the_row_groups_of_what_is_shown_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, records = make(tmp_path / "store", 60)
    read: list[Any] = []
    real = problem_table.read_stored
    monkeypatch.setattr(
        problem_table, "read_stored", lambda *a, **how: (read.append(how["groups"]), real(*a, **how))[1]
    )
    table = gradstore.open(tmp_path / "store")._collection("pool").snapshot().problems
    assert table.take(np.array([12, 1]), ["prompt"])["prompt"].to_pylist() == ["1 + 1?", "Problem 1"]
    assert read == [[0], [0]]
    assert table.ids_at(np.array([1, 12, 2])).tolist() == [records[row]["id"] for row in (1, 12, 2)]
    assert read == [[0], [0], [0], [0]]
    table.ids_at(np.array([3]))
    assert len(read) == 4  # kept


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("at_once", [1, 7, 8192])
def test_known_problems_are_compared_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Given again in any order, and among new ones; a change of any field is refused."""
    monkeypatch.setattr(gradstore.new_problems, "_AT_ONCE", at_once)
    store, records = make(tmp_path / "store", 40)
    draw = np.random.default_rng(1)
    shuffled = [records[row] for row in draw.permutation(40)]
    assert store.add_problems("pool", shuffled) == 0
    assert store.add_problems("pool", iter(records)) == 0
    sparse = [{name: value for name, value in record.items() if value not in ("", [], {})} for record in records]
    assert store.add_problems("pool", sparse) == 0
    new = [{"id": f"new {i}", "prompt": "?"} for i in range(3)]
    assert store.add_problems("pool", [*shuffled[:20], *new, *shuffled[20:]]) == 3
    assert store.n_problems("pool") == 43
    changes = {"prompt": "other", "source": "other", "ground_truth": "other", "tags": ["other"], "extra": {"x": 1}}
    for field, value in changes.items():
        changed = [*records[:33], {**records[33], field: value}, *records[34:]]
        with pytest.raises(RequestError, match=f"stored with another '{field}'"):
            store.add_problems("pool", changed)
    for field, value in {"source": 0, "tags": 0, "extra": [], "prompt": "", "id": 3, "more": 1}.items():
        with pytest.raises(RequestError, match="record 33"):
            store.add_problems("pool", [*records[:33], {**records[33], field: value}])
    with pytest.raises(RequestError, match="occurs 2 times"):
        store.add_problems("pool", [*records, records[5]])


def test_a_plain_table_is_the_checked_one() -> None:
    """For valid records; None where they are of unusual types, so that each is checked by itself."""
    records = [
        {"id": "a", "prompt": "?", "source": None, "tags": ("x", "y"), "extra": {"b": [1, {"c": None}], "a": 0.5}},
        {"id": "b", "prompt": CHAT, "ground_truth": "ü"},
        {"id": "c", "prompt": [{"role": "user", "content": [{"type": "text", "text": "part"}]}], "extra": None},
    ]
    table = plain_table(records)
    assert table is not None
    assert table.to_pylist() == to_table([canonical(record, "") for record in records]).to_pylist()
    for odd in (
        {"id": 1}, {"tags": "ab"}, {"tags": [1]}, {"extra": {"x": float("nan")}}, {"extra": {1: 2, "a": 3}},
        {"prompt": [1]}, {"prompt": []}, {"prompt": [{"role": "user"}]}, {"source": b"x"},
        {"id": "\ud800"}, {"unknown": 1},
    ):  # fmt: skip
        assert plain_table([*records, {"id": "z", "prompt": "?", **odd}]) is None, odd
