"""Drift model of alignment scores: how reliable an old score is, fitted to problems that were measured twice.

A problem's true score follows an Ornstein-Uhlenbeck process around the pool's mean. Its variance is `signal`, its
autocorrelation after `age` training steps exp(-age / life). A row of n rollouts measures it with variance `noise` / n.
With age, the estimate returns to the pool's mean and its uncertainty grows to the pool's spread. A one-dimensional
Kalman filter combines all rows of a problem. Formulas: docs/methods.md, Budgeted refresh.

Dimension letters: P problems, N pairs of measurements, R reliabilities and L lives tried.
"""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from gradstore import Store
from gradstore.engine.forecasting.kept import Kept
from gradstore.engine.forecasting.pass_rates import effective
from gradstore.engine.searching.query import score_rows
from gradstore.engine.searching.targets import target
from gradstore.errors import RequestError

PRIOR_RELIABILITY = 0.5
"""Prior share of a row's score variance that is signal."""
PRIOR_LIFE = 50.0
"""Prior number of steps after which the correlation is 1/e."""
_PRIOR_PAIRS = 10.0
"""Weight of the prior spread of the scores, in pairs."""
_LIFE_SPREAD = 1.5
"""Standard deviation of the prior of log life."""
_MOST_PAIRS = 5000
_STEPS_BACK = 4


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Scores of problems measured twice, both against the target of the later time."""

    old: np.ndarray
    """Score of the older row, float64 [N]."""
    new: np.ndarray
    """Score of the newer row, float64 [N]."""
    ages: np.ndarray
    """Steps between the two rows, float64 [N]."""
    n_old: np.ndarray
    """Rollouts of the older row, float64 [N]."""
    n_new: np.ndarray
    """Rollouts of the newer row, float64 [N]."""

    def __len__(self) -> int:
        return len(self.old)

    def less(self, offsets: np.ndarray) -> "Pairs":
        """The pairs with a value subtracted from both scores of each, float64 [N]."""
        return replace(self, old=self.old - offsets, new=self.new - offsets)

    @classmethod
    def join(cls, parts: Sequence["Pairs"]) -> "Pairs":
        """Concatenate pairs; keeps only the last _MOST_PAIRS."""
        columns = [
            np.concatenate([np.zeros(0), *(getattr(part, name) for part in parts)])[-_MOST_PAIRS:]
            for name in ("old", "new", "ages", "n_old", "n_new")
        ]
        return cls(*columns)


@dataclass(frozen=True, slots=True)
class Staleness:
    """The model's parameters, on the scale of the scores."""

    mean: float
    """Mean of the pool's true scores."""
    signal: float
    """Variance of the true scores over the pool."""
    noise: float
    """Variance of a measurement with a single rollout; n rollouts have noise / n."""
    life: float
    """Steps after which a score's correlation with itself is 1/e."""
    n_pairs: int = 0
    """Number of pairs in the fit; 0: the prior alone."""

    def equivalent(self, mean_P: np.ndarray, sd_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Equivalent unbiased measurement: value and standard error, float64 [P]; NaN where only the prior is known.

        Updating the prior with it gives this mean and sd. It is for statistics that apply their own shrinkage.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            precision_P = 1 / sd_P**2 - 1 / self.signal
            precision_P = np.where(precision_P * self.signal > 1e-6, precision_P, np.nan)
            value_P = (mean_P / sd_P**2 - self.mean / self.signal) / precision_P
            return value_P, 1 / np.sqrt(precision_P)

    def describe(self) -> dict[str, Any]:
        """The parameters as a dict for JSON."""
        return asdict(self)


class Beliefs:
    """Kalman filter over the scores of P problems; measurements must come in the order of their steps."""

    def __init__(self, model: Staleness, n: int) -> None:
        self.model = model
        self._mean_P = np.full(n, model.mean)
        self._variance_P = np.full(n, model.signal)
        self._step_P = np.zeros(n)

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the true scores at a step, float64 [P]."""
        return self._at(step, slice(None))

    def _at(self, step: int, places: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        kept = np.exp(-np.maximum(step - self._step_P[places], 0) / self.model.life)
        mean = self.model.mean + kept * (self._mean_P[places] - self.model.mean)
        variance = self.model.signal + kept**2 * (self._variance_P[places] - self.model.signal)
        return mean, np.sqrt(np.maximum(variance, 0.0))

    def measure(self, places: np.ndarray, step: int, scores: np.ndarray, rollouts: np.ndarray) -> None:
        """Update with the scores of distinct problems, measured at one step."""
        mean, sd = self._at(step, places)
        variance = sd**2
        gain = variance / (variance + self.model.noise / np.maximum(rollouts, 1) + 1e-300)
        self._mean_P[places] = mean + gain * (scores - mean)
        self._variance_P[places] = variance * (1 - gain)
        self._step_P[places] = step


def fit(pairs: Pairs, scores_P: np.ndarray, rollouts_P: np.ndarray) -> Staleness:
    """Fit the parameters to pairs (maximum a posteriori); without pairs, returns the prior.

    scores_P, rollouts_P: each problem's first score and its rollouts, NaN where there is none. First measurements are
    not selected by score, so they estimate the pool's mean and spread without bias. A grid search covers reliability
    and life. For each grid point, mean and signal have a closed form: weighted least squares of new - c old on 1 - c,
    c = exp(-age / life) signal / (signal + noise / n_old), and of the first scores on 1.
    """
    known_P = np.isfinite(scores_P)
    prior_mean = float(scores_P[known_P].mean()) if known_P.any() else 0.0
    spread = float(scores_P[known_P].var()) if known_P.sum() > 1 else 0.0
    spread = spread or 1.0
    n_usual = float(np.median(rollouts_P[known_P])) if known_P.any() else 1.0
    n_usual = max(n_usual, 1.0)
    if not len(pairs):
        signal = PRIOR_RELIABILITY * spread
        return Staleness(prior_mean, signal, (spread - signal) * n_usual, PRIOR_LIFE)
    lives_L = np.geomspace(0.5, 5000, 47)
    kinds = _Kinds.of(pairs, prior_mean)
    kept_LU = np.exp(-kinds.ages / lives_L[:, None])
    on_life_L = -0.5 * (np.log(lives_L / PRIOR_LIFE) / _LIFE_SPREAD) ** 2
    n = len(pairs) + _PRIOR_PAIRS
    best, found = -np.inf, (PRIOR_RELIABILITY, PRIOR_LIFE, prior_mean, spread)
    for reliability in np.linspace(0.04, 0.98, 48).tolist():
        ratio = (1 - reliability) / reliability * n_usual
        c_LU = kept_LU / (1 + ratio / np.maximum(kinds.n_old, 1))
        variance_LU = 1 + ratio / np.maximum(kinds.n_new, 1) - kept_LU * c_LU
        lever_LU = 1 - c_LU
        firsts = max(float(known_P.sum()) * reliability, 1e-3)
        # Sums over pairs: of rest = new - c old - lever prior_mean, and of its square.
        rest_LU = kinds.new - c_LU * kinds.old
        squares_LU = kinds.new_new - 2 * c_LU * kinds.new_old + c_LU**2 * kinds.old_old
        weight_L = (kinds.counts * lever_LU**2 / variance_LU).sum(1)
        shift_L = (lever_LU * rest_LU / variance_LU).sum(1) / (weight_L + firsts)
        squares_L = (squares_LU / variance_LU).sum(1) - shift_L**2 * (weight_L + 2 * firsts)
        signal_L = (np.maximum(squares_L, 0.0) + _PRIOR_PAIRS * reliability * spread) / n
        fits_L = n * np.log(signal_L) + (kinds.counts * np.log(variance_LU)).sum(1) - _PRIOR_PAIRS * np.log(reliability)
        fits_L = -0.5 * fits_L + on_life_L + np.log(reliability * (1 - reliability))
        place = int(np.argmax(fits_L))
        if fits_L[place] > best:
            best = float(fits_L[place])
            found = (reliability, float(lives_L[place]), prior_mean + float(shift_L[place]), float(signal_L[place]))
    reliability, life, mean, signal = found
    return Staleness(mean, signal, (1 - reliability) / reliability * n_usual * signal, life, len(pairs))


@dataclass(frozen=True, slots=True, eq=False)
class _Kinds:
    """Sums over the pairs of one age and the same numbers of rollouts; scores less the prior mean. Arrays are [U]."""

    ages: np.ndarray
    n_old: np.ndarray
    n_new: np.ndarray
    counts: np.ndarray
    old: np.ndarray
    new: np.ndarray
    old_old: np.ndarray
    new_old: np.ndarray
    new_new: np.ndarray

    @classmethod
    def of(cls, pairs: Pairs, mean: float) -> "_Kinds":
        kinds_U3, kind_N = np.unique(np.stack([pairs.ages, pairs.n_old, pairs.n_new], 1), axis=0, return_inverse=True)
        old_N, new_N = pairs.old - mean, pairs.new - mean
        weights = (np.ones(len(pairs)), old_N, new_N, old_N * old_N, new_N * old_N, new_N * new_N)
        return cls(*kinds_U3.T, *(np.bincount(kind_N.reshape(-1), own) for own in weights))


def measured_pairs(
    store: Store,
    pool: str,
    benchmarks: Sequence[str],
    now: int,
    offsets_N: np.ndarray | None = None,
    base: tuple[int, int] = (0, 0),
) -> Pairs:
    """Pairs of cosines of problems that were measured twice, from the newest steps of the store up to `now`.

    Each live row is paired with the newest earlier row of its problem, if that is live. Two groups of steps are read:
    the newest with a benchmark measurement, and the newest without one (with a trainer's own rollouts).
    offsets_N: by problem number, the value to subtract from its scores (its source's mean); None: 0. base:
    `StoredRows.base` of the pool. Pairs of a step are read once: again only when there are other rows.
    """
    counts = {step: n for step, n in store.steps(pool).items() if step <= now}
    of_benchmarks = {name: store.steps(name) for name in benchmarks}
    rounds = {step for own in of_benchmarks.values() for step in own}
    at_rounds = [step for step in counts if step in rounds][-_STEPS_BACK:]
    between = [step for step in counts if step not in rounds][-_STEPS_BACK:]
    kept, parts, names = Kept.of(store, pool), [], set[Hashable]()
    for step in sorted({*at_rounds, *between}):
        before = [[(own, n) for own, n in some.items() if own <= step] for some in (counts, *of_benchmarks.values())]
        name = ("pairs", step)
        names.add(name)
        make = partial(_pairs_at, store, pool, benchmarks, step)
        pairs, number_N = kept.get(name, (before, tuple(benchmarks), base), make)
        parts.append(pairs if offsets_N is None else pairs.less(offsets_N[number_N]))
    kept.keep_only("pairs", names)
    return Pairs.join(parts)


def direction_at(store: Store, benchmarks: Sequence[str], step: int) -> np.ndarray | None:
    """Sum of the benchmarks' unit targets at a step, float32 [D]; None where none has a live problem."""
    vectors = []
    for name in benchmarks:
        try:
            vectors.append(target(store, name, step).vector)
        except RequestError:  # no live problem at or before this step
            continue
    return sum_of_units(vectors).astype(np.float32) if vectors else None


def sum_of_units(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Sum of the vectors, each scaled to unit length, float64 [D]; a zero vector adds nothing."""
    doubles = [vector.astype(np.float64) for vector in vectors]
    total_D: np.ndarray = np.sum([vector / (np.linalg.norm(vector) or 1.0) for vector in doubles], axis=0)
    return total_D


def _pairs_at(store: Store, pool: str, benchmarks: Sequence[str], step: int) -> tuple[Pairs, np.ndarray]:
    """Pairs of one step, and the numbers of their problems, int64 [N]."""
    query_D = direction_at(store, benchmarks, step)
    after, before = store.view(pool, step, since=step), store.view(pool, step - 1)
    new = np.flatnonzero(after.live)
    number_N = after.problem_numbers[new]
    old = before.positions_of(number_N)
    both = (old >= 0) & np.append(before.live, False)[old]
    new, old, number_N = new[both], old[both], number_N[both]
    if query_D is None or not query_D.any() or not len(new):
        return Pairs(*np.zeros((5, 0))), np.zeros(0, np.int64)
    unit_D = query_D / np.linalg.norm(query_D)
    new, old, number_N = new[-_MOST_PAIRS:], old[-_MOST_PAIRS:], number_N[-_MOST_PAIRS:]  # no more can count
    pairs = Pairs(
        score_rows(before, unit_D, "cosine", old)[old].astype(np.float64),
        score_rows(after, unit_D, "cosine", new)[new].astype(np.float64),
        (step - before.steps[old]).astype(np.float64),
        effective(before.n_rollouts[old].astype(np.float64), before.pass_rates[old]),
        effective(after.n_rollouts[new].astype(np.float64), after.pass_rates[new]),
    )
    return pairs, number_N
