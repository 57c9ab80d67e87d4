"""The step of a finite difference: large enough to exceed rounding noise, small enough to give the derivative."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The chosen steps, and a comparison of the probe with exact dots."""

    central: float
    """eps of central differences."""
    one_sided: float
    """eps of differences to known log-probabilities."""
    nats_central: float
    """Root mean square change of a token's log-probability at `central`."""
    nats_one_sided: float
    error_central: float
    """Expected relative error (root mean square) of a derivative at `central`, from truncation and rounding."""
    error_one_sided: float
    noise: float
    """Rounding noise (root mean square) of a rollout's log-probability, weighted as in the objective."""
    exact: np.ndarray
    """<g_i, V> of a few problems by autograd, float64."""
    found: np.ndarray
    """The same by finite differences."""
    truncation: float
    """Share of the direction's norm that a low-rank branch leaves out; 0 without a branch."""
    norm: float
    """Norm of the direction; steps along a longer direction are shorter."""

    @property
    def relative_error(self) -> float:
        """|found - exact| / |exact|; nan if no problem was checked."""
        usable = np.isfinite(self.exact) & np.isfinite(self.found)
        norm = np.linalg.norm(self.exact[usable])
        return float(np.linalg.norm((self.found - self.exact)[usable]) / norm) if norm > 0 else float("nan")

    def along(self, norm: float, nats: float = 1.0) -> "Calibration":
        """The steps of the same distance along a direction of another norm, times the factor `nats`."""
        factor = nats * self.norm / norm
        return replace(self, norm=norm, central=self.central * factor, one_sided=self.one_sided * factor)

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> "Calibration":
        """The calibration from the dict that `describe` returned."""
        arrays = {name: np.array(described[name], np.float64) for name in ("exact", "found")}
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in {**described, **arrays}.items() if name in known})

    def describe(self) -> dict:
        """The fields as a JSON-ready dict."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("exact", "found")}
        return plain | {
            "relative_error": self.relative_error,
            "exact": self.exact.tolist(),
            "found": self.found.tolist(),
        }


def best_step(truncation: float, rounding: float, order: int, most: float) -> tuple[float, float]:
    """The best step, as a multiple s of the step where the two errors were measured, and its error.

    The error truncation s^order + rounding / s is smallest at s = (rounding / (order truncation))^(1 / (order + 1)).
    most: the largest allowed s.
    """
    scale = most
    if truncation > 0:
        scale = min(max((rounding / (order * truncation)) ** (1 / (order + 1)), 1e-4), most)
    return scale, float(np.hypot(truncation * scale**order, rounding / scale))
