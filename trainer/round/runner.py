"""One round of a run: plan, measure, pick, record.

    measure    roll out the benchmarks' problems with the current policy, sketch them, aggregate them to targets
    plan       choose candidates to roll out again: all, or the most useful ones within a budget
    measure    roll out the planned candidates, sketch and probe them; then plan again while the picks are not settled
    pick       rank by the selector, from this step's rows or, with a budget, from rows of every age
    record     write the candidates, the picks and the costs to the store

Each step can resume after an interruption: it does what the store and the journal of plans do not have yet.
"""

import logging
from dataclasses import replace

from gradstore import Store
from gradstore.engine.gradients.coverage import least_of
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.bases import SketcherFiles, create_from
from gradstore.trainer.round.aiming import Aim
from gradstore.trainer.round.journal import Journal
from gradstore.trainer.round.measuring import (
    Costs,
    Measured,
    Windows,
    rollouts_of_benchmarks,
    rollouts_of_plan,
    sketch_benchmarks,
)
from gradstore.trainer.round.picking import pick
from gradstore.trainer.round.planning import Plans, plan_of_a_new_store
from gradstore.trainer.round.policy import Policy
from gradstore.trainer.round.recording import Work, record
from gradstore.trainer.round.run import Run, Scope

log = logging.getLogger(__name__)


class RoundRunner:
    """One round of a run, with the current policy."""

    def __init__(self, run: Run, policy: Policy, number: int) -> None:
        self.scope, self.policy, self.costs = Scope.of(run, number, policy.step), policy, Costs()
        self._benchmarks = rollouts_of_benchmarks(self.scope, policy, self.costs)
        self._first: Windows | None = None
        """Rollouts of plan 0, if the basis was fitted to them."""

    def run(self, store: Store) -> None:
        """Do the round, or the rest of an interrupted one, and record it in the store."""
        scope, policy, costs = self.scope, self.policy, self.costs
        journal = Journal(store, scope.run.pool, scope.number, scope.step, scope.target)
        aim = self._aim(store)
        plans = Plans(store, scope, aim, journal, costs)
        probes = scope.run.needs_probes and bool(aim.targets)
        measured = Measured(store, scope, policy, journal, costs, probes=probes, first=self._first)
        for number, plan in enumerate(plans):
            measured.run(plan, number)
        with costs.stage("select"):
            picked = pick(store, scope, aim, probed=bool(journal.probes))
        record(store, scope, aim, picked, Work(journal.plans, journal.calibration, plans.about, costs))
        journal.close()

    def _aim(self, store: Store) -> Aim:
        """Measure the benchmarks and aggregate them to targets."""
        sketch_benchmarks(store, self._benchmarks, self.policy, self.costs, aim=self.scope.run.needs_probes)
        with self.costs.stage("target"):
            return Aim.at(store, self.scope)

    def make_store(self) -> Store:
        """A new store for the policy's sketches; if their basis is fitted, candidates are rolled out for it.

        RequestError if the sketches see too little of the gradient (setting `accept_coverage`).
        """
        run, settings = self.scope.run, self.scope.settings
        files = self._fitted() if self.scope.fits else self._unfitted()
        if files.coverage is None:
            log.warning("%s: the policy did not measure what its sketches see of the gradient", run.path)
        else:
            log.info("%s: %s", run.path, files.coverage.sentence())
            files.coverage.require(least_of(settings.spec, settings.accept_coverage), "round setting accept_coverage=")
        store = create_from(run.path, files, run.dtype)
        run.add_problems(store)
        return store

    def _fitted(self) -> SketcherFiles:
        """Fit the basis to the benchmarks' rollouts and to the first candidates'; the round uses these rollouts too."""
        settings = self.scope.settings
        ids = plan_of_a_new_store(self.scope)
        self._first = rollouts_of_plan(self.scope, self.policy, self.costs, ids, 0)
        benchmark = [group for windows in self._benchmarks.values() for group in windows.all_groups(keep=True)]
        window, groups = 0, list[Group]()
        while window < len(self._first) and sum(group.has_signal for group in groups) < settings.fit_problems:
            groups += self._first.groups(window, keep=True)
            window += 1
        with self.costs.stage("fit"):
            return self.policy.fit(settings.spec, groups, benchmark)

    def _unfitted(self) -> SketcherFiles:
        """Without rollouts no basis can be fitted: a seeded one of the same size, for observed rollouts."""
        spec = self.scope.settings.spec
        return self.policy.fit(spec if spec.basis != "fitted" else replace(spec, basis="dense"), [])
