"""A run says when its rollouts are too old, or another policy's: in the report, in JSON, and in a round's warnings."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from gradstore.engine import Sketcher, SketchSpec, collect, objective
from gradstore.engine.rollouts import Group
from gradstore.engine.sketches.bases import create_store
from gradstore.engine.sketches.effective_sizes import EffectiveSizes
from gradstore.engine.sketches.spec import SketchBatch
from gradstore.state import State
from tests.engine.test_off_policy import stale_groups


def test_rollouts_of_another_policy_are_noticed_without_importance(
    make_model: Callable[[str], nn.Module], make_groups: Callable[..., list[Group]], tmp_path
) -> None:
    """The recorded log-probabilities tell; nobody else would, and the scores would be of a policy that is gone."""
    model, bare = make_model("qwen2"), make_groups(6)
    for noise, wanted in ((0.0, None), (1.5, "this policy did not sample the rollouts of")):
        groups = stale_groups(model, bare, noise=noise)
        weighted = Sketcher(model, SketchSpec(rank=6, objective=objective("gradalign", importance=True)))
        batch = Sketcher(model, SketchSpec(rank=6)).sketch(groups)
        np.testing.assert_allclose(batch.ess_of_ratios, weighted.sketch(groups).ess, rtol=1e-5)
        assert batch.ess is None, "not stored: the rows were not weighted"
        for sketcher, text in (
            (Sketcher(model, SketchSpec(rank=6)), wanted),
            (weighted, wanted and "rows have an effective sample size below 50%"),
        ):
            store = create_store(tmp_path / f"{noise}-{sketcher is weighted}", sketcher)
            store.add_problems("pool", [{"id": group.problem_id, "prompt": "?"} for group in groups])
            report = collect(store, "pool", groups, sketcher=sketcher, step=0, measure="never", accept_coverage=0.0)
            told = report.describe()["ess"]
            assert told["importance"] == (sketcher is weighted)
            assert told["rows"] == report.live == 6
            if text is None:
                assert report.sizes.warning is None
                assert told["low"] == 0
                assert told["median_share"] == pytest.approx(1, abs=1e-4)
            else:
                assert text in (report.sizes.warning or "")
                assert "fresh rollouts" in (report.sizes.warning or "")
                assert told["low"] >= 1
    silent = Sketcher(model, SketchSpec(rank=6)).sketch([replace(groups[0], logprobs=None), *groups[1:]])
    assert silent.ess_of_ratios is None, "some rollouts have no log-probabilities"


def test_a_few_stale_rows_are_no_warning() -> None:
    """One stale row of a hundred changes no ranking; rows that are not live are not ranked at all."""

    def batch(n_low: int, n: int, state: State = State.LIVE) -> SketchBatch:
        ess_P = np.where(np.arange(n) < n_low, 3.9, 8.0).astype(np.float32)
        counts, zeros = np.full(n, 8, np.int32), np.zeros(n, np.float32)
        names = list(map(str, range(n)))
        return SketchBatch(names, np.zeros((n, 2), np.float32), [state] * n, [""] * n, zeros, counts, 0, ess=ess_P)

    assert EffectiveSizes(shares=[0.98] * 9 + [0.96]).low == 1, "without ratios, any other policy is one too many"
    for n_low, state, warns in ((9, State.LIVE, False), (10, State.LIVE, True), (100, State.NO_SIGNAL, False)):
        sizes = EffectiveSizes()
        sizes.add(batch(n_low, 100, state))
        assert (sizes.warning is not None) == warns
    assert EffectiveSizes().describe()["median_share"] is None
