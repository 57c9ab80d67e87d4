"""Figures show the numbers of their frames."""

import json
import sys

import numpy as np
import pytest

from analysis import plots
from analysis.alignment import alignment, summary
from analysis.clusters import clusters
from analysis.composition import picks_over_time
from analysis.conflict import conflict
from analysis.curricula import counterfactual
from analysis.drift import half_life, ranking_drift, staleness, target_drift
from analysis.layers import layers
from analysis.suspicion import suspicious
from analysis.turning import turning
from gradstore.errors import RequestError


def lines(figure) -> dict[str, np.ndarray]:
    return {trace.name: np.asarray(trace.y, float) for trace in figure.data}


def test_lines_carry_the_frames_numbers(history) -> None:
    frame = alignment(history.store, "pool", "bench")
    np.testing.assert_allclose(lines(plots.alignment(frame))["median"], summary(frame)["median"])
    one = lines(plots.alignment(frame, ["p0007"]))["p0007"]
    np.testing.assert_allclose(one, frame.loc[frame["id"] == "p0007", "score"])
    frame = ranking_drift(history.store, "pool", "bench", reliability=0.9)
    found = lines(plots.ranking_drift(frame, "jaccard", "first"))
    rows = frame[frame["against"] == "first"]
    np.testing.assert_allclose(found["jaccard with the first step"], rows["jaccard"])
    np.testing.assert_allclose(found["noise alone would leave"], rows["noise_jaccard"])
    frame = counterfactual(history.store, "pool", "bench")
    found = lines(plots.counterfactual(frame, "regret"))
    np.testing.assert_allclose(found["cosine"], frame.loc[frame["selector"] == "cosine", "regret"])


def test_maps_carry_the_frames_numbers(history) -> None:
    frame = target_drift(history.store, "bench")
    z = np.asarray(plots.target_drift(frame).data[0].z)
    np.testing.assert_allclose(z, z.T)
    assert z[0, 3] == pytest.approx(frame.set_index(["step", "other"]).loc[(0, 30), "cosine"])
    frame = layers(history.store, "pool", "bench")
    z = np.asarray(plots.layers(frame, "energy").data[0].z)
    np.testing.assert_allclose(z.sum(axis=0), 1)
    assert z[1, 2] == pytest.approx(frame.set_index(["step", "layer"]).loc[(20, "b"), "energy"])
    frame = clusters(history.store, "pool", n_clusters=3)
    assert sum(len(trace.x) for trace in plots.clusters(frame).data) == len(frame)


def test_without_plotly_the_request_says_what_to_install(history, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(RequestError, match="pip install"):
        plots.alignment(alignment(history.store, "pool", "bench"))


def test_every_figure_is_titled_and_can_be_written(make_history) -> None:
    random = np.random.default_rng(0)
    history = make_history(
        random.normal(size=(4, 60)), picks=[list(range(9))] * 4, other_target=np.eye(24)[3], tags=[["t"]] * 60
    )
    store, pair = history.store, ("pool", "bench")
    figures = [
        plots.alignment(alignment(store, *pair)),
        plots.target_drift(target_drift(store, "bench")),
        plots.ranking_drift(ranking_drift(store, *pair)),
        plots.half_life(staleness(store, *pair, by="source"), half_life(store, *pair, by="source")),
        plots.counterfactual(counterfactual(store, *pair)),
        plots.picks_over_time(picks_over_time(store, "pool")),
        plots.picks_over_time(picks_over_time(store, "pool", "tag"), "lift"),
        plots.turning(turning(store, *pair)),
        plots.clusters(clusters(store, "pool")),
        plots.suspicious(suspicious(store, *pair)),
        plots.conflict(conflict(store, ["bench", "other"], "pool")),
        plots.conflict(conflict(store, ["bench", "other"], "pool", at=[0, 10, 20])),
        plots.layers(layers(store, *pair)),
    ]
    for figure in figures:
        assert figure.layout.title.text
        assert len(figure.data)
        assert json.loads(figure.to_json())["data"]
