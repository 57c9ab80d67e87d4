"""The step of a finite difference: large enough to be seen above rounding, small enough to be a derivative."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The steps chosen, and how the probe compares with exact dots."""

    central: float
    """eps of central differences."""
    one_sided: float
    """eps of differences to known log-probabilities."""
    nats_central: float
    """Root mean square move of a token's log-probability at `central`."""
    nats_one_sided: float
    error_central: float
    """Expected relative error of a derivative at `central`, truncation and rounding together, root mean square."""
    error_one_sided: float
    noise: float
    """Rounding noise of a rollout's log-probability as the objective weights it, root mean square."""
    exact: np.ndarray
    """<g_i, V> of a few problems by autograd, float64."""
    found: np.ndarray
    """The same by differences."""
    truncation: float
    """Share of the direction's norm that a low-rank branch leaves out; 0 without one."""
    norm: float
    """Of the direction: steps along a longer one are shorter."""

    @property
    def relative_error(self) -> float:
        """|found - exact| / |exact|; nan when nothing was checked."""
        usable = np.isfinite(self.exact) & np.isfinite(self.found)
        norm = np.linalg.norm(self.exact[usable])
        return float(np.linalg.norm((self.found - self.exact)[usable]) / norm) if norm > 0 else float("nan")

    def along(self, norm: float, nats: float = 1.0) -> "Calibration":
        """The same steps, measured in distance, along a direction of another norm; nats: and so many times as far."""
        factor = nats * self.norm / norm
        return replace(self, norm=norm, central=self.central * factor, one_sided=self.one_sided * factor)

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> "Calibration":
        """From what `describe` gave."""
        arrays = {name: np.array(described[name], np.float64) for name in ("exact", "found")}
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in {**described, **arrays}.items() if name in known})

    def describe(self) -> dict:
        """As JSON can hold it."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("exact", "found")}
        return plain | {
            "relative_error": self.relative_error,
            "exact": self.exact.tolist(),
            "found": self.found.tolist(),
        }


def best_step(truncation: float, rounding: float, order: int, most: float) -> tuple[float, float]:
    """The best step as a multiple of the one where the two errors were measured, and its error.

    The error truncation s^order + rounding / s is least at s = (rounding / (order truncation))^(1 / (order + 1)).
    most: the largest multiple allowed.
    """
    scale = most
    if truncation > 0:
        scale = min(max((rounding / (order * truncation)) ** (1 / (order + 1)), 1e-4), most)
    return scale, float(np.hypot(truncation * scale**order, rounding / scale))
