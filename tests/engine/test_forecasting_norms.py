"""Norms of gradients now: against a slow loop over a store's rows, and what they must not depend on."""

from pathlib import Path

import numpy as np

import gradstore
from gradstore import State, Store
from gradstore.engine.forecasting.kept import Places
from gradstore.engine.forecasting.live_rows import live_rows
from gradstore.engine.forecasting.measured_rates import MeasuredRates
from gradstore.engine.forecasting.norms import expected_norms
from gradstore.engine.selecting.history import History

N, DIM, NOW = 12, 5, 8


def filled(path: Path) -> tuple[Store, list[str], list[tuple]]:
    """Problems measured at steps 0, 2 and 4, some silent, some twice at a step; and the rows (id, step, g, rate, n)."""
    random = np.random.default_rng(0)
    store = gradstore.create(path, dim=DIM, fingerprint={}, dtype="fp32")
    ids = [f"p{i}" for i in range(N)]
    store.add_problems("pool", [{"id": name, "prompt": "?"} for name in ids])
    rows = []
    for step, chosen in ((0, range(10)), (0, range(3)), (2, range(4, 8)), (4, range(1, 6))):
        counts = random.choice([4, 16], len(chosen))
        rates = random.binomial(counts, 0.4) / counts
        gradients = random.normal(size=(len(chosen), DIM)) * (rates * (1 - rates))[:, None]
        states = [State.LIVE if 0 < rate < 1 else State.NO_SIGNAL for rate in rates]
        names = [ids[i] for i in chosen]
        with store.writer("pool", step=step) as writer:
            writer.append(names, gradients, state=states, pass_rate=rates, n_rollouts=counts)
        rows += list(zip(names, [step] * len(names), gradients, rates, counts, strict=True))
    return store, ids, rows


def norms(store: Store, ids: list[str], unit: np.ndarray) -> np.ndarray:
    view = store.view("pool", NOW)
    places, rates = Places(view, ids), MeasuredRates.of(view, NOW, 1.0)
    rows = live_rows(store, "pool", places, unit, NOW)
    return expected_norms(places.column(rates.newest, np.nan), rows)


def test_norms_are_the_slow_loop(tmp_path) -> None:
    """Problem by problem: of several rows of a step the last, all live ones in the contrast, the newest pass rate."""
    store, ids, rows = filled(tmp_path / "store")
    unit = (np.ones(DIM) / np.sqrt(DIM)).astype(np.float32)
    found = norms(store, ids, unit)
    last = {(name, step): (g, rate, n) for name, step, g, rate, n in rows}
    expected = []
    for name in ids:
        own = {step: row for (other, step), row in last.items() if other == name}
        live = [(g, rate, n) for g, rate, n in own.values() if 0 < rate < 1]
        if not live:
            expected.append(np.nan)
            continue
        contrast = sum(n * np.linalg.norm(g) for g, _, n in live) / sum(n * rate * (1 - rate) for _, rate, n in live)
        _, rate, n = own[max(own)]
        p = (rate * n + 0.5) / (n + 1)
        expected.append(contrast * p * (1 - p))
    assert 0 < np.isnan(expected).sum() < N
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_order_of_candidates_does_not_matter(tmp_path) -> None:
    """A problem's norm is its own, wherever it stands among the candidates."""
    store, ids, _ = filled(tmp_path / "store")
    unit = (np.ones(DIM) / np.sqrt(DIM)).astype(np.float32)
    found = []
    for order in (ids, ids[::-1]):
        found.append(norms(store, order, unit))
    np.testing.assert_allclose(found[0], found[1][::-1], rtol=1e-6)


def test_measured_rates_are_the_history(tmp_path) -> None:
    """Rows of earlier steps are kept from one forecast to the next; the sums must not show it."""
    store, ids, rows = filled(tmp_path / "store")
    for step in (2, 4, NOW):
        if step == NOW:
            with store.writer("pool", step=NOW) as writer:
                writer.append(ids[:3], np.zeros((3, DIM)), pass_rate=[1.0, np.nan, 0.0], n_rollouts=[4, 4, 0])
        found = MeasuredRates.of(store.view("pool", step), step, 0.9)
        past = History.of(store.history("pool", step), ids, now=step, forgetting=0.9)
        np.testing.assert_array_equal(1 + found.recent_right, past.a)
        np.testing.assert_array_equal(1 + found.recent_wrong, past.b)
        own = [[rate * n for name, at, _, rate, n in rows if name == one and at <= step] for one in ids]
        right = np.array([sum(each) for each in own])
        right[0] += 4 * (step == NOW)
        np.testing.assert_allclose(found.right, right)
