"""What a sketched dot is worth as a probed one: each problem's ratio from those that are like it."""

import numpy as np
import pytest

import gradstore
from gradstore.engine.forecasting.kept import Places
from gradstore.engine.forecasting.local_ratios import Changes, LocalRatios, Probed, Sketches
from gradstore.engine.forecasting.probe_scale import aim, calibrate, probed_at, probed_before
from gradstore.engine.gradients.objectives import objective
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.rollouts.group import Group


def units(random: np.random.Generator, n: int, dim: int) -> Sketches:
    rows = random.normal(size=(n, dim)).astype(np.float32)
    return Sketches.of(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def of_step(step: int, known: Sketches, sketched: np.ndarray, probed: np.ndarray) -> Probed:
    return Probed(step, known, sketched, probed, np.zeros(len(probed)))


def test_local_ratios_are_the_slow_loop() -> None:
    """One problem after another, by the formula; the probes are of two steps."""
    random = np.random.default_rng(0)
    rows, known = units(random, 7, 3), units(random, 20, 3)
    similar = (rows.codes * rows.scale[:, None]) @ (known.codes * known.scale[:, None]).T
    sketched, probed = random.normal(size=20), random.normal(2, 1, 20)
    parts = (slice(0, 14), slice(14, 20))
    ratios = LocalRatios([of_step(9 - i, known[own], sketched[own], probed[own]) for i, own in enumerate(parts)])
    found = ratios(rows)
    assert ratios.usual == pytest.approx(max(sum(probed * sketched) / sum(sketched**2), 0.0))
    one = np.mean(sketched**2)
    for place in range(7):
        top, bottom = one * sum(probed * sketched) / sum(sketched**2), one
        for k in range(20):
            weight = max(similar[place, k], 0.0) ** 2
            top, bottom = top + weight * probed[k] * sketched[k], bottom + weight * sketched[k] ** 2
        assert found[place] == pytest.approx(max(top / bottom, 0.0), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", ["int4", "1bit", "fp16", "fp32", "int8"])
def test_sketches_of_every_dtype_are_the_unit_rows(tmp_path, dtype: str) -> None:
    """A cosine of rounded rows is that of the stored ones within the step of int8 codes."""
    store = gradstore.create(tmp_path / "store", dim=48, fingerprint={}, dtype=dtype)
    store.add_problems("pool", [{"id": f"p{i}", "prompt": "?"} for i in range(9)])
    with store.writer("pool", step=0) as writer:
        writer.append([f"p{i}" for i in range(9)], np.random.default_rng(3).normal(size=(9, 48)))
    view, places = store.view("pool"), np.array([4, 0, 8])
    found = Sketches.at(view, places)
    assert found.codes.dtype == np.int8
    np.testing.assert_allclose(found.codes * found.scale[:, None], view.rows(places), atol=0.002)


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
    rows, known = units(random, 300, 24), units(random, 90, 24)
    sketched, probed = random.normal(size=90), random.normal(2, 1, 90) * 10.0 ** random.integers(-3, 2, 90)
    probed[0] = 3e4
    old = LocalRatios([of_step(0, known[:80], sketched[:80], probed[:80])])
    order = random.permutation(80)
    shuffled = LocalRatios([of_step(0, known[order], sketched[order], probed[order])])
    np.testing.assert_array_equal(shuffled.sums(rows)[0], old.sums(rows)[0])
    for places, n in (([3, 7, 50], 80), ([79], 90), ([], 80), ([1], 70), ([], 60)):
        codes, scale, probed_K = known.codes.copy(), known.scale.copy(), probed.copy()
        other = units(random, len(places), 24)
        codes[places], scale[places], probed_K[places] = other.codes, other.scale, 1.5
        new = LocalRatios([of_step(0, Sketches(codes[:n], scale[:n]), sketched[:n], probed_K[:n])])
        change = old.parts[0].change_to(new.parts[0])
        assert change is not None
        sums = old.sums(rows)[0] + Changes({0: change}).sums(rows).get(0, 0)
        np.testing.assert_array_equal(sums, new.sums(rows)[0])
        np.testing.assert_array_equal(new.slopes({0: sums}), new(rows))
    for others in (
        of_step(0, units(random, 80, 24), sketched[:80], probed[:80]),
        of_step(0, known[:80], sketched[:80], 100 * probed[:80]),
    ):
        assert old.parts[0].change_to(LocalRatios([others]).parts[0]) is None
