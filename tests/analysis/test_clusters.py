"""Clusters: planted ones recovered by every method, the map and the centres checked by hand, memory bounded."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score

from gradstore.analysis.clusters import COLUMNS, NOISE, clusters, sizes
from gradstore.analysis.composition import picks_over_time
from gradstore.errors import RequestError


@pytest.fixture
def planted(make_history):
    """Three sources whose gradients point apart."""
    return make_history(
        0.2 * np.random.default_rng(0).normal(size=(1, 240)), noise=0.12, source_strength=1.0, picks=[list(range(30))]
    )


@pytest.mark.parametrize("kind", ["kmeans", "spectral", "hdbscan"])
def test_planted_clusters_are_recovered(planted, kind) -> None:
    frame = clusters(planted.store, "pool", kind=kind, n_clusters=3)
    assert list(frame.columns) == COLUMNS
    known = frame[frame["cluster"] != NOISE]
    assert len(known) > 200
    assert adjusted_rand_score(known["source"], known["cluster"]) > 0.95


@pytest.mark.parametrize("kind", ["kmeans", "spectral", "hdbscan"])
def test_a_draw_labels_the_rest_alike(planted, kind) -> None:
    """Fitted to a third of the problems, the others are assigned in blocks to the same clusters."""
    frame = clusters(planted.store, "pool", kind=kind, n_clusters=3, most=80)
    known = frame[frame["cluster"] != NOISE]
    assert len(frame) == 240
    assert adjusted_rand_score(known["source"], known["cluster"]) > 0.9


def test_map_centres_and_representatives_are_those_computed_by_hand(planted) -> None:
    frame = clusters(planted.store, "pool", n_clusters=3, representatives=4)
    view = planted.store.view("pool")
    rows = view.take(frame["id"].tolist())
    plane = PCA(2, svd_solver="full").fit_transform(rows)
    np.testing.assert_allclose(frame[["x", "y"]], plane, atol=1e-4)
    for _, members in frame.groupby("cluster"):
        centre = rows[members.index].mean(axis=0)
        cosines = rows[members.index] @ centre / np.linalg.norm(centre)
        np.testing.assert_allclose(members["similarity"], cosines, atol=1e-5)
        best = set(members["id"].to_numpy()[np.argsort(-cosines)[:4]])
        assert set(members.loc[members["representative"], "id"]) == best
    counts = frame["cluster"].value_counts()
    assert counts.loc[0] == counts.max()
    table = sizes(frame)
    assert table["n"].sum() == 240
    assert (table["source_share"] > 0.9).all()
    assert all(len(names) == 4 for names in table["representatives"])


def test_the_same_seed_gives_the_same_clusters(planted) -> None:
    first, again = (clusters(planted.store, "pool", most=100, seed=3) for _ in range(2))
    assert first.equals(again)


def test_clusters_serve_the_composition_of_picks(planted) -> None:
    frame = picks_over_time(planted.store, "pool", "cluster", clusters(planted.store, "pool", n_clusters=3))
    assert frame["n"].sum() == 30
    assert set(frame["group"]) == {"cluster 0", "cluster 1", "cluster 2"}


def test_only_live_problems_and_the_right_step(history) -> None:
    frame = clusters(history.store, "pool", at=10)
    view = history.store.view("pool", 10)
    assert set(frame["id"]) == set(view.ids[view.live])


@pytest.mark.parametrize(("arguments", "word"), [({"kind": "magic"}, "magic"), ({"layout": "globe"}, "globe")])
def test_wrong_requests_are_named(planted, arguments, word) -> None:
    with pytest.raises(RequestError, match=word):
        clusters(planted.store, "pool", **arguments)


def test_umap_is_optional(planted) -> None:
    """Where umap-learn is not installed the request says how to get it."""
    try:
        import umap  # noqa: F401
    except ImportError:
        with pytest.raises(RequestError, match="umap-learn"):
            clusters(planted.store, "pool", layout="umap")
    else:
        frame = clusters(planted.store, "pool", layout="umap")
        assert frame[["x", "y"]].notna().all().all()
