"""What a sketched dot is worth as a probed one: each problem's ratio from those that are like it."""

import numpy as np
import pytest

import gradstore
from gradstore.engine.forecasting.kept import Places
from gradstore.engine.forecasting.probe_scale import LocalRatios, aim, calibrate, probed_at, probed_before
from gradstore.engine.gradients.objectives import objective
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.rollouts.group import Group


def test_local_ratios_are_the_slow_loop() -> None:
    """One problem after another, by the formula."""
    random = np.random.default_rng(0)
    rows, known = random.normal(size=(7, 3)).astype(np.float32), random.normal(size=(20, 3)).astype(np.float32)
    similar, sketched, probed = rows @ known.T, random.normal(size=20), random.normal(2, 1, 20)
    ratios = LocalRatios(known, sketched, probed)
    found = ratios(rows)
    assert ratios.usual == pytest.approx(max(sum(probed * sketched) / sum(sketched**2), 0.0))
    one = np.mean(sketched**2)
    for place in range(7):
        top, bottom = one * sum(probed * sketched) / sum(sketched**2), one
        for k in range(20):
            weight = max(similar[place, k], 0.0) ** 2
            top, bottom = top + weight * probed[k] * sketched[k], bottom + weight * sketched[k] ** 2
        assert found[place] == pytest.approx(max(top / bottom, 0.0), rel=2e-3, abs=1e-3)


def test_problems_of_two_kinds_have_two_ratios(tmp_path) -> None:
    """One slope for all would put those whose sketches miss more below those whose sketches miss less."""
    random = np.random.default_rng(0)
    store = gradstore.create(tmp_path / "store", dim=6, fingerprint={}, dtype="fp32")
    ids = [f"p{i}" for i in range(40)]
    store.add_problems("pool", [{"id": name, "prompt": "?"} for name in ids])
    store.add_problems("bench", [{"id": "v", "prompt": "?"}])
    kind = np.arange(40) % 2
    rows = 0.1 * random.normal(size=(40, 6))
    rows[:, 5] += 1.0
    rows[np.arange(40), kind] += 2.0
    target = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 3.0])
    for step in (0, 4):
        with store.writer("bench", step=step) as writer:
            writer.append(["v"], target[None])
        with store.writer("pool", step=step) as writer:
            writer.append(ids, rows)
    true = np.where(kind == 0, 1.0, 3.0)
    for step, places in ((0, range(10)), (4, range(10, 20))):
        groups = [Group(ids[i], np.array([1]), [np.array([1])] * 16, np.repeat([0.0, 1.0], 8)) for i in places]
        dots = [true[i] * float(rows[i] @ target) for i in places]
        derivatives = [(groups[0].rewards - 0.5) * dot / 0.25 + random.normal(0, 0.01, 16) for dot in dots]
        ProbeBatch.of(groups, derivatives, objective("gradalign")).save(store, "pool", step=step, target="bench")
    now = probed_at(store, "pool", ["bench"], 4)
    past = probed_before(store, "pool", ["bench"], 4)
    assert now is not None
    assert [len(own.dots) for own in [now, *past]] == [10, 10]
    direction, length = aim(store, ["bench"], 4)
    assert direction @ target == pytest.approx(3.0)
    found = calibrate(store.view("pool", 4), Places(store.view("pool", 4), ids), [now, *past], length)
    assert found is not None
    assert found.n == 20
    assert found.length == pytest.approx(3.0)
    assert found.gains[kind == 0].max() < 1.5
    assert found.gains[kind == 1].min() > 2.5
    order = random.permutation(40)
    shuffled = Places(store.view("pool", 4), [ids[i] for i in order])
    again = calibrate(store.view("pool", 4), shuffled, [now, *past], length)
    assert again is not None
    assert again.gains == pytest.approx(found.gains[order])
    assert calibrate(store.view("pool", 4), shuffled, [], length) is None
    assert probed_at(store, "pool", ["bench"], 3) is None


def test_sums_go_on_from_others_to_the_last_bit() -> None:
    """Changed, added and removed probes, in any order: a resumed round must rank as an undisturbed one."""
    random = np.random.default_rng(1)

    def units(n: int) -> np.ndarray:
        rows = random.normal(size=(n, 24)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    rows, known = units(300), units(90)
    sketched, probed = random.normal(size=90), random.normal(2, 1, 90) * 10.0 ** random.integers(-3, 2, 90)
    probed[0] = 3e4
    old = LocalRatios(known[:80], sketched[:80], probed[:80])
    order = random.permutation(80)
    shuffled = LocalRatios(known[order], sketched[order], probed[order])
    np.testing.assert_array_equal(shuffled.sums(rows), old.sums(rows))
    for places, n in (([3, 7, 50], 80), ([79], 90), ([], 80), ([1], 70), ([], 60)):
        rows_K, probed_K = known.copy(), probed.copy()
        rows_K[places], probed_K[places] = units(len(places)), 1.5
        new = LocalRatios(rows_K[:n], sketched[:n], probed_K[:n])
        change = old.change_to(new)
        assert change is not None
        np.testing.assert_array_equal(old.sums(rows) + change.sums(rows), new.sums(rows))
        np.testing.assert_array_equal(new.slopes(old.sums(rows) + change.sums(rows)), new(rows))
    assert old.change_to(LocalRatios(units(80), sketched[:80], probed[:80])) is None
    assert old.change_to(LocalRatios(known[:80], sketched[:80], 100 * probed[:80])) is None
