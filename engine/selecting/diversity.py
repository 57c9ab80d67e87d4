"""Diversity re-ranking of the best candidates, against picks that are near-duplicates of each other.

    mmr      maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998): the next pick is the candidate with the
             largest w r_i - (1 - w) max_j cos(g_i, g_j), j over the picks, r the score scaled to 0..1
    kmeans   strata from scikit-learn's k-means of the unit gradients: the best of each stratum in turn

Cost, for n picks among K candidates of D dimensions: memory for K rows in float32 (4 K D bytes). mmr takes n K D
multiplications, kmeans about 20 K D times the number of strata. With K = 4 n = 1,024 and D = 4,096 either takes at most
a second. At n = 10,000 mmr takes 1.6e12 multiplications (minutes); kmeans with its 100 strata takes less.

K candidates, D sketch dimensions.
"""

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from gradstore.errors import RequestError

Method = Literal["mmr", "kmeans"]


@dataclass(frozen=True, slots=True)
class Diversity:
    """Settings of the diversity re-ranking."""

    method: Method = "mmr"
    """`mmr`, maximal marginal relevance, or `kmeans`, the best of each stratum."""
    relevance: float = 0.5
    """mmr: weight of the score; 1 is the plain ranking, 0 is diversity only."""
    strata: int = 0
    """kmeans: number of strata; 0: the square root of the number of picks."""
    candidates: int = 4
    """Number of best candidates to re-rank, per pick."""

    def __post_init__(self) -> None:
        if self.method not in ("mmr", "kmeans"):
            raise RequestError(f"diversity {self.method!r} is not one of mmr, kmeans")
        if not 0 <= self.relevance <= 1:
            raise RequestError(f"relevance is {self.relevance}, expected a number from 0 to 1")
        if self.candidates < 1 or self.strata < 0:
            raise RequestError(
                f"candidates is {self.candidates} and strata {self.strata}, expected 1 or more and 0 or more"
            )

    def pick(self, units_KD: np.ndarray, scores_K: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
        """Places of n picks among the candidates, in the order picked; int64 [min(n, K)].

        units_KD: unit rows, float32, best score first. Ties go to the earlier candidate.
        """
        n = min(n, len(scores_K))
        if self.method == "mmr":
            return mmr(units_KD, scores_K, n, self.relevance)
        strata = min(self.strata or max(1, round(np.sqrt(n))), len(scores_K))
        return in_turn(kmeans_strata(units_KD, strata, seed), n)

    def describe(self) -> dict:
        """The settings as a dict for JSON."""
        return asdict(self)


def mmr(units_KD: np.ndarray, scores_K: np.ndarray, n: int, relevance: float = 0.5) -> np.ndarray:
    """Places of n picks by maximal marginal relevance, int64 [n]."""
    low, high = float(scores_K.min()), float(scores_K.max())
    scaled_K = (np.asarray(scores_K, np.float64) - low) / (high - low or 1.0)
    nearest_K = np.full(len(scores_K), -np.inf)
    open_K = np.ones(len(scores_K), bool)
    picks = np.empty(n, np.int64)
    for i in range(n):
        # No earlier pick to compare with: the first pick is the best score, for any weight.
        value_K = scaled_K if i == 0 else relevance * scaled_K - (1 - relevance) * nearest_K
        picks[i] = np.argmax(np.where(open_K, value_K, -np.inf))
        open_K[picks[i]] = False
        nearest_K = np.maximum(nearest_K, units_KD @ units_KD[picks[i]])
    return picks


def kmeans_strata(units_KD: np.ndarray, n_strata: int, seed: int = 0) -> np.ndarray:
    """Stratum of each candidate from scikit-learn's k-means, int64 [K]."""
    from sklearn.cluster import KMeans

    return KMeans(n_strata, n_init=1, max_iter=20, random_state=seed).fit_predict(units_KD).astype(np.int64)


def in_turn(strata_K: np.ndarray, n: int) -> np.ndarray:
    """Places of n picks: the best of each stratum, then the second of each, ...; int64 [n]."""
    place_K = np.empty(len(strata_K), np.int64)
    for stratum in np.unique(strata_K):
        members = np.flatnonzero(strata_K == stratum)
        place_K[members] = np.arange(len(members))
    return np.lexsort((np.arange(len(strata_K)), place_K))[:n]
