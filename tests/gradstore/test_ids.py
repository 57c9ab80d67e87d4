"""Ids at some positions equal the ids of all, without all of them being read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

import gradstore
from gradstore import problem_table


def test_ids_at_positions(new_store: Callable, tools: dict, monkeypatch) -> None:
    """A position looked up in the wrong part names another problem."""
    monkeypatch.setattr(problem_table, "PART_ROWS", 7)
    store = new_store(n=40)
    store.add_problems("pool", tools["records"](5, first=40))
    tools["append"](store, 0, [i for i in range(45) if i % 4])
    view = gradstore.open(store.path).view("pool")
    positions = np.random.default_rng(0).permutation(len(view))
    ids = gradstore.open(store.path).view("pool").ids
    for _ in range(2):  # from the parts, then from what they were joined to
        assert view.ids_at(positions).tolist() == ids[positions].tolist()
    assert view.ids.tolist() == ids.tolist()
    assert view.ids_at([]).tolist() == []
    read: list[str] = []
    real = problem_table.read_part
    monkeypatch.setattr(
        problem_table, "read_part", lambda c, m, part, *rest: (read.append(part.file), real(c, m, part, *rest))[1]
    )
    fresh = gradstore.open(store.path).view("pool")
    assert fresh.ids_at([0, 1]).tolist() == view.ids[:2].tolist()
    assert len(read) == 1


def test_ids_of_a_view_from_before_a_merge(new_store: Callable, tools: dict) -> None:
    """Small parts are merged by later additions; an older view still names its problems."""
    store = new_store(n=3)
    tools["append"](store, 0, [0, 1, 2])
    view = gradstore.open(store.path).view("pool")
    store.add_problems("pool", tools["records"](4, first=3))
    assert view.ids_at([2, 0]).tolist() == ["p2", "p0"]


def test_few_ids_and_many_are_the_same_strings(tmp_path: Path) -> None:
    """Few are read from the column's buffers by hand: in parts, at their ends, and with letters of several bytes."""
    store = gradstore.create(tmp_path / "store", dim=2, fingerprint={})
    names = [f"{'äß🙂x'[i % 4]}{i}" for i in range(1300)]
    for part in (names[:700], names[700:1299], names[1299:]):
        store.add_problems("pool", [{"id": name, "prompt": "?"} for name in part])
    with store.writer("pool", step=0) as writer:
        writer.append(names, np.ones((1300, 2)))
    for places in ([0, 699, 700, 1298, 1299], [1299], [], list(range(1299, -1, -1)), [5, 5]):
        view = gradstore.open(store.path).view("pool")
        for _ in range(2):  # from the parts, then from the column they are joined to
            assert view.ids_at(np.array(places, np.int64)).tolist() == [names[place] for place in places]
