"""The settings of a store's sketches, and a batch of sketches.

Dimension letters: P problems, D sketch dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.gradients.settings import GradientSpec
from gradstore.engine.sketches.projection import Kind
from gradstore.errors import RequestError, check_known, check_number
from gradstore.state import State

HEAD_ONLY = "output layer, from the forward pass"
"""Name of head mode in the fingerprint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchSpec(GradientSpec):
    """Settings that turn gradients into sketches. Those that change a sketch are in the store's fingerprint.

    Older stores, without sketches of norm weights and biases, have `vectors` False. RequestError for settings that
    conflict.
    """

    rank: int = 16
    """Width of each side of a layer's projection; a layer's core has at most rank x rank entries. Fitted sides have
    random directions in addition, a quarter as many."""
    right_rank: int | None = None
    """Width of the input side if it differs from `rank`; random bases only."""
    seed: int = 0
    """Seed of the random bases."""
    basis: Kind = "random"
    """`random`, `dense` or `fitted` (projection.py); a fitted projection is made by `fit_projection`."""
    dim: int = 1024
    """Dimensions of a sketch, for dense and fitted bases; a random basis has as many as its core entries."""

    @classmethod
    def of(cls, fingerprint: dict) -> "SketchSpec":
        """The spec of a store's rows, from its fingerprint; RequestError if no spec gives such rows."""
        try:
            projection, modules = fingerprint["projection"], fingerprint["modules"]
            settings = Objective(**fingerprint["objective"])
            return cls(
                rank=projection["rank"],
                right_rank=projection.get("right_rank"),
                seed=projection["seed"],
                basis=projection["kind"],
                dim=projection["dim"],
                objective=settings,
                modules=tuple(modules) if modules else None,
                head_only=fingerprint.get("gradient") == HEAD_ONLY,
                embeddings=fingerprint.get("embeddings", False),
                vectors=fingerprint.get("vectors", False),
            )
        except (KeyError, TypeError):
            raise RequestError(
                "the store's rows were not made by this sketcher (its fingerprint has no settings): they can be "
                "searched, and more of them imported, but not sketched or measured"
            ) from None

    def __post_init__(self) -> None:
        GradientSpec.__post_init__(self)
        check_number("rank", self.rank, least=1)
        check_known("basis", self.basis, get_args(Kind))
        check_number("dim", self.dim, least=1)
        if self.right_rank is not None and (self.right_rank < 1 or self.basis != "random"):
            raise RequestError(
                f"right_rank is {self.right_rank} with {self.basis} bases, expected 1 or more, with random"
            )


@dataclass(frozen=True, slots=True, eq=False)
class SketchBatch:
    """Sketches of some problems, ready for `Writer.append`."""

    ids: list[str]
    sketches: np.ndarray
    """Projected ascent direction of each problem's objective, float32 [P, D]; zero rows where not live."""
    states: list[State]
    reasons: list[str]
    """Why a row failed; empty for the others."""
    pass_rates: np.ndarray
    """float32 [P]."""
    n_rollouts: np.ndarray
    """int32 [P]."""
    n_tokens: int
    """Tokens that went through the model, without padding and repeated responses."""
    norms: np.ndarray | None = None
    """Estimated norm of each gradient, float32 [P], from the whole core; a fitted sketch keeps only a part of it. None
    for other projections. For `Writer.append(whole_norms=...)`."""
    ess: np.ndarray | None = None
    """Effective sample size in rollouts, float32 [P] (docs/methods.md, off-policy); None without importance."""
    ess_of_ratios: np.ndarray | None = None
    """The same for token ratios that the objective does not use, float32 [P], if all rollouts have log-probabilities:
    how far they are from this policy. None with importance; not stored."""

    def rows(self, places: Sequence[int] | None = None) -> dict[str, Any]:
        """Arguments of `Writer.append` for the problems at these positions; None: for all."""
        chosen = np.arange(len(self.ids)) if places is None else np.asarray(places, np.int64)
        return {
            "ids": [self.ids[place] for place in chosen],
            "sketches": self.sketches[chosen],
            "whole_norms": None if self.norms is None else self.norms[chosen],
            "state": [self.states[place] for place in chosen],
            "pass_rate": self.pass_rates[chosen],
            "n_rollouts": self.n_rollouts[chosen],
            "ess": None if self.ess is None else self.ess[chosen],
            "reason": [self.reasons[place] for place in chosen],
        }
