"""Plan which candidates a round measures next: all of them, or within a budget those that matter most for the picks.

    first look     some rollouts of every candidate without a row (setting `first_look`), in the first measuring round
    first plan     the most useful candidates, from the forecast
    at the cut     batches of candidates whose interval holds the cut, until none is left or the budget is spent

Dimension letters: P candidates.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from gradstore import Store
from gradstore.engine.forecasting.forecast import CandidateForecast
from gradstore.engine.forecasting.refresh_choice import Outlook, choose, straddling
from gradstore.engine.forecasting.selectors import aged_scores
from gradstore.trainer.round.aiming import Aim
from gradstore.trainer.round.journal import Journal, Plan
from gradstore.trainer.round.measuring import Costs
from gradstore.trainer.round.run import PLAN, Scope

_BATCHES = 4
"""Number of batches that the `boundary` share of the budget is divided into."""


class Plans:
    """Plans of a round, in order; each is made from the rows that the plans before it brought."""

    def __init__(self, store: Store, scope: Scope, aim: Aim, journal: Journal, costs: Costs) -> None:
        self._store, self._scope, self._aim, self._journal, self._costs = store, scope, aim, journal, costs
        self.about: dict[str, Any] = {}
        """For the record: the drift model before the first plan, and whether the picks are settled."""

    def __iter__(self) -> Iterator[Plan]:
        scope, journal = self._scope, self._journal
        if not scope.measures and not (scope.fits and (journal.plans or not self._store.steps(scope.run.pool))):
            return
        number = 0
        if scope.look:
            yield journal.plan(number, self._without_rows)
            number += 1
        plan = journal.plan(number, partial(first_plan, scope, self._outlook))
        yield plan
        if scope.budget is None or not scope.measures or not self._aim.targets:
            return
        left, settled = scope.budget - len(plan.ids), False
        while scope.settings.boundary > 0 and left > 0 and not settled:
            number += 1
            plan = journal.plan(number, partial(self._at_the_cut, left))
            settled = not plan.ids
            if not settled:
                yield plan
                left -= len(plan.ids)
        self.about["settled"] = settled

    def _without_rows(self) -> list[str]:
        view, candidates = self._store.view(self._scope.run.pool, self._scope.step), self._scope.candidates
        return [candidates[place] for place in np.flatnonzero(view.positions(candidates, strict=False) < 0).tolist()]

    def _outlook(self) -> Outlook:
        scope = self._scope
        with self._costs.stage("plan"):
            now = self._aim.forecast(self._store, scope)
            self.about["before"] = None if now.cosine.model is None else now.cosine.model.describe()
            return now.outlook(scope.run.kind, scope.settings.rollouts)

    def _at_the_cut(self, left: int) -> list[str]:
        with self._costs.stage("plan"):
            return at_the_cut(self._scope, self._aim.forecast(self._store, self._scope), left)


def first_plan(scope: Scope, outlook: Callable[[], Outlook]) -> list[str]:
    """The candidates to measure first. outlook: called only with a budget, when there is a choice to make."""
    settings = scope.settings
    if not scope.measures:
        return scope.candidates[: settings.fit_problems]
    if scope.budget is None:
        return scope.candidates
    seen = outlook()
    at_once = scope.budget - round(settings.boundary * scope.budget) if seen.pickable.any() else scope.budget
    places = choose(seen, scope.n_picks, at_once, settings.explore, settings.max_no_signal, scope.random(PLAN))
    return [scope.candidates[place] for place in places.tolist()]


def plan_of_a_new_store(scope: Scope) -> list[str]:
    """Plan 0 in a store that has no rows yet, when all candidates look alike."""
    zeros_P = np.zeros(len(scope.candidates))
    ones_P, never_P = zeros_P + 1, zeros_P > 0
    blind = Outlook(zeros_P, ones_P, zeros_P, ones_P, never_P, never_P)
    return scope.candidates if scope.look else first_plan(scope, lambda: blind)


def at_the_cut(scope: Scope, now: CandidateForecast, left: int) -> list[str]:
    """The next batch of candidates near the cut to measure (again), at most `left`; empty: the picks are settled."""
    assert scope.budget is not None
    settings, kind = scope.settings, scope.run.kind
    mean_P, sd_P = aged_scores(kind, now)
    noise_P = now.outlook(kind, settings.rollouts).noise
    unsure = straddling(mean_P, sd_P, noise_P, scope.n_picks, settings.confidence)
    open_P = now.fresh | (1 - now.signal <= settings.max_no_signal)
    unsure = unsure[open_P[unsure]]
    batch = max(1, round(settings.boundary * scope.budget / _BATCHES))
    return [scope.candidates[place] for place in unsure[: min(left, batch)].tolist()]
