"""A forecast that goes on from the last one is the one made from nothing, after every kind of addition."""

from pathlib import Path

import numpy as np
import pytest

import gradstore
from gradstore import State
from gradstore.engine.forecasting import probe_scale
from gradstore.engine.forecasting.forecast import ForecastSettings, ForecastTarget, forecast_candidates
from gradstore.engine.gradients.objectives import objective
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.rollouts.group import Group
from gradstore.engine.searching.targets import target

N, DIM = 60, 16
IDS = [f"p{i}" for i in range(N)]
SETTINGS = ForecastSettings(8, 0.9, by_source=True)


def measure(store: gradstore.Store, step: int, places: np.ndarray, draw: np.random.Generator, probe: bool) -> None:
    rates = draw.integers(0, 9, len(places)) / 8
    states = [State.LIVE if 0 < rate < 1 else State.NO_SIGNAL for rate in rates]
    with store.writer("pool", step=step) as writer:
        rows = draw.normal(size=(len(places), DIM)) + np.eye(DIM)[0]
        writer.append([IDS[i] for i in places], rows, state=states, pass_rate=rates, n_rollouts=[8] * len(places))
    if probe:
        rewards = np.array([0.0, 1.0] * 4)
        groups = [Group(IDS[i], np.array([1]), [np.array([1])] * 8, rewards) for i in places]
        derivatives = [draw.normal(size=8) + rewards * 3 for _ in places]
        ProbeBatch.of(groups, derivatives, objective("gradalign")).save(store, "pool", step=step, target="bench")


def aim(store: gradstore.Store, step: int) -> ForecastTarget:
    return ForecastTarget.of(store, "pool", ["bench"], [target(store, "bench", step).vector], step)


def slow_gains(store: gradstore.Store, ids: list[str], step: int) -> np.ndarray:
    """The formula of docs/methods.md, one problem after the other, in float64."""
    fresh = probe_scale.probed_at(store, "pool", ["bench"], step)
    probes = [*([] if fresh is None else [fresh]), *probe_scale.probed_before(store, "pool", ["bench"], step)]
    y, z = (np.concatenate([getattr(own, name) for own in probes]) for name in ("sketched", "dots"))
    rows = np.concatenate([own.sketches.codes * own.sketches.scale[:, None].astype(float) for own in probes])
    slope, one = z @ y / (y @ y), np.mean(y**2)
    view, gains = store.view("pool", step), []
    for position in view.positions(ids, strict=False):
        unit = view.rows([position])[0].astype(float) if position >= 0 else np.zeros(DIM)
        weights = np.maximum(rows @ unit, 0) ** 2
        gains.append(max((weights @ (y * z) + one * slope) / (weights @ y**2 + one), 0.0))
    return np.array(gains)


@pytest.mark.parametrize("most", [256, 7])
def test_a_forecast_goes_on_from_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Stages of rounds, with probes, rows of the same step twice, a deletion, other candidates and a compaction."""
    monkeypatch.setattr(probe_scale, "_MOST", most)
    draw = np.random.default_rng(0)
    store = gradstore.create(tmp_path / "store", dim=DIM, fingerprint={})
    store.add_problems("pool", [{"id": name, "prompt": "?", "source": f"s{i % 3}"} for i, name in enumerate(IDS)])
    store.add_problems("bench", [{"id": f"v{i}", "prompt": "?"} for i in range(3)])
    computed: list[int] = []
    real = probe_scale._Gains._add
    monkeypatch.setattr(
        probe_scale._Gains,
        "_add",
        lambda own, changes, view, at: (computed.append(len(at)), real(own, changes, view, at))[1],
    )

    def check(step: int, ids: list[str]) -> None:
        toward = aim(store, step)
        with monkeypatch.context() as other:
            other.setattr(probe_scale, "_ROWS_AT_ONCE", 5)  # blocks must not matter
            going_on = forecast_candidates(store, "pool", ids, step, SETTINGS, toward)
        fresh_store = gradstore.open(tmp_path / "store")
        anew = forecast_candidates(fresh_store, "pool", list(ids), step, SETTINGS, aim(fresh_store, step))
        for name in ("mean", "sd", "offsets"):
            np.testing.assert_array_equal(getattr(going_on.cosine, name), getattr(anew.cosine, name))
        assert going_on.cosine.model == anew.cosine.model
        np.testing.assert_array_equal(going_on.norms, anew.norms)
        np.testing.assert_array_equal(going_on.signal, anew.signal)
        np.testing.assert_array_equal(going_on.newest.steps, anew.newest.steps)
        assert (going_on.calibration is None) == (anew.calibration is None)
        if going_on.calibration is not None and anew.calibration is not None:
            np.testing.assert_array_equal(going_on.calibration.gains, anew.calibration.gains)
            assert going_on.calibration.describe() == anew.calibration.describe()
            np.testing.assert_allclose(going_on.calibration.gains, slow_gains(fresh_store, ids, step), rtol=1e-3)

    ids = list(IDS)
    for step in (0, 3, 6, 9):
        with store.writer("bench", step=step) as writer:
            writer.append([f"v{i}" for i in range(3)], draw.normal(size=(3, DIM)) + np.eye(DIM)[0])
        check(step, ids)
        for n in (40, 8, 8):
            measure(store, step, draw.permutation(N)[:n] if step else np.arange(n), draw, probe=step > 0)
            check(step, ids)
        if step == 6:
            ids = [IDS[i] for i in draw.permutation(N)[:45]]
            check(step, ids)
            store.delete("pool", [ids[3], IDS[0]])
            check(step, ids)
            measure(store, step, np.array([IDS.index(ids[3])]), draw, probe=False)
            check(step, ids)
    store.compact("pool")
    check(9, [name for name in IDS[1:] if name in set(store.problems("pool")["id"].to_pylist())])
    if most == 7:  # the probes that count are the first of the step: a later stage computes its own rows alone
        assert 0 in computed or min(computed) <= 8
