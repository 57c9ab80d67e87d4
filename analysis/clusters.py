"""Clusters of gradients, a two-dimensional map of them, and representative problems of each cluster.

Rows have unit length, so the squared distance is 2 - 2 cosine. The model is fitted to a seeded sample of the live
problems; then all live problems are assigned in blocks. So the sample's size bounds the memory.

Dimension letters: P live problems, N drawn ones, C clusters, D sketch dimensions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from gradstore import Store, View
from gradstore.analysis.trajectory import sources_of
from gradstore.engine.searching.scan import scan_rows
from gradstore.errors import RequestError, check_known, needing

Kind = Literal["kmeans", "spectral", "hdbscan"]
MAPS = ("pca", "umap")
NOISE = -1
"""Cluster number of problems that hdbscan assigns to no cluster."""
MOST_DRAWN = 20_000
MOST_BYTES = 256 << 20
"""Maximum bytes of the drawn rows, float32."""
MOST_SPECTRAL = 2000
"""Maximum problems for spectral clustering, which decomposes a matrix of this size squared."""
_HDBSCAN_DIMENSIONS = 16
COLUMNS = ["id", "source", "cluster", "x", "y", "similarity", "representative", "norm", "pass_rate", "step"]


def clusters(
    store: Store,
    pool: str,
    at: int | None = None,
    kind: Kind = "kmeans",
    n_clusters: int | None = None,
    *,
    layout: str = "pca",
    most: int = MOST_DRAWN,
    representatives: int = 3,
    seed: int = 0,
) -> pd.DataFrame:
    """Cluster and map position of every live problem of the pool's view at a step.

    kind: `kmeans` (scikit-learn's MiniBatchKMeans); `spectral` (nearest-neighbour graph over at most 2,000 drawn
    problems); `hdbscan` (density, over 16 principal components; finds the number of clusters by itself, puts outliers
    in cluster -1). n_clusters: None: 8, or fewer for small pools. layout: `pca`, or `umap` if umap-learn is installed.
    most: maximum problems drawn for fitting. Other problems go to the cluster with the most similar centre; a centre is
    the mean of the cluster's drawn rows, scaled to unit length. Clusters are numbered by size; 0 is the largest.

    Columns: id, source, cluster int64, x, y float64 (map), similarity float64 (cosine with the cluster's centre; nan
    for cluster -1), representative bool (the few most similar to their centre), norm, pass_rate float32, step
    int64 (of the row). RequestError for an unknown kind or layout, or fewer than three live problems.
    """
    check_known("kind of clusters", kind, get_args(Kind))
    check_known("map", layout, MAPS)
    view = store.view(pool, at)
    live = view.live_positions
    if len(live) < 3:
        raise RequestError(f"collection {pool!r} has {len(live)} live problems in this view: clusters need at least 3")
    drawn = _draw(live, view.dim, min(most, MOST_SPECTRAL) if kind == "spectral" else most, seed)
    rows_ND = view.rows(drawn)
    count = min(n_clusters or min(8, max(2, len(live) // 10)), len(drawn) - 1)
    labels_N = _FITS[kind](rows_ND, count, seed)
    centres_CD, labels_N = _centres(rows_ND, labels_N)
    place = _map(rows_ND, layout, seed)
    cluster_P, similarity_P, map_P2 = _assign(view, live, centres_CD, place)
    at_draw = np.searchsorted(live, drawn)
    cluster_P[at_draw] = labels_N
    similarity_P[at_draw] = np.where(
        labels_N == NOISE, np.nan, (rows_ND * centres_CD[np.maximum(labels_N, 0)]).sum(axis=1)
    )
    cluster_P = _by_size(cluster_P)
    frame = pd.DataFrame(
        {
            "id": view.ids[live],
            "source": sources_of(view)[live],
            "cluster": cluster_P,
            "x": map_P2[:, 0].astype(np.float64),
            "y": map_P2[:, 1].astype(np.float64),
            "similarity": similarity_P,
            "representative": False,
            "norm": view.norms[live],
            "pass_rate": view.pass_rates[live],
            "step": view.steps[live],
        }
    )
    ranks = frame[frame["cluster"] != NOISE].groupby("cluster")["similarity"].rank(method="first", ascending=False)
    frame["representative"] = ranks.reindex(frame.index).le(representatives)
    return frame[COLUMNS]


def sizes(frame: pd.DataFrame) -> pd.DataFrame:
    """Summary of the frame of `clusters`, one row per cluster.

    Columns: cluster int64, n int64, share float64, similarity float64 (mean cosine with the centre), pass_rate float64
    (mean), source (the most frequent), source_share float64 (its share of the cluster), representatives (list of ids,
    the most typical first).
    """
    rows = []
    for number, members in frame.groupby("cluster"):
        counts = members["source"].value_counts()
        typical = members[members["representative"]].sort_values("similarity", ascending=False)
        rows.append(
            {
                "cluster": number,
                "n": len(members),
                "share": len(members) / len(frame),
                "similarity": float(members["similarity"].mean()),
                "pass_rate": float(members["pass_rate"].mean()),
                "source": counts.index[0],
                "source_share": float(counts.iloc[0] / len(members)),
                "representatives": typical["id"].tolist(),
            }
        )
    return pd.DataFrame(rows)


def _draw(live: np.ndarray, dim: int, most: int, seed: int) -> np.ndarray:
    size = min(most, max(3, MOST_BYTES // (4 * dim)))
    if len(live) <= size:
        return live
    return np.sort(np.random.default_rng(seed).choice(live, size, replace=False))


def _kmeans(rows_ND: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(n_clusters, random_state=seed, n_init=5, batch_size=4096)
    labels: np.ndarray = model.fit_predict(rows_ND)
    return labels


def _spectral(rows_ND: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import SpectralClustering

    neighbours = min(len(rows_ND) - 1, max(10, round(np.sqrt(len(rows_ND)))))
    similar_NN = rows_ND @ rows_ND.T
    np.fill_diagonal(similar_NN, -np.inf)
    kept_NN = similar_NN >= np.partition(similar_NN, -neighbours, axis=1)[:, [-neighbours]]
    affinity_NN = np.where(kept_NN | kept_NN.T, np.maximum(similar_NN, 0), 0) + 1e-6  # 1e-6: connects components
    model = SpectralClustering(n_clusters, affinity="precomputed", random_state=seed, assign_labels="kmeans")
    labels: np.ndarray = model.fit_predict(affinity_NN)
    return labels


def _hdbscan(rows_ND: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import HDBSCAN

    smallest = max(5, len(rows_ND) // 100)
    labels: np.ndarray = HDBSCAN(min_cluster_size=smallest, copy=True).fit_predict(
        _pca(rows_ND, _HDBSCAN_DIMENSIONS, seed)(rows_ND)
    )
    return np.where(labels < 0, NOISE, labels)


_FITS: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "kmeans": _kmeans,
    "spectral": _spectral,
    "hdbscan": _hdbscan,
}


@dataclass(frozen=True, slots=True, eq=False)
class _Components:
    """Map from rows to principal components."""

    mean_D: np.ndarray
    axes_CD: np.ndarray

    def __call__(self, rows_ND: np.ndarray) -> np.ndarray:
        found_NC: np.ndarray = (rows_ND - self.mean_D) @ self.axes_CD.T
        return found_NC


def _pca(rows_ND: np.ndarray, dimensions: int, seed: int) -> _Components:
    """Map from rows to principal components; each component's largest entry is positive (scikit-learn's rule)."""
    from sklearn.decomposition import PCA

    size = min(dimensions, *rows_ND.shape)
    model = PCA(size, svd_solver="randomized" if min(rows_ND.shape) > 64 else "full", random_state=seed).fit(rows_ND)
    return _Components(model.mean_, model.components_)


def _map(rows_ND: np.ndarray, layout: str, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    if layout == "pca":
        return _pca(rows_ND, 2, seed)
    with needing("the umap map (not layout='pca')", "umap-learn"):
        import umap
    model: Any = umap.UMAP(n_components=2, metric="cosine", random_state=seed, n_jobs=1).fit(rows_ND)
    found: Callable[[np.ndarray], np.ndarray] = model.transform
    return found


def _centres(rows_ND: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit centres [C, D], and labels renumbered to 0..C-1 (NOISE stays)."""
    names, numbers = np.unique(labels_N[labels_N != NOISE], return_inverse=True)
    relabelled = np.full(len(labels_N), NOISE, np.int64)
    relabelled[labels_N != NOISE] = numbers
    sums_CD = np.zeros((max(len(names), 1), rows_ND.shape[1]))
    np.add.at(sums_CD, relabelled[relabelled != NOISE], rows_ND[relabelled != NOISE])
    lengths = np.linalg.norm(sums_CD, axis=1, keepdims=True)
    return (sums_CD / np.where(lengths > 0, lengths, 1)).astype(np.float32), relabelled


def _assign(
    view: View, live: np.ndarray, centres_CD: np.ndarray, place: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    map_P2 = np.zeros((len(live), 2))
    if isinstance(place, _Components):  # linear: one scan of the stored rows, which are not decoded
        queries_QD = np.concatenate([centres_CD, place.axes_CD[:2].astype(np.float32)])
        scores_QP = scan_rows(view, queries_QD, live)[:, live]
        similar_CP = scores_QP[: len(centres_CD)]
        for axis, scores_P in enumerate(scores_QP[len(centres_CD) :]):
            map_P2[:, axis] = scores_P - place.mean_D @ place.axes_CD[axis]
        return similar_CP.argmax(axis=0), similar_CP.max(axis=0).astype(np.float64), map_P2
    cluster_P, similarity_P, done = np.empty(len(live), np.int64), np.empty(len(live)), 0
    for _, rows_ND in view.scan(live):
        similar_NC = rows_ND @ centres_CD.T
        stop = done + len(rows_ND)
        cluster_P[done:stop] = similar_NC.argmax(axis=1)
        similarity_P[done:stop] = similar_NC.max(axis=1)
        found_N2 = place(rows_ND)
        map_P2[done:stop, : found_N2.shape[1]] = found_N2[:, :2]
        done = stop
    return cluster_P, similarity_P, map_P2


def _by_size(cluster_P: np.ndarray) -> np.ndarray:
    """Renumber the clusters by size, the largest first; NOISE stays."""
    names, counts = np.unique(cluster_P[cluster_P != NOISE], return_counts=True)
    ranked: Sequence[int] = names[np.argsort(-counts, kind="stable")].tolist()
    number = np.full(max(ranked, default=0) + 2, NOISE)  # the last one is for NOISE, -1
    number[ranked] = np.arange(len(ranked))
    return number[cluster_P]
