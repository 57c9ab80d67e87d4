"""Search of several stores: the hits of a store that has all rows, with their scores bit for bit, ties included."""

from pathlib import Path

import numpy as np
import pytest

import gradstore
from gradstore import FingerprintError, RequestError
from gradstore.engine import search
from gradstore.engine.searching.several import search_stores
from gradstore.layout import DTYPES

N, DIM = 120, 24
NAMES = [f"p{i:03d}" for i in np.random.default_rng(2).permutation(N)]
ROWS = np.tile(np.random.default_rng(3).standard_normal((N // 4, DIM)), (4, 1)).astype(np.float32)
ROWS[::11] = 0


def stored(path: Path, chosen: range | list[int], dtype: str = "int8", seed: int = 0) -> gradstore.View:
    """The view of a store with some of the problems; every row four times in all, some without signal."""
    store = gradstore.create(path, dim=DIM, fingerprint={"seed": seed}, dtype=dtype, chunk_rows=16)
    store.add_problems("pool", [{"id": NAMES[i], "prompt": "?", "source": f"s{i % 3}"} for i in chosen])
    with store.writer("pool", step=0) as writer:
        writer.append([NAMES[i] for i in chosen], ROWS[list(chosen)])
    return store.view("pool")


QUERY = np.random.default_rng(7).standard_normal(DIM).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hits_are_those_of_one_store(tmp_path: Path, dtype: str) -> None:
    """A problem counted twice, or a tie decided by the store, gives another list."""
    whole = stored(tmp_path / "whole", range(N), dtype)
    parts = [range(50), range(40, 41), range(30, N)]  # problems 30 to 49 are in two stores, one of them in three
    views = [stored(tmp_path / str(i), part, dtype) for i, part in enumerate(parts)]
    ids = np.concatenate([view.ids for view in views])
    for metric in ("cosine", "dot"):
        for k, largest, where in ((1, True, None), (17, True, None), (17, False, "source=s1"), (N + 5, True, None)):
            expected = search(whole, QUERY, k, metric=metric, largest=largest, where=where)
            found = search_stores(views, QUERY, k, metric=metric, largest=largest, where=where)
            assert found.ids.tolist() == expected.ids.tolist()
            assert found.scores.tobytes() == expected.scores.tobytes()
            assert ids[found.positions].tolist() == found.ids.tolist()
    assert search_stores([whole], QUERY, 9).ids.tolist() == search(whole, QUERY, 9).ids.tolist()


def test_refused(tmp_path: Path) -> None:
    one, other = stored(tmp_path / "one", range(20)), stored(tmp_path / "other", range(20, 40), seed=1)
    with pytest.raises(FingerprintError, match="seed"):
        search_stores([one, other], QUERY, 3)
    with pytest.raises(RequestError, match="dtype is 'fp16', but 'int8'"):
        search_stores([one, stored(tmp_path / "fp16", range(20, 40), "fp16")], QUERY, 3)
    with pytest.raises(RequestError, match="at least one"):
        search_stores([], QUERY, 3)
    with pytest.raises(RequestError, match="metric"):
        search_stores([one], QUERY, 3, metric="fisher")  # type: ignore[arg-type]


def test_a_problem_with_two_rows_is_refused(tmp_path: Path) -> None:
    """Which of them is meant cannot be known: they may be of different steps."""
    views = [stored(tmp_path / "one", range(20)), stored(tmp_path / "two", range(20))]
    with views[1].store.writer("pool", step=1) as writer:
        writer.append([NAMES[3]], ROWS[[4]])
    with pytest.raises(RequestError, match=rf"problem '{NAMES[3]}' has different rows in .*one and .*two"):
        search_stores([views[0], views[1].store.view("pool")], QUERY, 20)
