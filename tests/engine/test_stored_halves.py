"""Reliability of a ranking from the store alone is that from the rollouts."""

import numpy as np
import pytest

from gradstore.engine import Sketcher, SketchSpec, collect, create_store, reliability, sketch_scores, target
from gradstore.engine.assessing.split_half import split
from gradstore.engine.assessing.stored_halves import collect_halves, stored_halves
from gradstore.errors import RequestError


def test_halves_in_the_store_say_what_the_rollouts_say(tmp_path, make_model, make_groups) -> None:
    """Analysis has the store and no model: it must come to the same reliability."""
    model, pool, bench = make_model("qwen2"), make_groups(20, seed=1, n_rollouts=6), make_groups(6, seed=2)
    sketcher = Sketcher(model, SketchSpec(rank=6))
    store = create_store(tmp_path / "store", sketcher, "fp32")
    for name, groups in (("pool", pool), ("bench", bench)):
        store.add_problems(name, [{"id": group.problem_id, "prompt": "?"} for group in groups])
        collect(store, name, groups, sketcher=sketcher, step=2, accept_coverage=0.0)
    wanted = target(store, "bench")
    with pytest.raises(RequestError, match="--halves"):
        stored_halves(store, "pool", wanted)
    reports = collect_halves(store, "pool", pool, sketcher=sketcher, step=2)
    assert [report.collected for report in reports] == [20, 20]
    found = stored_halves(store, "pool", wanted)
    expected = reliability(sketch_scores(sketcher, wanted), pool, permutations=0)
    assert found.ids == expected.ids
    assert found.ranking.spearman == pytest.approx(expected.halves.spearman, abs=1e-6)
    assert found.ranking.rank_reliability == pytest.approx(expected.halves.rank_reliability, abs=1e-6)
    assert np.allclose(found.standard_errors, expected.standard_errors, atol=1e-5)
    even, odd = (sketcher.sketch(half).sketches.astype(np.float64) for half in split(pool))
    for row, name in enumerate(found.ids):
        i = next(i for i, group in enumerate(pool) if group.problem_id == name)
        lengths = np.linalg.norm(even[i]) * np.linalg.norm(odd[i])
        if lengths > 0:
            assert found.agreement[row] == pytest.approx(even[i] @ odd[i] / lengths, abs=1e-5)
        else:
            assert np.isnan(found.agreement[row])
    # A pool measured again is not judged by halves of an older policy.
    collect(store, "pool", pool[:18], sketcher=sketcher, step=3)
    with pytest.raises(RequestError, match="at least 3"):
        stored_halves(store, "pool", wanted)
    assert stored_halves(store, "pool", wanted, at=2).ids == found.ids
