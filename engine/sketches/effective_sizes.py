"""Whether the rollouts that rows were made of still speak for the policy: counts of low effective sample sizes.

The effective sample size (ESS, `EffectiveSampleSize`) of a problem's rollouts says how many on-policy rollouts they are
worth. With importance ratios it is that of the ratios as used. Without them it is that of the plain token ratios, which
nobody applied: a low one says that another policy sampled the rollouts.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradstore.engine.sketches.spec import SketchBatch
from gradstore.state import live_mask

LOW = 0.5
"""With importance ratios: share of a problem's rollouts below which its ESS is low. The variance of an
importance-weighted mean grows by the inverse of this share (Kish 1965), so below it the rollouts are worth fewer than
half of as many fresh ones; particle filters draw anew at the same share (Liu and Chen 1995)."""
OTHER = 0.97
"""Without ratios: share below which another policy sampled the rollouts. The token ratios then have a variance of 0.03,
about 0.17 nats root mean square; half precision and another engine's kernels change a token by 0.02 to 0.1. In
benchmarks/off_policy.py the errors of cosines double about here."""
MANY = 0.1
"""Share of the rows with a low ESS from which a warning is given: a few stale rows change no ranking."""


@dataclass(slots=True)
class EffectiveSizes:
    """Counts over the rows of a run; `add` batches, then ask for the `warning`."""

    importance: bool = False
    """Whether the objective has importance ratios."""
    shares: list[float] = field(default_factory=list)
    """ESS of each live row as a share of its rollouts, where log-probabilities were recorded."""

    def add(self, batch: SketchBatch) -> None:
        """Count the live rows of a batch."""
        sizes_P = batch.ess if batch.ess is not None else batch.ess_of_ratios
        if sizes_P is None:
            return
        self.importance |= batch.ess is not None
        known_P = live_mask(batch.states) & np.isfinite(sizes_P)
        self.shares += (sizes_P[known_P] / batch.n_rollouts[known_P]).tolist()

    @property
    def threshold(self) -> float:
        """Share below which an ESS is low."""
        return LOW if self.importance else OTHER

    @property
    def low(self) -> int:
        """Rows with a low ESS."""
        return sum(share < self.threshold for share in self.shares)

    def describe(self) -> dict[str, Any]:
        """JSON-ready: whether ratios were used, the rows measured, how many are below `threshold`, the median share."""
        return {
            "importance": self.importance,
            "rows": len(self.shares),
            "low": self.low,
            "threshold": self.threshold,
            "median_share": float(np.median(self.shares)) if self.shares else None,
        }

    @property
    def warning(self) -> str | None:
        """What is wrong with the rollouts and what to do, in one line; None if nothing is."""
        if not self.shares or self.low < MANY * len(self.shares):
            return None
        median, n = f"median {100 * float(np.median(self.shares)):.0f} %", len(self.shares)
        if self.importance:
            return (
                f"{self.low} of {n} rows have an effective sample size below {LOW:.0%} of their rollouts ({median}): "
                "they tell less of this policy than half as many fresh rollouts would; make fresh rollouts"
            )
        return (
            f"this policy did not sample the rollouts of {self.low} of {n} rows, as their recorded log-probabilities "
            f"say (effective sample size under importance ratios below {OTHER:.0%} of the rollouts, {median}); make "
            "fresh rollouts, or give the model that sampled them; for slightly older rollouts, use an objective with "
            "importance=true"
        )
