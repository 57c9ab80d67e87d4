"""Search divided among workers: the hits of one process, with their scores bit for bit, ties included.

Most tests replace Ray by a pool in this process that sends what Ray would send.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zarr.storage import LocalStore

import gradstore
from gradstore import RequestError
from gradstore.engine.cluster.pool import Cost, Window
from gradstore.engine.searching import on_workers
from gradstore.engine.searching.on_workers import SearchOnWorkers, parts_of
from gradstore.engine.searching.query import search
from gradstore.layout import DTYPES

N, DIM = 300, 24


class HerePool:
    """A pool of one worker in this process."""

    def __init__(self, make: Callable, *, workers: int, cpus: int) -> None:
        self._function = pickle.loads(pickle.dumps(make))()
        self.costs = [Cost(number) for number in range(workers)]

    def about(self) -> None:
        return None

    def map(self, windows: Iterable[Window]) -> Iterator[Any]:
        for window in windows:
            yield self._function(*pickle.loads(pickle.dumps(window.arguments)))

    def close(self) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_workers, "Pool", HerePool)


def filled(path: Path, dtype: str = "int8") -> gradstore.Store:
    """Several chunks; refreshed, deleted and signal-less problems; every row four times, under ids in random order."""
    random = np.random.default_rng(3)
    store = gradstore.create(path, dim=DIM, fingerprint={}, dtype=dtype, chunk_rows=16)
    names = [f"p{i:03d}" for i in random.permutation(N)]
    tags = [["even"] if i % 2 == 0 else [] for i in range(N)]
    records = [{"id": name, "prompt": "?", "source": f"s{i % 3}", "tags": tags[i]} for i, name in enumerate(names)]
    store.add_problems("pool", records)
    rows = np.tile(random.standard_normal((N // 4, DIM)), (4, 1)).astype(np.float32)
    rows[::11] = 0
    for step, chosen in enumerate([range(N), range(1, N, 3), range(2, N, 5)]):
        with store.writer("pool", step=step) as writer:
            for part in np.array_split(np.array(chosen), 3):
                shares = (part % 4 / 3).astype(np.float32)
                writer.append([names[i] for i in part], rows[(part + step) % N], pass_rate=shares)
    store.delete("pool", names[5:9])
    return store


def equal(found: Any, expected: Any) -> None:
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.positions.tolist() == expected.positions.tolist()
    assert found.scores.tobytes() == expected.scores.tobytes()
    assert (found.n_eligible, found.n_unknown) == (expected.n_eligible, expected.n_unknown)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hits_are_those_of_one_process(here: None, tmp_path: Path, dtype: str, parts: int) -> None:
    """A row lost or counted twice at a border, or a tie decided by the part, gives another list."""
    view = filled(tmp_path / "s", dtype).view("pool")
    query = np.random.default_rng(7).standard_normal(DIM).astype(np.float32)
    with SearchOnWorkers(view, workers=2, parts=parts) as rows:
        for metric in ("cosine", "dot", "fisher"):
            for largest in (True, False):
                for k in (1, 5, N // parts + 1, 2 * N):
                    asked = {"metric": metric, "largest": largest}
                    equal(rows.search(query, k, **asked), search(view, query, k, **asked))
        for where in ("source=s1", ["tag=even", "pass_rate=0.3..1"], view.norms > np.median(view.norms), "tag=none"):
            equal(rows.search(query, 9, where=where), search(view, query, 9, where=where))


def test_ties_across_parts_are_broken_by_id(here: None, tmp_path: Path) -> None:
    """All rows alike: the first ids win, wherever they lie."""
    store = gradstore.create(tmp_path / "s", dim=DIM, fingerprint={}, chunk_rows=16)
    names = [f"p{i:03d}" for i in np.random.default_rng(0).permutation(100)]
    store.add_problems("pool", [{"id": name, "prompt": "?"} for name in names])
    with store.writer("pool", step=0) as writer:
        writer.append(names, np.ones((100, DIM), np.float32))
    with SearchOnWorkers(store.view("pool"), workers=3) as rows:
        assert rows.search(np.ones(DIM), 7).ids.tolist() == sorted(names)[:7]


def test_several_bases_and_past_steps(here: None, tmp_path: Path) -> None:
    """Rows in a basis where the target is unknown have no score, in any part."""
    store = filled(tmp_path / "s")
    past = store.view("pool", at=0)
    query = np.random.default_rng(1).standard_normal(DIM).astype(np.float32)
    with SearchOnWorkers(past, workers=3) as rows:
        equal(rows.search(query, 20), search(past, query, 20))
    store.add_basis("second", [("a", 0, DIM)])
    with store.writer("pool", step=4) as writer:
        again = store.view("pool").ids[::3].tolist()
        writer.append(again, np.ones((len(again), DIM), np.float32), basis=1)
    mixed = store.view("pool")
    with SearchOnWorkers(mixed, workers=3) as rows:
        equal(rows.search(query, 20), search(mixed, query, 20))
        assert search(mixed, query, 20).n_unknown
        both = np.concatenate([query, query + 1])
        equal(rows.search(both, 20), search(mixed, both, 20))


def test_rows_of_the_view_although_the_store_goes_on(here: None, tmp_path: Path) -> None:
    """Workers that read the newest commit would rank other rows, or the same at other positions."""
    store = filled(tmp_path / "s")
    view = store.view("pool")
    query = np.random.default_rng(2).standard_normal(DIM).astype(np.float32)
    expected = search(view, query, 30)
    names = view.ids[:150].tolist()
    with store.writer("pool", step=9) as writer:
        writer.append(names, np.ones((150, DIM), np.float32))
    store.delete("pool", view.ids[160:200].tolist())
    store.compact("pool", keep="newest")
    with SearchOnWorkers(view, workers=3) as rows:
        equal(rows.search(query, 30), expected)


def test_what_cannot_be_searched(here: None, tmp_path: Path) -> None:
    store = filled(tmp_path / "s")
    view = store.view("pool")
    with SearchOnWorkers(view, workers=2) as rows:
        with pytest.raises(RequestError, match="k is 0"):
            rows.search(np.ones(DIM), 0)
        with pytest.raises(RequestError, match="holds rows of 24 dimensions"):
            rows.search(np.ones(3), 1)
    for wrong, message in (({"workers": 0}, "workers is 0"), ({"workers": 2, "parts": 0}, "parts is 0")):
        with pytest.raises(RequestError, match=message):
            SearchOnWorkers(view, **wrong)
    store.path.rename(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match="there is nothing here"):
        SearchOnWorkers(view, workers=2)


def test_a_store_that_is_no_folder_of_files_is_refused(here: None, tmp_path: Path) -> None:
    """Its codes are in a cache that this process fills."""
    filled(tmp_path / "s")
    view = gradstore.open_remote(LocalStore(tmp_path / "s", read_only=True), tmp_path / "kept").view("pool")
    with pytest.raises(RequestError, match="no whole store"):
        SearchOnWorkers(view, workers=2)


def test_parts_are_all_rows_once_and_about_equal(tmp_path: Path) -> None:
    view = filled(tmp_path / "s").view("pool")
    for n in (1, 2, 7, N, 5 * N):
        parts = parts_of(view, n)
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(view)))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert len(parts) == min(n, len(view))


@pytest.mark.slow
def test_on_ray(ray_here: Any, tmp_path: Path) -> None:
    """Real workers, one of which is killed; the views stay open from one search to the next."""
    view = filled(tmp_path / "s").view("pool")
    query = np.random.default_rng(7).standard_normal(DIM).astype(np.float32)
    with SearchOnWorkers(view, workers=2, parts=3) as rows:
        equal(rows.search(query, 20), search(view, query, 20))
        equal(rows.search(query, 20, where="tag=even"), search(view, query, 20, where="tag=even"))
        assert sum(cost.windows for cost in rows.costs) == 6
        assert sum(cost.problems for cost in rows.costs) == _eligible(view, None) + _eligible(view, "tag=even")


def _eligible(view: gradstore.View, where: str | None) -> int:
    return search(view, np.ones(DIM, np.float32), 1, where=where).n_eligible
