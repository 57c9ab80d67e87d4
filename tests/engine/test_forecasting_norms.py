"""Lengths of gradients now: against a slow loop over a store's rows, and what they must not depend on."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import gradstore
from gradstore import State, Store
from gradstore.engine.forecasting.live_rows import live_rows
from gradstore.engine.forecasting.norms import Trained, lengths, measured_rates, trained_toward
from gradstore.engine.forecasting.pass_rates import fit_motion, forecast

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


def test_lengths_are_the_slow_loop(tmp_path) -> None:
    """Problem by problem: of several rows of a step the last, all live ones in the contrast, all in the pass rate."""
    store, ids, rows = filled(tmp_path / "store")
    random = np.random.default_rng(1)
    units = [unit / np.linalg.norm(unit) for unit in random.normal(size=(2, DIM))]
    trained = [Trained(0, 4, units[0].astype(np.float32)), Trained(4, 8, units[1].astype(np.float32))]
    read = live_rows(store, "pool", ids, np.stack([units[0], *units]).astype(np.float32), NOW)
    history = store.history("pool", NOW)
    mean, sd, motion = lengths(history, ids, read, trained, NOW)
    last = {(name, step): (g, rate, n) for name, step, g, rate, n in rows}
    contrast, along = {}, {}
    for name in ids:
        weight, total, sums = 0.0, 0.0, np.zeros(2)
        for (own, _), (g, rate, n) in last.items():
            if own == name and 0 < rate < 1:
                weight += n * rate * (1 - rate)
                total += n * np.linalg.norm(g)
                sums += [n * g @ unit for unit in units]
        contrast[name], along[name] = (total / weight if weight else np.nan), sums / (weight + 1)

    def push(name: str, step: int) -> float:
        return min(step, 4) * along[name][0] + max(step - 4, 0) * along[name][1]

    rates = measured_rates(history, ids)
    assert sorted(zip(rates.steps.tolist(), rates.places.tolist(), strict=True)) == sorted(
        (step, ids.index(name)) for name, step in last
    )
    pushes = np.array([push(ids[place], step) for place, step in zip(rates.places, rates.steps, strict=True)])
    again = fit_motion(rates, pushes)
    assert (motion.pull, motion.drift) == pytest.approx((again.pull, again.drift))
    ends = np.array([push(name, NOW) for name in ids])
    slack, spread = forecast(motion, rates, pushes, ends, NOW).slack()
    expected = np.array([contrast[name] for name in ids])
    np.testing.assert_allclose(mean, expected * slack, rtol=1e-5)
    np.testing.assert_allclose(sd, expected * spread, rtol=1e-5)
    assert np.isnan(mean).tolist() == [not np.isfinite(contrast[name]) for name in ids]


def test_the_order_of_candidates_does_not_matter(tmp_path) -> None:
    """A problem's length is its own, wherever it stands among the candidates."""
    store, ids, _ = filled(tmp_path / "store")
    direction = np.ones((2, DIM), np.float32) / np.sqrt(DIM)
    trained = [Trained(0, 8, direction[1])]
    found = []
    for order in (ids, ids[::-1]):
        read = live_rows(store, "pool", order, direction, NOW)
        found.append(lengths(store.history("pool", NOW), order, read, trained, NOW)[0])
    np.testing.assert_allclose(found[0], found[1][::-1], rtol=1e-6)


def test_what_training_went_along(tmp_path) -> None:
    """The picks' mean gradient when they were picked, for the steps up to the next round; silent picks pull nowhere."""
    store, ids, rows = filled(tmp_path / "store")
    live = {name: g for name, step, g, rate, _ in rows if step == 0 and 0 < rate < 1}
    picks = [name for name in ids[:9] if name in live or name == "p9"][:5]
    for number, step in enumerate((0, 4)):
        picked = [picks.index(name) if name in picks else -1 for name in ids]
        columns = {
            **dict.fromkeys(("score", "low", "high", "pass_rate", "weight"), [0.0] * N),
            **dict.fromkeys(("step", "rollouts"), [0] * N),
        }
        told = {"id": ids, "state": ["live"] * N, "rolled_out": [True] * N, "picked": picked, **columns}
        store.rounds("pool").add({"number": number, "step": step}, pa.table(told))
    first, second = trained_toward(store, "pool", 6)
    assert (first.start, first.stop, second.start, second.stop) == (0, 4, 4, 6)
    mean = np.sum([live[name] for name in picks if name in live], axis=0)
    np.testing.assert_allclose(first.unit, mean / np.linalg.norm(mean), atol=1e-6)
    assert [pull.stop for pull in trained_toward(store, "pool", 4)] == [4]
