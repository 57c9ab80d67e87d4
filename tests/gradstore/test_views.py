"""Views against a slow dictionary, over random histories of appends, deletions, compactions and reopening."""

import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradstore
from gradstore import RequestError, State

N = 6
ACTIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 4), st.lists(st.integers(0, N - 1), min_size=1, unique=True)),
    st.tuples(st.just("delete"), st.just(0), st.lists(st.integers(0, N - 1), min_size=1, unique=True)),
    st.tuples(st.just("reopen"), st.just(0), st.just([])),
    st.tuples(st.just("compact"), st.just(0), st.just([])),
)


class SlowStore:
    """The meaning of a store: a list of (problem, step, serial number) and a loop."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int]] = []
        self.serial = 0

    def append(self, step: int, problems: list[int]) -> list[int]:
        serials = list(range(self.serial, self.serial + len(problems)))
        self.rows += [(problem, step, serial) for problem, serial in zip(problems, serials, strict=True)]
        self.serial += len(problems)
        return serials

    def delete(self, problems: list[int]) -> None:
        self.rows = [row for row in self.rows if row[0] not in problems]

    def view(self, at: int | None) -> dict[int, tuple[int, int]]:
        newest: dict[int, tuple[int, int]] = {}
        for problem, step, serial in self.rows:
            if (at is None or step <= at) and (step, serial) >= newest.get(problem, (-1, -1)):
                newest[problem] = step, serial
        return newest


@given(actions=st.lists(ACTIONS, max_size=12))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_views_equal_a_slow_loop(fast_path: Path, actions: list) -> None:
    """Steps arrive in any order and rows die: a view that trusts row order, or forgets a tombstone, shows here."""
    with TemporaryDirectory(dir=fast_path) as folder:
        path = Path(folder) / "store"
        store = gradstore.create(path, dim=2, fingerprint={}, dtype="fp32", chunk_rows=4)
        store.add_problems("pool", [{"id": f"p{i}", "prompt": "x"} for i in range(N)])
        slow = SlowStore()
        for action, step, problems in actions:
            ids = [f"p{i}" for i in problems]
            if action == "append":
                serials = slow.append(step, problems)
                with store.writer("pool", step=step) as writer:
                    writer.append(ids, [[1 + step, 1 + i] for i in problems], n_rollouts=serials)
            elif action == "delete" and set(problems) <= {int(name[1:]) for name in _ids(store)}:
                slow.delete(problems)
                store.delete("pool", ids)
            elif action == "reopen":
                store = gradstore.open(path, mode="a")
            elif action == "compact":
                dropped = set(store.deleted("pool"))
                store.compact("pool")
                store.add_problems("pool", [{"id": name, "prompt": "x"} for name in sorted(dropped)])
        for at in (None, 0, 2, 4):
            view = store.view("pool", at=at)
            told = zip(view.ids, view.steps.tolist(), view.n_rollouts.tolist(), strict=True)
            assert {int(name[1:]): (step, serial) for name, step, serial in told} == slow.view(at)
            assert [name for name in _ids(store) if name in set(view.ids)] == list(view.ids)
            rows = np.concatenate([np.zeros((0, 2)), *(block for _, block in view.scan(block_rows=2))])
            raw = np.array([[1 + step, 1 + int(name[1:])] for name, step in zip(view.ids, view.steps, strict=True)])
            if len(view):
                assert np.allclose(rows, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)
        assert store.verify().ok


def _ids(store: gradstore.Store) -> list[str]:
    return store.problems("pool")["id"].to_pylist()


@pytest.mark.parametrize("dtype", ["int8", "int4", "1bit", "fp16", "fp32"])
@pytest.mark.parametrize("dim", [5, 24])
def test_every_way_to_read_rows_agrees(new_store: Callable, tools: dict, dtype: str, dim: int) -> None:
    """Slices of mapped chunks, gathered rows and single rows must be the same numbers in the order asked."""
    store = new_store(n=50, dim=dim, dtype=dtype)
    tools["append"](store, 0, list(range(50)))
    tools["append"](store, 3, [40, 2, 9, 17])
    view = gradstore.open(store.path).view("pool")
    tools["check_rows"](view, tolerance={"int4": 0.35, "1bit": 1.3}.get(dtype, 0.02))
    whole = view.rows(np.arange(50))
    assert np.array_equal(whole, np.concatenate([rows for _, rows in view.blocks()]))
    assert np.array_equal(whole, np.concatenate([rows for _, rows in view.blocks(block_rows=7)]))
    assert np.array_equal(whole, np.stack([view.rows([i])[0] for i in range(50)]))
    order = np.random.default_rng(0).permutation(50)
    assert np.array_equal(whole[order], view.take(list(view.ids[order])))
    positions, rows = zip(*view.scan(order, block_rows=11), strict=True)
    assert np.array_equal(np.concatenate(positions), order)
    assert np.array_equal(np.concatenate(rows), whole[order])
    assert np.array_equal(view.rows(view.steps == 3), whole[view.steps == 3])
    assert [name for ids, _ in view.blocks() for name in ids] == list(view.ids)
    assert view.problems["id"].to_pylist() == list(view.ids)
    assert list(view.positions(["p3", "nobody"], strict=False)) == [3, -1]
    assert store.problems("pool", ["p4", "p1"])["ground_truth"].to_pylist() == ["4", "1"]
    with pytest.raises(RequestError, match="'nobody' has no row in this view"):
        view.take(["p1", "nobody"])
    with pytest.raises(RequestError, match=r"positions must be in \[0, 50\)"):
        view.rows([50])


def test_states_reasons_and_measurements(new_store: Callable) -> None:
    """A failed or signal-less row must read as zeros and carry what was said about it."""
    store = new_store(n=5)
    rows = np.random.default_rng(0).standard_normal((5, 24))
    rows[1] = 0
    rows[2] = np.nan
    with store.writer("pool", step=2) as writer:
        writer.append(
            [f"p{i}" for i in range(5)],
            rows,
            state=[State.LIVE, State.NO_SIGNAL, State.FAILED, State.LIVE, State.LIVE],
            norms=[2, 0, 0, 3, 4],
            pass_rate=[0.5, 1, None, float("nan"), 0.25],
            n_rollouts=[8, 8, 0, 4, 16],
            reason=[None, None, "loss was nan", None, ""],
        )
    view = store.view("pool")
    assert view.states.tolist() == [0, 1, 2, 0, 0]
    assert view.live.tolist() == [True, False, False, True, True]
    assert view.norms.tolist() == [2, 0, 0, 3, 4]
    assert np.array_equal(view.pass_rates, np.float32([0.5, 1, np.nan, np.nan, 0.25]), equal_nan=True)
    assert view.n_rollouts.tolist() == [8, 8, 0, 4, 16]
    assert view.reasons == ["", "", "loss was nan", "", ""]
    assert np.allclose(np.linalg.norm(view.rows(range(5)), axis=1), [1, 0, 0, 1, 1], atol=1e-6)
    assert view.steps.tolist() == [2] * 5
    assert store.steps("pool") == {2: 5}
    described = store.info()["collections"]["pool"]
    assert described["states"] == {"live": 3, "no_signal": 1, "failed": 1}


def test_zero_row_without_a_state_has_no_signal(new_store: Callable) -> None:
    """All rewards equal gives a gradient of exactly zero, which is not an error."""
    store = new_store(n=2)
    with store.writer("pool", step=0) as writer:
        writer.append(["p0", "p1"], np.stack([np.zeros(24), np.ones(24)]))
    assert store.view("pool").states.tolist() == [State.NO_SIGNAL, State.LIVE]


def test_a_view_does_not_change(new_store: Callable, tools: dict) -> None:
    """A query that runs while rows arrive, die and move must not see a mixture of two moments."""
    store = new_store(n=20)
    tools["append"](store, 0, list(range(20)))
    reader = gradstore.open(store.path)
    view = reader.view("pool")
    tools["append"](store, 1, list(range(10)))
    store.delete("pool", ["p3", "p15"])
    report = store.compact("pool", keep="newest")
    assert report.rows == {"pool": (30, 18)}
    assert report.collections[0].kept_for_readers == ("g0",)
    assert len(view) == 20
    assert set(view.steps) == {0}
    tools["check_rows"](view)
    later = reader.view("pool")
    assert len(later) == 18
    assert later.steps.tolist() == [1] * 9 + [0] * 9
    tools["check_rows"](later)
    del view, later
    store.compact("pool")
    assert [path.name for path in (store.path / "collections/pool").glob("g*")] == ["g1"]


def test_deleted_problems_come_back_when_appended(new_store: Callable, tools: dict) -> None:
    """A tombstone covers earlier rows only."""
    store = new_store(n=4)
    tools["append"](store, 5, [0, 1, 2, 3])
    store.delete("pool", ["p1", "p2"])
    assert store.deleted("pool") == ["p1", "p2"]
    assert len(store.view("pool", at=5)) == 2
    tools["append"](store, 3, [2])
    assert store.deleted("pool") == ["p1"]
    view = store.view("pool")
    assert list(view.ids) == ["p0", "p2", "p3"]
    assert view.steps.tolist() == [5, 3, 5]
    store.compact("pool")
    view = store.view("pool")
    assert list(view.ids) == ["p0", "p2", "p3"]
    assert store.problems("pool")["id"].to_pylist() == ["p0", "p2", "p3"]
    tools["check_rows"](view)
    assert store.verify().ok


def test_publish_makes_rows_visible_before_the_context_closes(new_store: Callable, tools: dict) -> None:
    """And what comes after an exception stays invisible, with its bytes cleared."""
    store = new_store(n=12)
    reader = gradstore.open(store.path)
    commit = reader.commit("pool")
    with pytest.raises(ZeroDivisionError), store.writer("pool", step=1) as writer:
        writer.append(["p0", "p1"], np.ones((2, 24)))
        assert len(reader.view("pool")) == 0
        assert writer.publish() == commit + 1
        assert writer.publish() == commit + 1
        assert len(reader.view("pool")) == 2
        writer.append([f"p{i}" for i in range(2, 12)], np.ones((10, 24)))
        raise ZeroDivisionError
    assert len(reader.view("pool")) == 2
    assert reader.commit("pool") == commit + 1
    report = reader.verify()
    assert report.ok
    assert not report.notes


def test_problems_added_in_many_small_calls(new_store: Callable, tools: dict) -> None:
    """Small additions merge into few files, and a reader that holds the old list still finds its problems."""
    store = new_store(n=0)
    everything = tools["records"](120)
    views = []
    for first in range(0, 120, 3):
        assert store.add_problems("pool", everything[: first + 3]) == 3
        tools["append"](store, 0, list(range(first, first + 3)))
        if first in (30, 60):
            views.append(gradstore.open(store.path).view("pool"))
    assert len(list((store.path / "collections/pool/g0/problems").iterdir())) < 10
    assert store.records("pool") == everything
    assert store.records("pool", ["p7", "p2"]) == [everything[7], everything[2]]
    for view, n in zip(views, (33, 63), strict=True):
        assert list(view.ids) == [f"p{i}" for i in range(n)]
        assert view.problems.num_rows == n
    assert store.verify().ok


def test_layers_come_from_the_fingerprint(tmp_path: Path) -> None:
    """Without a layout the whole sketch is one layer."""
    layout = [["first", 0, 4], ["second", 4, 6]]
    store = gradstore.create(tmp_path / "a", dim=6, fingerprint={"layout": layout})
    assert store.layers == [("first", 0, 4), ("second", 4, 6)]
    assert gradstore.create(tmp_path / "b", dim=6, fingerprint={}).layers == [("all", 0, 6)]


def test_default_chunks_hold_about_eight_mebibytes(tmp_path: Path) -> None:
    """Tiny chunks make a million files, huge ones preallocate gigabytes for a benchmark of a hundred problems."""
    from gradstore.layout import default_chunk_rows

    assert default_chunk_rows(4096, "int8") == 2048
    assert default_chunk_rows(4096, "fp32") == 512
    assert default_chunk_rows(4096, "int4") == 4096
    assert default_chunk_rows(3, "int8") == 16384
    assert default_chunk_rows(1 << 26, "fp32") == 1


def test_problems_read_once_serve_until_they_change(new_store: Callable, tools: dict, monkeypatch) -> None:
    """A trainer publishes at every step; a million ids read again each time would cost more than its rows. Problems
    added by another store, deleted or compacted must still be seen at once."""
    from gradstore import problem_table

    store = new_store(n=5)
    rows, reads = np.eye(5, store.dim, dtype=np.float32), []
    read = problem_table.read_part
    monkeypatch.setattr(problem_table, "read_part", lambda *given, **named: reads.append(1) or read(*given, **named))
    for step in range(3):
        with store.writer("pool", step=step) as writer:
            writer.append([f"p{i}" for i in (4, 2, 0, 1, 3)], rows)
        assert store.view("pool").ids.tolist() == [f"p{i}" for i in range(5)]
    assert len(reads) == 1
    other = gradstore.open(store.path, "a")
    other.add_problems("pool", [{"id": "new", "prompt": "?"}])
    with store.writer("pool", step=3) as writer:
        writer.append(["new"], rows[:1])
    other.delete("pool", ["p0"])
    assert store.view("pool").ids.tolist() == ["p1", "p2", "p3", "p4", "new"]
    other.compact("pool")
    with store.writer("pool", step=4) as writer:
        writer.append(["new", "p4"], rows[:2])
        with pytest.raises(gradstore.RequestError, match="'p0' is not in the collection"):
            writer.append(["p0"], rows[:1])
        writer.publish()
    assert store.view("pool").ids.tolist() == ["p1", "p2", "p3", "p4", "new"]
    assert store.view("pool").steps.tolist() == [2, 2, 2, 4, 4]


def test_a_part_of_a_view_has_its_columns_and_rows(new_store: Callable, tools: dict) -> None:
    """In the order asked for; a part of a part too. A part must not show the problems of the whole."""
    store = new_store()
    for step, problems in enumerate([range(6), range(1, 6, 2)]):
        tools["append"](store, step, list(problems))
    view = store.view("pool")
    order = np.array([4, 1, 5])
    part = view.part(order)
    again = part.part([2, 0])
    for one, places in ((part, order), (again, order[[2, 0]])):
        assert one.ids.tolist() == view.ids[places].tolist()
        assert one.steps.tolist() == view.steps[places].tolist()
        assert one.rows(np.arange(len(one))).tolist() == view.rows(places).tolist()
        assert one.positions(one.ids.tolist()).tolist() == list(range(len(one)))
    with pytest.raises(RequestError, match="positions must be in"):
        view.part([6])


def test_a_pickled_view_is_of_the_same_commit(new_store: Callable, tools: dict) -> None:
    """Another process must see the rows that this one ranked, whatever was published or compacted meanwhile."""
    store = new_store()
    tools["append"](store, 0, list(range(6)))
    tools["append"](store, 2, [1, 2])
    views = [store.view("pool"), store.view("pool", at=1), store.view("pool").part([5, 1])]
    sent = [pickle.dumps(view) for view in views]
    tools["append"](store, 3, [0, 1, 5])
    store.delete("pool", ["p4"])
    store.compact("pool", keep="newest")
    for view, data in zip(views, sent, strict=True):
        got = pickle.loads(data)
        assert (got.at, got.commit, got.ids.tolist()) == (view.at, view.commit, view.ids.tolist())
        assert got.rows(np.arange(len(got))).tolist() == view.rows(np.arange(len(view))).tolist()
    del view, views, got
    gc.collect()
    with store.writer("pool", step=4) as writer:
        writer.append(["p0"], np.ones((1, store.dim), np.float32))
    store.compact("pool", keep="newest")  # Now nobody reads the old files, and they go.
    with pytest.raises(RequestError, match=r"commit \d+ is gone, it was compacted: take a new view"):
        pickle.loads(sent[0])
