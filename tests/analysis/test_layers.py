"""Per-layer shares against a loop."""

import numpy as np
import pytest

from gradstore.analysis.layers import layers


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_shares_are_those_of_a_loop(history, metric) -> None:
    frame = layers(history.store, "pool", "bench", metric)
    assert len(frame) == 4 * 3
    for row in frame.itertuples():
        s = history.steps.index(row.step)
        start, stop = {"a": (0, 10), "b": (10, 16), "c": (16, 24)}[row.layer]
        rows = history.rows_SPD[s][np.isfinite(history.rows_SPD[s]).all(axis=1)]
        target = history.target(s)
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        terms = units * target / np.linalg.norm(target) if metric == "cosine" else rows * target
        own = terms[:, start:stop].sum(axis=1)
        total = sum(np.abs(terms[:, a:b].sum(axis=1)).mean() for a, b in ((0, 10), (10, 16), (16, 24)))
        assert row.term == pytest.approx(own.mean(), abs=1e-5)
        assert row.share == pytest.approx(np.abs(own).mean() / total, abs=1e-5)
        assert row.energy == pytest.approx((units[:, start:stop] ** 2).sum(axis=1).mean(), abs=1e-5)
        assert (row.n, row.dims) == (len(rows), stop - start)
    assert frame.groupby("step")[["share", "energy"]].sum().to_numpy() == pytest.approx(1)


def test_some_problems_or_a_draw(history) -> None:
    """Named problems alone; of many a seeded draw."""
    view = history.store.view("pool", 0)
    some = view.ids[view.live][:7].tolist()
    assert (layers(history.store, "pool", "bench", ids=some, steps=[0])["n"] == 7).all()
    drawn = layers(history.store, "pool", "bench", most=9, seed=1)
    assert (drawn["n"] == 9).all()
    assert drawn.equals(layers(history.store, "pool", "bench", most=9, seed=1))
    assert layers(history.store, "pool", "bench", ids=["unknown"]).empty
