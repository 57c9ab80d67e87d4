"""Figures show the numbers of their frames.

Every expected number is looked up in a frame row by row; a figure that leaves out a line, mixes two up or draws another
column fails.
"""

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gradstore.analysis import figures, plots
from gradstore.analysis.alignment import alignment, summary
from gradstore.analysis.clusters import clusters
from gradstore.analysis.composition import picks_over_time
from gradstore.analysis.conflict import conflict
from gradstore.analysis.curricula import BEST, counterfactual
from gradstore.analysis.drift import half_life, ranking_drift, staleness, target_drift
from gradstore.analysis.layers import layers
from gradstore.analysis.report.colouring import GREY, PALETTE, Colours
from gradstore.analysis.suspicion import suspicious
from gradstore.analysis.turning import turning
from gradstore.errors import RequestError

PAIR = ("pool", "bench")
LIVES = {"s0": 12.0, "s1": 40.0, "s2": 7.5}
"""A half-life to be drawn for each source."""


@pytest.fixture
def rich(make_history: Callable) -> Any:
    """A history with rounds, tags and a second benchmark: something for every figure."""
    random = np.random.default_rng(0)
    return make_history(
        random.normal(size=(4, 60)),
        rates_SP=random.integers(0, 17, (4, 60)) / 16,
        picks=[[*range(start, start + 9)] for start in (0, 5, 20, 40)],
        other_target=np.eye(24)[3],
        tags=[["even" if p % 2 == 0 else "odd", *["both"] * (p % 3 == 0)] for p in range(60)],
    )


def points(figure: Any) -> dict[str, list[tuple[Any, float]]]:
    """(x, y) of every trace with a name, in order."""
    return {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in figure.data if trace.name}


def test_alignment_is_the_median_within_its_band(history: Any) -> None:
    frame = alignment(history.store, *PAIR)
    figure = plots.alignment(frame)
    table = summary(frame)
    assert points(figure) == {"median": list(zip(table["step"], table["median"], strict=True))}
    low, high, _ = figure.data
    assert (list(low.y), list(high.y), high.fill) == (table["low"].tolist(), table["high"].tolist(), "tonexty")
    of_one = frame.loc[frame["id"] == "p0007", ["step", "score"]]
    assert points(plots.alignment(frame, ["p0007"])) == {"p0007": list(of_one.itertuples(index=False, name=None))}
    assert set(points(plots.alignment({"a": frame, "b": frame}))) == {"a", "b"}


def test_target_drift_is_drawn_with_its_noise_floor(history: Any) -> None:
    """Without the floor two measurements of one policy look like drift."""
    frame = target_drift(history.store, "bench")
    of = {(row.step, row.other): row for row in frame.itertuples()}
    figure = plots.target_drift(frame)
    successive = [(0, 10), (10, 20), (20, 30)]
    assert points(figure) == {
        "to the step before": [(b, of[a, b].cosine) for a, b in successive],
        "to the first step": [(b, of[0, b].cosine) for b in (10, 20, 30)],
        "noise floor": [(b, of[a, b].noise) for a, b in successive],
    }
    assert [trace.line.dash for trace in figure.data] == ["solid", "solid", "dash"]
    assert np.isfinite(figure.data[2].y).all()


@pytest.mark.parametrize("measure", ["spearman", "jaccard", "rbo"])
@pytest.mark.parametrize("against", ["previous", "first"])
def test_ranking_drift_is_drawn_with_its_noise_floor(history: Any, measure: str, against: str) -> None:
    frame = ranking_drift(history.store, *PAIR, reliability=0.9)
    found = points(plots.ranking_drift(frame, measure, against))
    for name, which in (("to the step before", "previous"), ("to the first step", "first")):
        rows = frame[frame["against"] == which]
        assert found[name] == list(zip(rows["step"], rows[measure], strict=True))
    rows = frame[frame["against"] == against]
    assert found["noise floor"] == list(zip(rows["step"], rows[f"noise_{measure}"], strict=True))
    assert set(points(plots.ranking_drift(frame.assign(reliability=np.nan)))) == set(found) - {"noise floor"}


def test_half_lives_are_curves_through_their_points(rich: Any) -> None:
    """Each group's pairs of steps as points, and reliability 2^(-age / half_life) in the same colour."""
    agreement = staleness(rich.store, *PAIR, by="source")
    fitted = pd.DataFrame(
        [{"group": name, "half_life": life, "reliability": 0.8, "longest": 30} for name, life in LIVES.items()]
    )
    assert set(agreement["group"]) == set(LIVES)
    figure = plots.half_life(agreement, fitted)
    assert len(figure.data) == 2 * len(LIVES)
    for marks, curve, (name, life) in zip(figure.data[::2], figure.data[1::2], LIVES.items(), strict=True):
        rows = agreement[agreement["group"] == name]
        assert (marks.name, marks.mode, curve.mode) == (name, "markers", "lines")
        assert list(zip(marks.x, marks.y, strict=True)) == list(zip(rows["age"], rows["spearman"], strict=True))
        assert (min(curve.x), max(curve.x)) == (0, 30)
        assert list(curve.y) == pytest.approx([0.8 * 0.5 ** (age / life) for age in curve.x])
        assert marks.marker.color == curve.line.color
        assert f"half-life {life:.3g} steps" in curve.name
    assert len({trace.marker.color for trace in figure.data[::2]}) == len(LIVES)
    found = half_life(rich.store, *PAIR, by="source")
    assert len(plots.half_life(agreement, found).data) == 2 * len(found)


@pytest.mark.parametrize("value", ["gained", "regret", "alignment", "overlap"])
def test_counterfactual_curricula_are_lines_by_selector(rich: Any, value: str) -> None:
    frame = counterfactual(rich.store, *PAIR)
    found = points(plots.counterfactual(frame, value))
    for name, rows in frame.groupby("selector"):
        called = {"(trained on)": "trained on", "(best in hindsight)": "best in hindsight"}.get(name, name)
        drawn = [(step, y) for step, y in zip(rows["step"], rows[value], strict=True) if np.isfinite(y)]
        assert [(step, y) for step, y in found.pop(called, []) if y is not None] == drawn
    assert not found
    dashed = {trace.name for trace in plots.counterfactual(frame).data if trace.line.dash == "dash"}
    assert dashed == {"best in hindsight"}
    assert figures.counterfactual(frame, words={BEST: "the most"}).series[-1].name == "the most"


@pytest.mark.parametrize("by", ["source", "tag", "difficulty"])
@pytest.mark.parametrize("value", ["share", "lift"])
def test_picks_are_shares_of_each_round(rich: Any, by: str, value: str) -> None:
    """Stacked shares; a lift cannot be stacked, so it is a line."""
    frame = picks_over_time(rich.store, "pool", by)
    figure = plots.picks_over_time(frame, value, by)
    found = points(figure)
    assert set(found) == {"no gradient now" if name == "unknown" else name for name in frame["group"]}
    for row in frame.itertuples():
        name = "no gradient now" if row.group == "unknown" else row.group
        y = dict(found[name])[str(row.step)]
        assert y == (pytest.approx(getattr(row, value)) if np.isfinite(getattr(row, value)) else None)
    assert {trace.type for trace in figure.data} == {"bar" if value == "share" else "scatter"}
    assert figure.layout.barmode == ("stack" if value == "share" else "group")
    assert (figure.layout.yaxis.range == (0, 1)) == (value == "share" and by != "tag")


def test_groups_picked_least_are_drawn_together(rich: Any) -> None:
    """Nine by name, so that colours stay apart, and the shares still sum to one."""
    frame = picks_over_time(rich.store, "pool", "cluster", {f"p{p:04d}": p % 12 for p in range(60)})
    found = points(plots.picks_over_time(frame, by="cluster"))
    assert len(found) == 10
    for place, (step, rest) in enumerate(found["other"]):
        named = sum(of[place][1] for name, of in found.items() if name != "other")
        assert named + rest == pytest.approx(1)
        at = frame[frame["step"] == int(step)]
        assert rest == pytest.approx(at.loc[~at["group"].isin(found), "share"].sum())


def test_rounds_of_one_step_are_averaged(rich: Any) -> None:
    """A step that chose twice has shares of one, not two."""
    frame = picks_over_time(rich.store, "pool", "cluster", {f"p{p:04d}": p % 12 for p in range(60)})
    again = pd.concat([frame, frame.assign(round=frame["round"] + 10)], ignore_index=True)
    once, twice = (points(plots.picks_over_time(picked, by="cluster")) for picked in (frame, again))
    for name, of in once.items():
        assert [y for _, y in twice[name]] == pytest.approx([y for _, y in of])


def test_turned_problems_are_points_before_and_after(rich: Any) -> None:
    frame = turning(rich.store, *PAIR)
    frame["significant"] = np.arange(len(frame)) % 3 == 0
    figure = plots.turning(frame)
    assert len(frame) > 3
    for trace, certain in zip(figure.data, (False, True), strict=True):
        rows = frame[frame["significant"] == certain]
        assert trace.name == ("beyond noise" if certain else "within noise")
        drawn = [(text.split(":")[0], x, y) for text, x, y in zip(trace.text, trace.x, trace.y, strict=True)]
        assert drawn == list(rows[["id", "before", "after"]].itertuples(index=False, name=None))


def test_map_has_every_problem_in_its_cluster(history: Any) -> None:
    frame = clusters(history.store, "pool", n_clusters=3)
    figure = plots.clusters(frame)
    drawn = {
        text.split(" · ")[0]: (trace.name, x, y, size)
        for trace in figure.data
        for text, x, y, size in zip(trace.text, trace.x, trace.y, trace.marker.size, strict=True)
    }
    assert len(drawn) == len(frame)
    small = min(size for *_, size in drawn.values())
    for row in frame.itertuples():
        name, x, y, size = drawn[row.id]
        assert name == f"cluster {row.cluster}"
        assert (x, y) == pytest.approx((row.x, row.y), abs=1e-4)
        assert (size > small) == row.representative


@pytest.mark.parametrize("benchmark", ["bench", None])
def test_suspects_are_marked_among_all(rich: Any, benchmark: str | None) -> None:
    """By the cosine with a benchmark, or without one by the pull along the own source."""
    frame = suspicious(rich.store, "pool", benchmark)
    rest, first = plots.suspicious(frame, first=7).data
    assert (first.name, len(first.x), len(rest.x)) == ("the 7 first", 7, len(frame) - 7)
    ordered = zip([*first.text, *rest.text], [*first.x, *rest.x], [*first.y, *rest.y], strict=True)
    for row, (text, x, y) in zip(frame.itertuples(), ordered, strict=True):
        assert text.startswith(f"{row.rank}. {row.id} ")
        assert (x, y) == (row.pass_rate, row.score if benchmark else row.own)


@pytest.mark.parametrize("value", ["cosine", "correlation", "rank_correlation"])
def test_conflict_is_a_map_of_pairs_or_lines_over_steps(rich: Any, value: str) -> None:
    now = conflict(rich.store, ["bench", "other"], "pool")
    assert len(now) == 1
    heat = plots.conflict(now, value).data[0]
    between = now[value].iloc[0]
    assert (list(heat.x), list(heat.y)) == (["bench", "other"], ["bench", "other"])
    np.testing.assert_array_equal(np.array(heat.z, float), [[1, between], [between, 1]])
    over = conflict(rich.store, ["bench", "other"], "pool", at=[0, 10, 20])
    assert points(plots.conflict(over, value)) == {"bench and other": list(zip(over["step"], over[value], strict=True))}


@pytest.mark.parametrize("value", ["share", "term", "energy"])
def test_layers_are_a_map_in_the_stores_order(history: Any, value: str) -> None:
    frame = layers(history.store, *PAIR)
    heat = plots.layers(frame, value).data[0]
    assert list(heat.y) == [name for name, _, _ in history.store.layers]
    for row in frame.itertuples():
        assert heat.z[list(heat.y).index(row.layer)][list(heat.x).index(str(row.step))] == getattr(row, value)
    assert (heat.zmin < 0) == (value == "term")


def test_colours_of_fitted_curves_are_those_of_their_points() -> None:
    """Also behind the palette's end, where no colour comes again; a reference among lines is grey."""
    pairs = [figures.Series(f"{n}{kind}", [0], [0], dashed=kind == "fit") for n in range(12) for kind in ("", "fit")]
    marked = Colours().series(figures.Figure("f", "F", "", "points", pairs, "x", "y"))
    assert marked[::2] == marked[1::2]
    assert marked[:20:2] == list(PALETTE)
    assert len(set(marked)) == 12
    assert set(Colours().series(figures.Figure("f", "F", "", "lines", pairs, "x", "y"))[1::2]) == {GREY}


def test_a_name_has_one_colour_on_a_page_and_a_colour_one_name() -> None:
    """Whatever the figures' order and the names' order in them, also for more names than any palette has."""
    kinds = {"source": 40, "cluster": 30, "collection": 5, "": 3}
    drawn = [
        figures.Figure(
            f"{kind}{turn}", "F", "", "bars",
            [figures.Series(f"{kind}{n}", [0], [n]) for n in range(count)][:: 1 - 2 * turn], "x", "y", named=kind,
        )
        for kind, count in kinds.items() for turn in (0, 1)
    ]  # fmt: skip
    page, found = Colours(drawn), {}
    for one in drawn:
        for series, colour in zip(one.series, page.series(one), strict=True):
            found.setdefault((one.named or one.key, series.name), set()).add(colour)
    assert all(len(each) == 1 for each in found.values())
    assert len(set.union(*found.values())) == len(found)


def test_without_plotly_the_request_says_what_to_install(history: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(RequestError, match="pip install"):
        plots.alignment(alignment(history.store, *PAIR))


def test_every_figure_has_titles_and_can_be_written(rich: Any) -> None:
    store = rich.store
    drawn = {
        "alignment": plots.alignment(alignment(store, *PAIR)),
        "target_drift": plots.target_drift(target_drift(store, "bench")),
        "ranking_drift": plots.ranking_drift(ranking_drift(store, *PAIR)),
        "half_life": plots.half_life(staleness(store, *PAIR), half_life(store, *PAIR)),
        "counterfactual": plots.counterfactual(counterfactual(store, *PAIR)),
        "picks_over_time": plots.picks_over_time(picks_over_time(store, "pool")),
        "turning": plots.turning(turning(store, *PAIR)),
        "clusters": plots.clusters(clusters(store, "pool")),
        "suspicious": plots.suspicious(suspicious(store, *PAIR)),
        "conflict": plots.conflict(conflict(store, ["bench", "other"], "pool")),
        "layers": plots.layers(layers(store, *PAIR)),
    }
    assert set(drawn) == {name for name, value in vars(plots).items() if hasattr(value, "__wrapped__")}
    for figure in drawn.values():
        layout: SimpleNamespace = figure.layout
        assert layout.title.text
        assert layout.xaxis.title.text
        assert layout.yaxis.title.text
        assert json.loads(figure.to_json())["data"]
