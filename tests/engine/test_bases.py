"""A store whose projection was fitted anew: old rows are ranked beside new ones, each in its own basis."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from gradstore import engine
from gradstore.engine import Sketcher, SketchSpec, exact_dots, fit_projection, layer_gradients, search, select, target
from gradstore.engine.assessing.refit import refit
from gradstore.engine.searching.fusion import search_each, search_fused
from gradstore.engine.searching.shares import layer_contributions
from gradstore.engine.sketches.bases import (
    add_basis,
    bases_in_use,
    basis_of,
    create_store,
    load_projection,
    sketcher_of,
)
from gradstore.errors import FingerprintError, RequestError

SPEC = SketchSpec(basis="fitted", rank=12, dim=600)
collect = partial(engine.collect, accept_coverage=0.0)
"""The tiny model's embedding, which is not sketched, holds much of its gradient."""


def fit(model, groups, **changes) -> Sketcher:
    spec = replace(SPEC, **changes)
    return Sketcher(model, spec, fit_projection(model, groups, spec))


@pytest.fixture
def two(tmp_path, make_model, make_groups):
    """(store, old and new sketcher, pool, benchmark): half of the pool is still in the old basis."""
    model, pool, bench = make_model("qwen2"), make_groups(40, seed=1), make_groups(10, seed=2)
    old, new = fit(model, make_groups(30, seed=3)), fit(model, make_groups(30, seed=4))
    store = create_store(tmp_path / "store", old, "fp32")
    for name, groups in (("pool", pool), ("bench", bench)):
        store.add_problems(name, [{"id": group.problem_id, "prompt": "?"} for group in groups])
    collect(store, "pool", pool, sketcher=old, step=0)
    assert add_basis(store, new, {"step": 1}) == 1
    collect(store, "pool", pool[:20], sketcher=new, step=1)
    return store, old, new, pool, bench


def slow_scores(old: Sketcher, new: Sketcher, pool, bench, metric: str) -> dict[str, float]:
    """One problem at a time, in the basis that its row is in."""
    scores = {}
    for i, group in enumerate(pool):
        sketcher = new if i < 20 else old
        batch = sketcher.sketch([group])
        row_D, length = batch.sketches[0].astype(np.float64), float(batch.norms[0])
        target_D = np.mean([sketcher.sketch([g]).sketches[0].astype(np.float64) for g in bench], axis=0)
        dot = float(row_D @ target_D)
        cosine = dot / length / np.linalg.norm(target_D)
        scores[group.problem_id] = cosine if metric == "cosine" else dot
    return scores


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_each_row_is_ranked_in_its_own_basis(two, metric: str) -> None:
    """One vector for all rows would rank the old ones by dimensions that mean something else."""
    store, old, new, pool, bench = two
    report = collect(store, "bench", bench, sketcher=new, step=1, also=bases_in_use(store, besides="bench"))
    assert report.bases == [0, 1]
    expected = slow_scores(old, new, pool, bench, metric)
    view, wanted = store.view("pool"), target(store, "bench")
    assert sorted(wanted.vectors) == [0, 1]
    hits = search(view, wanted, len(pool), metric=metric)
    assert hits.n_unknown == 0
    assert hits.ids.tolist() == sorted(expected, key=lambda i: (-expected[i], i))
    assert np.allclose(hits.scores, [expected[i] for i in hits.ids], rtol=1e-4, atol=1e-7)
    chosen = select(store, "pool", wanted, 7, metric)
    assert chosen.ids == hits.ids[:7].tolist()
    assert np.allclose(chosen.scores, [expected[i] for i in chosen.ids], rtol=1e-4, atol=1e-7)
    again = search(view, wanted, 7, metric=metric, index="flat")
    assert again.ids.tolist() == hits.ids[:7].tolist(), "no index has rows of two bases: the scan serves"
    fused = search_fused(view, [wanted, wanted], len(pool), metric=metric)
    assert fused.ids.tolist() == hits.ids.tolist()
    for selector in ("negsim", "simacc", "less", "cropi"):
        assert len(select(store, "pool", wanted, 30, selector, allow_fewer=True)) == 30


def test_scores_of_both_bases_are_of_one_ranking(two) -> None:
    """Both approximate the same cosine, so that ranks across them must be as good as within each."""
    store, _, new, pool, bench = two
    collect(store, "bench", bench, sketcher=new, step=1, also=[0])
    exact_P = exact_dots(new.model, pool, layer_gradients(new.model, bench, SPEC), SPEC, norms=True).cosines[:, 0]
    hits = search(store.view("pool"), target(store, "bench"), len(pool))
    found = dict(zip(hits.ids, hits.scores, strict=True))
    found_P = np.array([found[group.problem_id] for group in pool])
    within = min(float(spearmanr(found_P[part], exact_P[part])[0]) for part in (slice(0, 20), slice(20, 40)))
    assert float(spearmanr(found_P, exact_P)[0]) > max(0.9, within - 0.05)


def test_rows_without_a_target_in_their_basis_are_left_out_and_counted(two) -> None:
    """A benchmark collected in the new basis alone says nothing of old rows; a score of 0 would be a lie."""
    store, _, new, pool, bench = two
    collect(store, "bench", bench, sketcher=new, step=1)
    view, wanted = store.view("pool"), target(store, "bench")
    assert sorted(wanted.vectors) == [1]
    hits = search(view, wanted, len(pool))
    assert (len(hits), hits.n_unknown, hits.n_eligible) == (20, 20, 40)
    assert set(hits.ids) == {group.problem_id for group in pool[:20]}
    assert len(select(store, "pool", wanted, 40, "cosine", allow_fewer=True)) == 20
    plain = search(view, wanted.vector, len(pool))
    assert plain.ids.tolist() == hits.ids.tolist(), "a bare vector is in the newest basis"
    fused = search_fused(view, [wanted], len(pool))
    assert (len(fused), fused.n_unknown) == (20, 20)
    for metric in ("cosine", "dot"):
        alone, each = search(view, wanted, 7, metric=metric), search_each(view, [wanted, wanted], 7, metric=metric)
        assert [(found.ids.tolist(), found.n_unknown) for found in each] == [(alone.ids.tolist(), 20)] * 2
    # Collected again in both, its rows of the step are made again in the one that is missing.
    assert collect(store, "bench", bench, sketcher=new, step=1, also=[0]).collected == 10
    assert collect(store, "bench", bench, sketcher=new, step=1, also=[0]).skipped == 10
    assert search(view, target(store, "bench"), len(pool)).n_unknown == 0
    # Measured later in the new basis alone: the old vector is of an older policy, and no longer given.
    collect(store, "bench", bench[:1], sketcher=new, step=2)
    assert sorted(target(store, "bench").vectors) == [1]


def test_what_compares_rows_with_each_other_refuses_two_bases(two) -> None:
    store, _, new, pool, bench = two
    collect(store, "bench", bench, sketcher=new, step=1, also=[0])
    view, wanted = store.view("pool"), target(store, "bench")
    with pytest.raises(RequestError, match="bases 0, 1"):
        select(store, "pool", None, 3, "chunk_mean")
    with pytest.raises(RequestError, match="bases 0, 1"):
        search(view, wanted, 3, metric="fisher")
    with pytest.raises(RequestError, match="newest basis"):
        layer_contributions(view, view.positions([pool[30].problem_id]), wanted)
    places = view.positions([group.problem_id for group in pool[:3]])
    terms_KL = layer_contributions(view, places, wanted)
    hits = search(view, wanted, len(pool))
    found = dict(zip(hits.positions.tolist(), hits.scores.tolist(), strict=True))
    assert np.allclose(terms_KL.sum(1), [found[p] for p in places.tolist()], atol=1e-6)
    # Once every row is new, everything works again.
    collect(store, "pool", pool[20:], sketcher=new, step=1)
    view = store.view("pool")
    assert view.live_bases == [1]
    alone = search(store.view("pool", basis=1), wanted, 40, metric="fisher")
    assert search(view, wanted, 40, metric="fisher").ids.tolist() == alone.ids.tolist()
    assert len(select(store, "pool", wanted, 3, "fisher")) == 3
    assert len(select(store, "pool", None, 3, "chunk_mean")) == 3
    assert search(view, wanted, 3, index="flat").ids.tolist() == search(view, wanted, 3).ids.tolist()


def test_several_projections_in_one_pass(two) -> None:
    _, old, new, pool, _ = two
    both = old.sketch_in([old.projection, new.projection], pool[:6])
    for batch, sketcher in zip(both, (old, new), strict=True):
        assert np.allclose(batch.sketches, sketcher.sketch(pool[:6]).sketches, rtol=1e-4, atol=1e-7)


def test_a_store_gives_each_of_its_sketchers(two, make_groups) -> None:
    store, old, new, _, _ = two
    model = old.model
    assert sketcher_of(store, model).fingerprint == new.fingerprint
    assert sketcher_of(store, model, basis=0).fingerprint == old.fingerprint
    assert (basis_of(store, old.fingerprint), basis_of(store, new.fingerprint)) == (0, 1)
    assert load_projection(store, 1).digest() == new.projection.digest()
    stranger = fit(model, make_groups(10, seed=5))
    with pytest.raises(FingerprintError, match="basis"):
        collect(store, "pool", [], sketcher=stranger, step=3)
    with pytest.raises(FingerprintError, match="modules"):
        add_basis(store, fit(model, make_groups(10, seed=5), modules=("down_proj",)))


def test_refit_keeps_what_is_better_and_nothing_else(tmp_path, make_model, make_groups, monkeypatch) -> None:
    """A moved policy gets a basis of its own; one that ranks as before costs nothing but the measuring."""
    model = make_model("qwen2")
    pool, bench = make_groups(80, seed=1), make_groups(16, seed=2)
    sketcher = fit(model, [*pool[::2], *bench], rank=14, dim=2000)
    store = create_store(tmp_path / "store", sketcher)
    same, found = refit(store, sketcher, pool, bench, step=0)
    assert same is sketcher
    assert found.fidelity > 0.9
    assert (found.needed, found.basis, len(store.bases)) == (False, None, 1)
    with torch.no_grad():
        torch.manual_seed(9)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * parameter.std())
    measured, found = refit(store, sketcher, pool, bench, step=5, fit=False)
    assert measured is sketcher
    assert (found.needed, found.anew, found.basis) == (True, None, None)
    newer, found = refit(store, sketcher, pool, bench, step=5)
    assert found.basis == 1
    assert found.anew > found.fidelity + 0.05
    assert sketcher_of(store, model, newer.spec).fingerprint == newer.fingerprint
    assert store.bases[1].about["step"] == 5
    assert load_projection(store).fidelity == found.anew
    # The fidelity it had when it was fitted is what a later measurement is held against.
    monkeypatch.setattr("gradstore.engine.sketches.exact_ranking.REFIT_BELOW", 0.0)
    kept, again = refit(store, newer, pool, bench, step=6)
    assert kept is newer
    assert (again.when_fitted, again.needed) == (found.anew, False)
    with pytest.raises(RequestError, match="nothing is fitted"):
        refit(store, Sketcher(model, SketchSpec(rank=4)), pool, bench, step=0)
