"""Pick problems from the measured candidates: rank by the selector, fill up at random where too few can be ranked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradstore import Store
from gradstore.engine.forecasting.cosine_model import sum_of_units
from gradstore.engine.forecasting.forecast import CandidateForecast
from gradstore.engine.forecasting.selectors import aged_parts, with_old_sketches
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.searching.targets import Target
from gradstore.engine.selecting.membership import places
from gradstore.engine.selecting.mixture import Part, parts_of
from gradstore.engine.selecting.selection import Selection, scores_of, select
from gradstore.trainer.round.aiming import Aim
from gradstore.trainer.round.run import FILL, SELECT, Scope


@dataclass(frozen=True, slots=True, eq=False)
class Picked:
    """Outcome of a round."""

    forecast: CandidateForecast
    """Forecast of the candidates after all measurements."""
    scores: np.ndarray
    """Score of each candidate with the ends of its interval, float64 [P, 3]; NaN where the selector cannot rank it."""
    chosen: Selection
    """The picks of the selector."""
    filled: list[str]
    """Picks drawn at random because too few candidates could be ranked."""
    warnings: list[str]


def pick(store: Store, scope: Scope, aim: Aim, probed: bool) -> Picked:
    """Pick the round's problems. probed: whether the store has probes of this step along the round's target."""
    settings, pool = scope.settings, scope.run.pool
    now = aim.forecast(store, scope)
    parts, warnings = _parts(scope, aim, probed)
    probes = None
    if any(part.selector.needs_probes for part in parts):
        probes = ProbeBatch.load(store, pool, step=scope.step, target=scope.target)
    if now.cosine.model is not None:
        parts = aged_parts(parts, now, _length(aim.targets), settings.confidence)
        if probes is not None:
            numbers = store.view(pool, scope.step).numbers_of(probes.ids)
            probes = with_old_sketches(probes, numbers, now, _probe_scale(aim.targets, scope))
    asked: dict[str, Any] = {
        "at": scope.step,
        "candidates": now.numbers,
        "seed": scope.seed(SELECT),
        "probes": probes,
        "confidence": settings.confidence,
        "forgetting": settings.forgetting,
    }
    chosen = select(
        store,
        pool,
        aim.targets or None,
        scope.n_picks,
        parts,
        allow_fewer=True,
        diversity=settings.diversity,
        temperature=settings.temperature,
        quotas=settings.quotas,
        **asked,
    )
    scores_P3 = _scores(now, store, pool, aim.targets or None, parts, asked)
    filled = _drawn(scope, now, chosen.ids)
    if filled:
        number = f"{len(filled)} of the {scope.n_picks}"
        warnings.append(f"only {len(chosen)} candidates could be ranked: {number} picks were drawn at random")
    return Picked(now, scores_P3, chosen, filled, warnings)


def _scores(
    now: CandidateForecast, store: Store, pool: str, targets: list[Target] | None, parts: list[Part], asked: dict
) -> np.ndarray:
    """Value of `Picked.scores`. In a mixture a score is by the part that chooses the candidate where all are chosen."""
    scores_P3 = np.full((len(now), 3), np.nan)
    if len(parts) > 1:
        every = select(store, pool, targets, len(now), parts, allow_fewer=True, **asked)
        scores_P3[places(every.ids, now.ids)] = np.stack([every.scores, every.low, every.high], axis=1)
        return scores_P3
    numbers, scored = scores_of(store, pool, targets, parts[0].selector, **asked)
    known = np.isfinite(scored.scores)
    columns = (scored.scores, scored.low, scored.high)
    scores_P3[now.places_of(numbers[known])] = np.stack([own[known] for own in columns if own is not None], axis=1)
    return scores_P3


def _parts(scope: Scope, aim: Aim, probed: bool) -> tuple[list[Part], list[str]]:
    """The selector's parts, or random picks where it cannot rank; and warnings about what is missing."""
    missing = [f"no problem of benchmark {name!r} has a signal: it is left out of this round" for name in aim.silent]
    if scope.warm_up:
        return parts_of("rand"), missing
    if scope.run.needs_target and not aim.targets:
        return parts_of("rand"), [*missing, "no problem of any benchmark has a signal: this round picks at random"]
    if scope.run.needs_probes and not probed:
        line = "no candidate is expected to have a signal, none was probed: this round picks at random"
        return parts_of("rand"), [*missing, line]
    return scope.run.parts, missing


def _length(targets: Sequence[Target]) -> float:
    """Norm of the target as the selectors see it."""
    vectors = [own.vector for own in targets]
    return float(np.linalg.norm(vectors[0].astype(np.float64) if len(vectors) == 1 else sum_of_units(vectors)))


def _probe_scale(targets: Sequence[Target], scope: Scope) -> float:
    """Factor from a sketch's norm x cosine to a probe's dot: the mean target's norm.

    0 for several targets or another `aggregate`, where no such factor exists.
    """
    return _length(targets) if len(targets) == 1 and scope.settings.aggregate == "mean" else 0.0


def _drawn(scope: Scope, now: CandidateForecast, taken: Sequence[str]) -> list[str]:
    """Random picks to fill up the number of picks: first of the candidates never measured, then of any others."""
    if len(taken) >= scope.n_picks:
        return []
    order = scope.random(FILL).permutation(len(scope.candidates)).tolist()
    order.sort(key=lambda place: now.newest.states[place] >= 0)  # stable: still shuffled among those never measured
    known = set(taken)
    others = [scope.candidates[place] for place in order if scope.candidates[place] not in known]
    return others[: scope.n_picks - len(taken)]
