"""What a collection measures of its own sketches, and what it does not sketch again."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from gradstore.engine import Sketcher, SketchSpec, collect, exact_dots, layer_gradients
from gradstore.engine.assessing.refit import ENOUGH, first_fit, parts
from gradstore.engine.rollouts import Group, read_rollouts
from gradstore.engine.sketches.bases import create_store
from gradstore.engine.sketches.exact_ranking import ExactRanking, Rows
from tests.engine.test_collector import write_rows

SPEC = SketchSpec(rank=8, basis="fitted", dim=200, token_budget=200)


@pytest.fixture
def model(make_model):
    return make_model("qwen2")


@pytest.fixture
def sketched(monkeypatch) -> list[str]:
    """Ids of the problems that are sketched, as often as they are."""
    ids: list[str] = []
    sketch_in = Sketcher.sketch_in

    def watched(self: Sketcher, projections: list, groups: list[Group]) -> list:
        ids.extend(group.problem_id for group in groups)
        return sketch_in(self, projections, groups)

    monkeypatch.setattr(Sketcher, "sketch_in", watched)
    return ids


@pytest.fixture
def exactly(monkeypatch) -> list[int]:
    """Number of problems of each exact measurement."""
    runs: list[int] = []
    of = ExactRanking.of.__func__

    def watched(cls: type, model: object, spec: SketchSpec, groups: list[Group], *given: object) -> object:
        runs.append(len(groups))
        return of(cls, model, spec, groups, *given)

    monkeypatch.setattr(ExactRanking, "of", classmethod(watched))
    return runs


def test_rows_of_the_fit_are_taken_as_they_are(tmp_path: Path, model, make_groups, sketched) -> None:
    """A store with rows that fell out of the fit must be the store that sketches every problem: the same rows, norms,
    states and counts, to rounding; and none of those problems is sketched a second time."""
    groups = make_groups(40, seed=1)
    groups[7] = Group(groups[7].problem_id, groups[7].prompt_ids, groups[7].responses, np.ones(4))
    write_rows(tmp_path / "pool.jsonl", groups)
    source = read_rollouts(tmp_path / "pool.jsonl")
    sample = [group for group in source.groups() if group.has_signal][:20]
    found = first_fit(model, SPEC, sample, make_groups(6, seed=2))
    views = []
    for name, known in (("with", found.rows), ("without", ())):
        store = create_store(tmp_path / name, found.sketcher, "fp32")
        sketched.clear()
        report = collect(
            store, "pool", source, sketcher=found.sketcher, step=2, accept_coverage=0.0, known=known, measure="never"
        )
        assert (report.live, report.no_signal, report.failed, report.skipped) == (39, 1, 0, 0)
        assert len(sketched) == (20 if known else 40)
        assert len(set(sketched) & {group.problem_id for group in sample}) == (0 if known else 20)
        views.append(store.view("pool"))
        again = collect(store, "pool", source, sketcher=found.sketcher, step=2, accept_coverage=0.0, known=known)
        assert (again.collected, again.skipped) == (0, 40)
        assert store.verify().ok
    one, other = views
    assert sorted(one.ids) == sorted(other.ids) == sorted(source.problem_ids)
    order = [{problem_id: place for place, problem_id in enumerate(view.ids)} for view in views]
    places, others = ([of[problem_id] for problem_id in source.problem_ids] for of in order)
    np.testing.assert_allclose(one.take(source.problem_ids), other.take(source.problem_ids), atol=1e-5)
    np.testing.assert_allclose(one.norms[places], other.norms[others], rtol=1e-5)
    np.testing.assert_array_equal(one.states[places], other.states[others])
    np.testing.assert_array_equal(one.pass_rates[places], other.pass_rates[others])
    np.testing.assert_array_equal(one.n_rollouts[places], other.n_rollouts[others])


def test_known_rows_of_other_problems_stay_out(tmp_path: Path, model, make_groups) -> None:
    """The fit may have seen problems that the collection has not."""
    groups = make_groups(20, seed=1)
    found = first_fit(model, SPEC, groups)
    write_rows(tmp_path / "pool.jsonl", groups[5:])
    store = create_store(tmp_path / "store", found.sketcher)
    report = collect(
        store,
        "pool",
        read_rollouts(tmp_path / "pool.jsonl"),
        sketcher=found.sketcher,
        step=0,
        accept_coverage=0.0,
        known=found.rows,
    )
    assert report.live == 15
    assert sorted(store.view("pool").ids) == sorted(group.problem_id for group in groups[5:])


def test_a_first_fit_measures_on_problems_it_was_not_fitted_to(model, make_groups) -> None:
    """The fidelity kept with a projection is that of rows it has not seen; theirs are known too."""
    sample, bench = make_groups(ENOUGH, seed=1), make_groups(6, seed=2)
    held_out, fitted_to = parts(sample)
    assert (len(held_out), len(fitted_to)) == (ENOUGH // 4, ENOUGH - ENOUGH // 4)
    assert parts(sample, measured=False) == ([], sample)
    assert parts(sample[:-1])[0] == []
    found = first_fit(model, SPEC, sample, bench)
    assert found.n_fitted == len(fitted_to) + len(bench)
    assert sorted(i for batch in found.rows for i in batch.ids) == sorted(group.problem_id for group in sample)
    exact = exact_dots(model, held_out, layer_gradients(model, bench, SPEC), SPEC, norms=True).cosines[:, 0]
    rows, target = found.sketcher.sketch(held_out), found.sketcher.sketch(bench).sketches.mean(0)
    expected = spearmanr(rows.sketches @ target / rows.norms, exact).statistic
    assert found.sketcher.projection.fidelity == pytest.approx(expected, abs=0.005)
    assert first_fit(model, SPEC, sample, bench, measured=False).sketcher.projection.fidelity is None


def test_a_collect_measures_once_unless_asked(tmp_path: Path, model, make_groups, sketched, exactly) -> None:
    """A benchmark's collect into a store that is there pays for its own rows only."""
    pool, bench = make_groups(30, seed=1), make_groups(20, seed=2)
    sketcher = first_fit(model, SPEC, pool).sketcher
    store = create_store(tmp_path / "store", sketcher)
    for name, groups in (("pool", pool), ("bench", bench)):
        store.add_problems(name, [{"id": group.problem_id, "prompt": "?"} for group in groups])
    exactly.clear()
    sketched.clear()
    first = collect(store, "pool", pool, sketcher=sketcher, step=0, accept_coverage=0.0)
    assert first.fidelity is not None
    assert len(exactly) == 1
    assert len(sketched) == len(pool), "the rows themselves are held against the exact scores"
    sketched.clear()
    report = collect(store, "bench", bench, sketcher=sketcher, step=0, accept_coverage=0.0)
    assert report.fidelity is None
    assert not report.needs_refit
    assert len(exactly) == 1
    assert len(sketched) == len(bench)
    assert (
        collect(store, "bench", bench, sketcher=sketcher, step=1, accept_coverage=0.0, measure="always").fidelity
        is not None
    )
    assert len(exactly) == 2
    fresh = create_store(tmp_path / "fresh", sketcher)
    fresh.add_problems("pool", [{"id": group.problem_id, "prompt": "?"} for group in pool])
    assert (
        collect(fresh, "pool", pool, sketcher=sketcher, step=0, accept_coverage=0.0, measure="never").fidelity is None
    )
    assert len(exactly) == 2


def test_a_measured_projection_is_not_measured_again(tmp_path: Path, model, make_groups, exactly) -> None:
    """The fit of a new store has measured it on problems held out: its first rows would say less and cost more."""
    sample = make_groups(ENOUGH, seed=1)
    sketcher = first_fit(model, SPEC, sample).sketcher
    assert len(exactly) == 1
    store = create_store(tmp_path / "store", sketcher)
    store.add_problems("pool", [{"id": group.problem_id, "prompt": "?"} for group in sample])
    report = collect(store, "pool", sample, sketcher=sketcher, step=0, accept_coverage=0.0)
    assert (report.fidelity, len(exactly)) == (None, 1)
    assert report.fidelity_when_fitted == sketcher.projection.fidelity


def test_fidelity_from_rows_is_that_of_sketches_made_for_it(model, make_groups) -> None:
    """Rows in any order and in several batches; a problem without a row counts as one without a gradient."""
    groups, bench = make_groups(24, seed=1), make_groups(5, seed=2)
    sketcher = first_fit(model, SPEC, groups, bench).sketcher
    ranking = ExactRanking.of(model, SPEC, groups, bench)
    expected = ranking.fidelity_of(sketcher)
    batches = [sketcher.sketch(part) for part in (groups[16:], groups[:16])]
    assert ranking.fidelity(Rows(batches), Rows([sketcher.sketch(bench)])) == pytest.approx(expected, abs=1e-3)
    assert ranking.fidelity(Rows(batches[:1]), Rows([sketcher.sketch(bench)])) != pytest.approx(expected, abs=1e-6)
    assert ranking.fidelity(Rows([sketcher.sketch(groups[:7])]), Rows([sketcher.sketch(bench)])) is None
    assert ExactRanking.of(model, SPEC, groups[:15], bench) is None
    alone = ExactRanking.of(model, SPEC, groups)
    assert (alone.scored, alone.others) == (groups[::2], groups[1::2])
