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
"""Share of a problem's rollouts below which its ESS is low. The variance of an importance-weighted mean grows by the
inverse of this share (Kish 1965), so below it the rollouts are worth fewer than half of as many fresh ones; particle
filters draw anew at the same share (Liu and Chen 1995)."""
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
    def low(self) -> int:
        """Rows with a low ESS."""
        return sum(share < LOW for share in self.shares)

    def describe(self) -> dict[str, Any]:
        """JSON-ready: whether ratios were used, the rows measured, those with a low ESS, and the median share."""
        median = float(np.median(self.shares)) if self.shares else None
        return {"importance": self.importance, "rows": len(self.shares), "low": self.low, "median_share": median}

    @property
    def warning(self) -> str | None:
        """What is wrong with the rollouts and what to do, in one line; None if nothing is."""
        if not self.shares or self.low < MANY * len(self.shares):
            return None
        median = f"median {100 * float(np.median(self.shares)):.0f} %"
        if self.importance:
            return (
                f"{self.low} of {len(self.shares)} rows have an effective sample size below {LOW:.0%} of their "
                f"rollouts ({median}): these are too old for this policy, and their ranking is mostly noise; make "
                "fresh rollouts"
            )
        return (
            f"this policy did not sample the rollouts of {self.low} of {len(self.shares)} rows, as their recorded "
            f"log-probabilities say: weighted by importance ratios they would be worth fewer than {LOW:.0%} of as "
            f"many fresh ones ({median}); make fresh rollouts, or give the model that sampled them; for slightly "
            "older rollouts, use an objective with importance=true"
        )
