"""Conflict between benchmarks against a loop, and planted ones found."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from gradstore.analysis.conflict import COLUMNS, conflict, contested
from gradstore.errors import RequestError


def test_numbers_are_those_of_a_loop(make_history) -> None:
    other = np.eye(24)[0] * 0.5 - np.eye(24)[2]
    history = make_history(np.random.default_rng(0).normal(size=(2, 90)), other_target=other)
    store = history.store
    frame = conflict(store, ["bench", "other"], "pool", at=[0, 10])
    assert list(frame.columns) == COLUMNS
    for row in frame.itertuples():
        s = history.steps.index(row.step)
        view = store.view("other", row.step)
        second = (view.take(view.ids) * view.norms[:, None]).astype(float).mean(axis=0)
        first = history.target(s)
        assert row.cosine == pytest.approx(first @ second / np.linalg.norm(first) / np.linalg.norm(second), abs=1e-5)
        rows = history.rows_SPD[s]
        lengths = np.linalg.norm(rows, axis=1)
        x, y = rows @ first / lengths / np.linalg.norm(first), rows @ second / lengths / np.linalg.norm(second)
        assert row.correlation == pytest.approx(pearsonr(x, y)[0], abs=1e-4)
        assert row.rank_correlation == pytest.approx(spearmanr(x, y)[0], abs=1e-4)
        assert (row.both_help, row.a_only) == (np.mean((x > 0) & (y > 0)), np.mean((x > 0) & (y <= 0)))
        assert row.both_help + row.a_only + row.b_only + row.both_harm == pytest.approx(1)
        assert row.n == 90


def test_contested_problems_help_one_and_harm_the_other(make_history) -> None:
    history = make_history(np.random.default_rng(1).normal(size=(1, 80)), other_target=-np.eye(24)[0], noise=0.1)
    frame = contested(history.store, "bench", "other", "pool", k=10)
    assert len(frame) == 10
    assert (frame["score_helped"] > 0).all()
    assert (frame["score_harmed"] < 0).all()
    np.testing.assert_allclose(frame["contest"], np.minimum(frame["score_helped"], -frame["score_harmed"]))
    everyone = [min(history.cosine(0, p), 1) for p in range(80)]
    assert set(frame["id"]) <= {history.ids[p] for p in np.argsort(everyone)[-16:]}
    opposed = conflict(history.store, ["bench", "other"], "pool").iloc[0]
    assert opposed["cosine"] < -0.95
    assert opposed["step"] == -1
    same = contested(history.store, "bench", "bench", "pool")
    assert same.empty


def test_requests_are_checked(history) -> None:
    with pytest.raises(RequestError, match="two benchmarks"):
        conflict(history.store, ["bench", "bench"], "pool")
    with pytest.raises(RequestError, match="nowhere"):
        conflict(history.store, ["bench", "nowhere"], "pool")
    with pytest.raises(RequestError, match="nowhere"):
        contested(history.store, "bench", "nowhere", "pool")
