"""Alignment over steps against a loop over problems and steps."""

import numpy as np
import pytest

import gradstore
from gradstore.analysis.alignment import COLUMNS, alignment, states, summary
from gradstore.analysis.trajectory import measured_steps, trajectory
from gradstore.errors import RequestError


def test_every_number_is_that_of_a_loop(history) -> None:
    """Score, state, age: of the newest row at or before the step, against the target of that step."""
    frame = alignment(history.store, "pool", "bench")
    assert list(frame.columns) == COLUMNS
    known = [name for p, name in enumerate(history.ids) if history.measured_SP[:, p].any()]
    assert len(frame) == len(known) * len(history.steps)
    rows = frame.set_index(["step", "id"])
    for s, step in enumerate(history.steps):
        for p, name in enumerate(history.ids):
            if name not in known:
                assert name not in frame["id"].cat.categories
                continue
            row = rows.loc[(step, name)]
            before = [m for m in range(s + 1) if history.measured_SP[m, p]]
            assert row["source"] == history.sources[p]
            if not before:
                assert row["state"] == "unmeasured"
                assert np.isnan([row["score"], row["age"], row["norm"], row["pass_rate"]]).all()
                continue
            newest = before[-1]
            state = ["live", "no_signal", "failed"][history.states_SP[newest, p]]
            assert row["state"] == state
            assert row["age"] == step - history.steps[newest]
            assert row["pass_rate"] == pytest.approx(history.rates_SP[newest, p])
            if state == "live":
                assert row["score"] == pytest.approx(history.cosine(s, p), abs=1e-5)
                assert row["norm"] == pytest.approx(np.linalg.norm(history.rows_SPD[s, p]), rel=1e-5)
            else:
                assert np.isnan(row["score"])


def test_dot_is_cosine_times_lengths(history) -> None:
    """The metrics are those of a search."""
    cosine = alignment(history.store, "pool", "bench")
    dot = alignment(history.store, "pool", "bench", "dot")
    length = {step: np.linalg.norm(history.target(s)) for s, step in enumerate(history.steps)}
    expected = cosine["score"] * cosine["norm"] * cosine["step"].map(length)
    np.testing.assert_allclose(dot["score"], expected, rtol=1e-4, atol=1e-5)


def test_steps_can_be_chosen_and_lie_before_the_benchmark(history) -> None:
    """A step without a target has rows without a score, not an error."""
    history.store.add_problems("late", [{"id": "v", "prompt": "?"}])
    with history.store.writer("late", step=15) as writer:
        writer.append(["v"], np.ones((1, 24), np.float32))
    frame = alignment(history.store, "pool", "late", steps=[0, 15, 25])
    assert frame.groupby("step")["score"].apply(lambda scores: scores.notna().any()).tolist() == [False, True, True]


def test_summary_and_states_count_what_is_there(history) -> None:
    frame = alignment(history.store, "pool", "bench")
    table = summary(frame).set_index("step")
    for s, step in enumerate(history.steps):
        scores = [history.cosine(s, p) for p in range(60) if np.isfinite(history.rows_SPD[s, p]).all()]
        assert table.loc[step, "n"] == len(scores)
        assert table.loc[step, "median"] == pytest.approx(np.median(scores), abs=1e-5)
        assert table.loc[step, "positive"] == pytest.approx(np.mean(np.array(scores) > 0))
        assert table.loc[step, "high"] == pytest.approx(np.quantile(scores, 0.95), abs=1e-5)
    assert summary(frame, "source").groupby("step")["n"].sum().tolist() == table["n"].tolist()
    counts = states(frame)
    assert counts.groupby("step")["share"].sum().to_numpy() == pytest.approx(1)
    assert counts[counts["state"] == "live"].set_index("step")["n"].to_dict() == table["n"].to_dict()


@pytest.mark.parametrize("by", [None, "source"])
def test_summary_is_that_of_a_loop(history, by: str | None) -> None:
    """Groups are cut from one sorted array: a quantile of a neighbour's scores would look just as plausible."""
    frame = alignment(history.store, "pool", "bench")
    frame = frame.sample(frac=1, random_state=0)  # in any order
    found = summary(frame, by)
    live = frame[frame["score"].notna()]
    groups = dict(list(live.groupby("step" if by is None else ["step", by], observed=True)))
    assert len(found) == len(groups)
    for line in found.to_dict("records"):
        mine = groups[line["step"] if by is None else (line["step"], line[by])]
        scores = mine["score"].to_numpy(np.float64)
        assert line["n"] == len(scores)
        assert [line["low"], line["median"], line["high"]] == pytest.approx(np.quantile(scores, [0.05, 0.5, 0.95]))
        assert line["mean"] == pytest.approx(scores.mean())
        assert line["positive"] == pytest.approx((scores > 0).mean())
        assert line["stale"] == pytest.approx(mine["age"].mean())
    nothing = summary(frame[frame["score"].isna()], by)
    assert len(nothing) == 0
    assert nothing.dtypes.drop(by or []).equals(found.dtypes.drop(by or []))  # as numbers, so that it can be ranked


def test_measured_keeps_scores_of_fresh_rows_alone(history) -> None:
    seen = trajectory(history.store, "pool", "bench")
    columns = [history.ids.index(name) for name in seen.ids]
    expected = history.measured_SP[:, columns] & np.isfinite(seen.scores_SP)
    np.testing.assert_array_equal(np.isfinite(seen.measured), expected)


def test_a_trajectory_is_computed_again_when_something_is_published(make_history) -> None:
    """Several parts of a report ask for the same one; a later row must be seen by the next."""
    store = make_history(np.zeros((2, 5))).store
    first = trajectory(store, "pool", "bench")
    assert trajectory(store, "pool", "bench") is first
    assert trajectory(store, "pool", "bench", "dot") is not first
    assert not first.scores_SP.flags.writeable
    again = gradstore.open(store.path, mode="a")
    step = int(first.steps[-1])
    with again.writer("pool", step=step) as writer:
        writer.append(first.ids[:1].tolist(), np.ones((1, store.dim)))
    later = trajectory(store, "pool", "bench")
    assert later.norms_SP[-1, 0] == pytest.approx(np.sqrt(store.dim))
    np.testing.assert_array_equal(later.norms_SP[:, 1:], first.norms_SP[:, 1:])


@pytest.mark.parametrize("arguments", [("nothing", "bench"), ("pool", "nothing"), ("pool", "bench", "manhattan")])
def test_wrong_requests_are_named(history, arguments) -> None:
    with pytest.raises(RequestError, match=r"nothing|manhattan"):
        alignment(history.store, *arguments)


def test_of_many_steps_those_with_most_rows_are_taken(make_history) -> None:
    """Whole refreshes every third step, a few rows at the others."""
    measured_SP = np.zeros((12, 9), bool)
    measured_SP[:, :2] = True
    measured_SP[::3] = True
    history = make_history(np.zeros((12, 9)), measured_SP=measured_SP)
    assert measured_steps(history.store, "pool", most=4) == [0, 30, 60, 90]
    assert measured_steps(history.store, "pool", most=2) == [0, 90]
    assert measured_steps(history.store, "pool", most=6) == [0, 10, 30, 60, 90, 110]
    assert measured_steps(history.store, "pool") == history.steps
    assert measured_steps(history.store, "pool", [50, 10]) == [10, 50]
