"""Counterfactual picks and what they were made of, against loops over the planted history."""

import numpy as np
import pytest

from gradstore.analysis.composition import difficulty, picks_over_time
from gradstore.analysis.curricula import BEST, TRAINED, counterfactual
from gradstore.engine import select, target
from gradstore.errors import RequestError


def hindsight(history, s: int, p: int) -> tuple[float, bool]:
    """Cosine with the target of step number s of the first live row after it, else of the one at it; if it is later."""
    for later in range(s + 1, len(history.steps)):
        if history.measured_SP[later, p] and history.states_SP[later, p] == 0:
            return history.cosine(later, p, at=s), True
    row_D = history.rows_SPD[s, p]
    return (history.cosine(s, p) if np.isfinite(row_D).all() else 0.0), False


def test_every_number_is_that_of_a_loop(history) -> None:
    selectors = ("cosine", "accgreedy", "norm")
    frame = counterfactual(history.store, "pool", "bench", selectors=selectors)
    rounds = history.store.rounds("pool")
    assert frame["step"].unique().tolist() == history.steps
    for s, step in enumerate(history.steps):
        at_step = frame[frame["step"] == step].set_index("selector")
        trained = rounds[s].picks
        known = [p for p in range(60) if history.measured_SP[: s + 1, p].any()]
        live = [p for p in known if np.isfinite(history.rows_SPD[s, p]).all()]
        ranked = sorted(live, key=lambda p: -hindsight(history, s, p)[0])[: len(trained)]
        best = np.mean([hindsight(history, s, p)[0] for p in ranked])
        picked = {
            name: select(history.store, "pool", target(history.store, "bench", step), 12, name, step).ids
            for name in selectors
        }
        for name, ids in {**picked, TRAINED: trained, BEST: [history.ids[p] for p in ranked]}.items():
            row, places = at_step.loc[name], [history.ids.index(one) for one in ids]
            places = [p for p in places if p in known]
            judged = [hindsight(history, s, p) for p in places]
            assert row["n"] == 12
            assert row["overlap"] == pytest.approx(len(set(ids) & set(trained)) / 12)
            assert row["gained"] == pytest.approx(np.mean([value for value, _ in judged]), abs=1e-5)
            assert row["judged_later"] == pytest.approx(np.mean([later for _, later in judged]))
            assert row["best"] == pytest.approx(best, abs=1e-5)
            assert row["regret"] == pytest.approx(best - row["gained"], abs=1e-5)
            now = [history.cosine(s, p) if np.isfinite(history.rows_SPD[s, p]).all() else 0.0 for p in places]
            assert row["alignment"] == pytest.approx(np.mean(now), abs=1e-5)
        assert at_step.loc[BEST, "regret"] == pytest.approx(0, abs=1e-6)
        assert (at_step["regret"] >= -1e-6).all()


def test_a_good_curriculum_is_told_from_a_bad_one(make_history) -> None:
    """Trained on the least aligned problems: cosine would have gained more, and had less to regret."""
    along = np.tile(np.linspace(-1, 1, 300), (3, 1))
    history = make_history(along, noise=0.2, source_strength=0.5, picks=[list(range(30))] * 3)
    frame = counterfactual(history.store, "pool", "bench", selectors=["cosine", "rand"]).set_index(["selector", "step"])
    gained = frame["gained"].groupby("selector").mean()
    assert gained["cosine"] > gained["rand"] + 0.2 > gained[TRAINED] + 0.4
    assert (frame.loc["cosine", "overlap"] == 0).all()
    # What was picked for its luck is judged by other rollouts: less is gained than it seemed.
    first = frame.loc[("cosine", 0)]
    assert first["judged_later"] == 1
    assert first["gained"] < first["alignment"]


def test_candidates_of_the_round_or_the_whole_pool(history) -> None:
    """A pool without rounds needs a number of picks and is compared at the benchmark's steps."""
    frame = counterfactual(history.store, "pool", "bench", 5, ["cosine"], steps=[10], among="pool")
    assert frame.set_index("selector").loc["cosine", "n"] == 5
    with pytest.raises(RequestError, match="say how many"):
        counterfactual(history.store, "bench", "bench")
    free = counterfactual(history.store, "bench", "bench", 5, ["cosine"])
    assert free["step"].unique().tolist() == history.steps
    assert TRAINED not in set(free["selector"])
    with pytest.raises(RequestError, match="nonsense"):
        counterfactual(history.store, "pool", "bench", 5, ["nonsense"])
    with pytest.raises(RequestError, match="among"):
        counterfactual(history.store, "pool", "bench", 5, among="all")


def test_several_benchmarks_count_alike(make_history) -> None:
    """Scores are the mean of those with each, for what was picked and for what was best."""
    along = np.random.default_rng(2).normal(size=(2, 40))
    history = make_history(along, other_target=np.eye(24)[2], picks=[list(range(6))] * 2)
    both = counterfactual(history.store, "pool", ["bench", "other"], selectors=["cosine"])
    each = [counterfactual(history.store, "pool", name, selectors=["cosine"]) for name in ("bench", "other")]
    trained = [frame[frame["selector"] == TRAINED].set_index("step") for frame in (both, *each)]
    for column in ("alignment", "gained"):
        expected = (trained[1][column] + trained[2][column]) / 2
        np.testing.assert_allclose(trained[0][column], expected, atol=1e-6)
    with pytest.raises(RequestError, match="at least one"):
        counterfactual(history.store, "pool", [])


def test_a_selector_that_cannot_pick_says_why(make_history) -> None:
    """Selectors that need probes have a row with a note where there are none."""
    history = make_history(np.zeros((1, 20)), picks=[[0, 1]])
    frame = counterfactual(history.store, "pool", "bench", selectors=["corr"]).set_index("selector")
    assert frame.loc["corr", "n"] == 0
    assert "probe" in frame.loc["corr", "note"]


@pytest.mark.parametrize("by", ["source", "tag", "difficulty", "cluster"])
def test_picks_are_counted_by_group(history, by) -> None:
    clusters = {name: p % 4 for p, name in enumerate(history.ids)}
    frame = picks_over_time(history.store, "pool", by, clusters if by == "cluster" else None)
    tags = [["even"] if p % 2 == 0 else ["odd", "third"][: 1 + (p % 3 == 0)] for p in range(60)]
    for one in history.store.rounds("pool"):
        rates = one.table["pass_rate"].to_numpy()
        groups = {
            "source": [[source] for source in history.sources],
            "tag": tags,
            "difficulty": [[band] for band in difficulty(rates)],
            "cluster": [[f"cluster {p % 4}"] for p in range(60)],
        }[by]
        picked = [history.ids.index(name) for name in one.picks]
        rows = frame[frame["round"] == one.number].set_index("group")
        for group, row in rows.iterrows():
            n, among = sum(group in groups[p] for p in picked), sum(group in each for each in groups)
            assert (row["n"], row["n_candidates"]) == (n, among)
            assert row["share"] == pytest.approx(n / 12)
            assert row["candidate_share"] == pytest.approx(among / 60)
            assert np.isnan(row["lift"]) if not among else row["lift"] == pytest.approx((n / 12) / (among / 60))
        assert row["step"] == history.steps[one.number]
    assert frame.groupby("group")["round"].nunique().eq(4).all()


def test_bands_and_wrong_groupings(history) -> None:
    found = difficulty([0, 0.1, 0.2, 0.25, 0.4, 0.8, 0.95, 1, float("nan")])
    assert found == ["0", "0-0.2", "0-0.2", "0.2-0.4", "0.2-0.4", "0.6-0.8", "0.8-1", "1", "unknown"]
    with pytest.raises(RequestError, match="colour"):
        picks_over_time(history.store, "pool", "colour")
    with pytest.raises(RequestError, match="clusters"):
        picks_over_time(history.store, "pool", "cluster")
    assert picks_over_time(history.store, "bench").empty
