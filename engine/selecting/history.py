"""Measurement history of each candidate: Beta posterior of its pass rate, number of measurements and last step.

    a = prior + sum_m w_m n_m p_m        b = prior + sum_m w_m n_m (1 - p_m)        w_m = forgetting^(now - step_m)

The sums are over the measurements m of a problem, with n_m rollouts and pass rate p_m. MoPPS (arXiv 2507.04632) forgets
with every update of a problem. Here forgetting follows the policy's steps: rows of one step have equal weight, and a
problem that was not measured for a long time becomes uncertain again. Formulas: docs/methods.md.

P candidates, M measurements.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gradstore.engine.selecting.membership import places
from gradstore.errors import check_number


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """Posteriors and counts, one entry per candidate, in their order; candidates never measured have the prior."""

    a: np.ndarray
    """Prior plus the weighted number of right rollouts, float64 [P]."""
    b: np.ndarray
    """Prior plus the weighted number of wrong rollouts, float64 [P]."""
    last_step: np.ndarray
    """Step of the newest row, int64 [P]; -1: never measured."""
    n_measurements: np.ndarray
    """Number of rows, in any state, int64 [P]."""

    @classmethod
    def of(
        cls,
        table: pa.Table,
        ids: Sequence[str] | np.ndarray,
        *,
        now: int | None = None,
        forgetting: float = 1.0,
        prior: float = 1.0,
    ) -> "History":
        """Build from a table of `Store.history`, for the problems `ids`.

        now: the policy's step; None: the newest in the table. forgetting: factor per step on the weight of a rollout,
        in (0, 1]; 1 forgets nothing. prior: a and b before the first rollout; 1 is uniform. Rows without a pass rate or
        a number of rollouts count as measurements, but do not change the posterior. RequestError for settings outside
        their range.
        """
        return cls.at_places(table, places(table["id"], ids), len(ids), now=now, forgetting=forgetting, prior=prior)

    @classmethod
    def at_places(
        cls,
        table: pa.Table,
        place_M: np.ndarray,
        n: int,
        *,
        now: int | None = None,
        forgetting: float = 1.0,
        prior: float = 1.0,
    ) -> "History":
        """Like `of` for n candidates; place_M: place of each row's problem among them, -1 for others, int64 [M]."""
        check_number("forgetting", forgetting, above=0, most=1)
        check_number("prior", prior, above=0)
        wanted_M = place_M >= 0
        place_M = place_M[wanted_M]
        step_M, rate_M, count_M = (table[name].to_numpy()[wanted_M] for name in ("step", "pass_rate", "n_rollouts"))
        if now is None:
            now = int(table["step"].to_numpy().max()) if table.num_rows else 0
        weight_M = count_M * forgetting ** np.maximum(now - step_M, 0).astype(np.float64)
        weight_M[np.isnan(rate_M)] = 0.0
        right_M = weight_M * np.nan_to_num(rate_M.astype(np.float64))
        last_P = np.full(n, -1, np.int64)
        np.maximum.at(last_P, place_M, step_M)
        return cls(
            prior + np.bincount(place_M, right_M, n),
            prior + np.bincount(place_M, weight_M - right_M, n),
            last_P,
            np.bincount(place_M, minlength=n).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.a)

    @property
    def pass_rates(self) -> np.ndarray:
        """Posterior mean pass rates, float64 [P]; the prior mean where never measured."""
        return self.a / (self.a + self.b)

    def signal_probability(self, n_rollouts: int) -> np.ndarray:
        """`signal_probability` of each candidate, float64 [P]."""
        return signal_probability(self.a, self.b, n_rollouts)


def signal_probability(a_P: np.ndarray, b_P: np.ndarray, n_rollouts: int) -> np.ndarray:
    """Probability that n new rollouts are neither all right nor all wrong, float64 [P].

    1 - E[p^n] - E[(1 - p)^n], with E[p^n] = B(a + n, b) / B(a, b) under the posterior Beta(a, b) (beta-binomial). That
    is the product of (a + i) / (a + b + i) for i from 0 to n - 1.
    """
    check_number("n_rollouts", n_rollouts, least=1)
    all_right_P, all_wrong_P, total_P = np.ones(len(a_P)), np.ones(len(a_P)), a_P + b_P
    for i in range(n_rollouts):
        all_right_P *= (a_P + i) / (total_P + i)
        all_wrong_P *= (b_P + i) / (total_P + i)
    return np.clip(1 - all_right_P - all_wrong_P, 0.0, 1.0)
