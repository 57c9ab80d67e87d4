"""Runs one round, from drawing candidates to recording picks. Each stage can resume after an interruption.

    target    roll out the benchmarks' problems with the current policy, sketch them, aggregate
    refresh   roll out candidates again, sketch and probe them: all, or the most useful ones within a budget
    select    the selector picks, from this step's rows or, with a budget, from rows of every age

Dimension letters: P candidates, D sketch dimensions.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import gradstore
from gradstore import Store
from gradstore.engine.forecasting.cosine_model import sum_of_units
from gradstore.engine.forecasting.forecast import (
    CandidateForecast,
    ForecastSettings,
    ForecastTarget,
    forecast_candidates,
)
from gradstore.engine.forecasting.refresh_choice import Outlook, choose, straddling
from gradstore.engine.forecasting.selectors import aged_parts, aged_scores, with_old_sketches
from gradstore.engine.gradients.coverage import least_of
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.probing.calibration import Calibration
from gradstore.engine.rollouts.group import Group
from gradstore.engine.searching.targets import Target, target
from gradstore.engine.selecting.mixture import Part, parts_of
from gradstore.engine.selecting.selection import Selection, select
from gradstore.engine.sketches.bases import create_from, files_in
from gradstore.trainer.round.journal import Journal, Plan
from gradstore.trainer.round.measuring import Costs, Measured, Windows, sketch_benchmarks, sketch_collection
from gradstore.trainer.round.policy import Policy
from gradstore.trainer.round.recording import about_round, round_table
from gradstore.trainer.round.settings import RoundSettings
from gradstore.trainer.sampling.backends import derived_seed

log = logging.getLogger(__name__)

_DRAW, _BENCHMARK, _POOL, _PLAN, _SELECT, _FILL = range(6)
"""Purposes of derived seeds."""
_BATCHES = 4
"""Number of batches that the `boundary` share of the budget is divided into."""


@dataclass(frozen=True, slots=True)
class Run:
    """Data shared by all rounds of a run."""

    path: Path
    pool: str
    records: Mapping[str, Mapping[str, Any]]
    """The pool's canonical records by id."""
    benchmarks: Mapping[str, Sequence[Mapping[str, Any]]]
    settings: RoundSettings
    dtype: str
    export: Path | None

    @property
    def parts(self) -> list[Part]:
        return parts_of(self.settings.selector)

    @property
    def needs_rows(self) -> bool:
        """Whether the selector uses gradients, probes or pass rates of this step."""
        return any(not part.selector.whole_pool or part.selector.needs_probes for part in self.parts)

    @property
    def needs_probes(self) -> bool:
        return any(part.selector.needs_probes for part in self.parts)

    @property
    def needs_target(self) -> bool:
        return self.needs_probes or any(part.selector.needs_target for part in self.parts)

    def open(self, policy: Policy) -> Store | None:
        """Open the run's store and give its sketcher to the policy; None if there is no store yet."""
        if not (self.path / "zarr.json").exists():
            return None
        store = gradstore.open(self.path, "a")
        files = files_in(store)
        policy.use(files.fingerprint, files.attachments)
        self.add_problems(store)
        return store

    def add_problems(self, store: Store) -> None:
        store.add_problems(self.pool, map(dict, self.records.values()))
        for name, records in self.benchmarks.items():
            store.add_problems(name, map(dict, records))


class RoundRunner:
    """One round of a run."""

    def __init__(self, run: Run, policy: Policy, number: int) -> None:
        settings = run.settings
        assert settings.candidates is not None
        assert settings.selected is not None
        self.context, self.policy, self.number, self.settings = run, policy, number, settings
        self.step, self.n = policy.step, settings.selected
        self.costs, self.warnings = Costs(), []  # type: Costs, list[str]
        self.warm_up = number < settings.warm_up
        self.fits = number == 0 and run.needs_rows and settings.spec.basis == "fitted"
        self.budget = settings.budget(number)
        ids = np.array(list(run.records), dtype=object)
        self.candidates: list[str] = ids[self._random(_DRAW).permutation(len(ids))[: settings.candidates]].tolist()
        self.measures = run.needs_rows and not self.warm_up
        looks = self.measures and self.budget is not None and number == settings.warm_up
        self.look = settings.first_look if looks else 0
        aims = self.measures and (run.needs_target or (self.budget is not None and bool(run.benchmarks)))
        self.windows_of = {
            name: self._windows(records, settings.target_rollouts, (_BENCHMARK, i), name)
            for i, (name, records) in enumerate(run.benchmarks.items() if aims else ())
        }
        self.target_key = "+".join(self.windows_of)
        self.plans: list[Plan] = []
        self.targets: list[Target] = []
        self._toward: ForecastTarget | None = None
        self.refreshed: dict[str, Any] = {}

    def make_store(self) -> tuple[Store, Windows | None]:
        """A new store for the policy's sketches, and the first candidates' rollouts if the basis was fitted to them.

        RequestError if the sketches see too little of the gradient (setting `accept_coverage`).
        """
        run, settings = self.context, self.settings
        if self.fits:
            windows = self._plan_windows(self.candidates if self.look else self._first_plan(None), 0)
            benchmark = [
                group for own in self.windows_of.values() for w in range(len(own)) for group in own.groups(w, keep=True)
            ]
            window, groups = 0, list[Group]()
            while window < len(windows) and sum(group.has_signal for group in groups) < settings.fit_problems:
                groups += windows.groups(window, keep=True)
                window += 1
            with self.costs.stage("fit"):
                files = self.policy.fit(settings.spec, groups, benchmark)
            first: Windows | None = windows
        else:
            # Without rollouts no basis can be fitted: use a seeded one of the same size for observed rollouts.
            spec = settings.spec if settings.spec.basis != "fitted" else replace(settings.spec, basis="dense")
            files, first = self.policy.fit(spec, []), None
        if files.coverage is None:
            log.warning("%s: the policy did not measure what its sketches see of the gradient", run.path)
        else:
            log.info("%s: %s", run.path, files.coverage.sentence())
            files.coverage.require(least_of(settings.spec, settings.accept_coverage), "round setting accept_coverage=")
        store = create_from(run.path, files, run.dtype)
        run.add_problems(store)
        return store, first

    def run(self, store: Store, first: Windows | None = None) -> None:
        """Do the round, or the rest of an interrupted one, and record it in the store."""
        run = self.context
        journal = Journal(store, run.pool, self.number, self.step, self.target_key)
        if run.needs_probes and self.windows_of:
            sketch_benchmarks(store, self.windows_of, self.policy, self.costs)
        else:
            for name, windows in self.windows_of.items():
                sketch_collection(store, name, windows, self.policy, self.costs)
        with self.costs.stage("target"):
            self._aim(store)
        parts, probes = run.parts, None
        if run.needs_target and not self.warm_up and not self.targets:
            self._warn("no problem of any benchmark has a signal: this round picks at random")
            parts = parts_of("rand")
        elif self.warm_up:
            parts = parts_of("rand")
        if self.measures or (self.fits and (journal.plans or not store.steps(run.pool))):
            self._refresh(store, journal, first)
        with self.costs.stage("select"):
            now = self._forecast(store)
            if run.needs_probes and self.targets and not self.warm_up:
                if journal.probes:
                    probes = ProbeBatch.load(store, run.pool, step=self.step, target=self.target_key)
                else:
                    self._warn("no candidate is expected to have a signal, none was probed: this round picks at random")
                    parts = parts_of("rand")
            if self.budget is not None and self.measures and now.cosine.model is not None:
                parts = aged_parts(parts, now, self._length(), self.settings.confidence)
                probes = None if probes is None else with_old_sketches(probes, now, self._scale())
            scored, chosen = self._select(store, parts, probes)
            filled = self._fill(now, chosen)
        self._record(store, now, scored, chosen, filled, journal.calibration)
        journal.close()

    def _aim(self, store: Store) -> None:
        for name in self.windows_of:
            view = store.view(name, self.step)
            if not view.live.any():
                self._warn(f"no problem of benchmark {name!r} has a signal: it is left out of this round")
                continue
            self.targets.append(target(store, name, self.step, self.settings.aggregate))

    def _refresh(self, store: Store, journal: Journal, first: Windows | None) -> None:
        """Measure the planned candidates: a first look at all (first round only), then the chosen ones, then, with a
        budget, those whose interval straddles the cut."""
        probes = self.context.needs_probes and bool(self.targets)
        like = self._calibration_before(store) if probes else None
        measured = Measured(store, self.context.pool, self.policy, journal, self.costs, probes, like)
        joins = self.budget is not None and self.settings.boundary > 0
        if self.look:
            plan = journal.plan(0, lambda: self._unmeasured(store))
            self.plans.append(plan)
            measured.run(plan, first or self._plan_windows(plan.ids, 0), self.target_key, keep=True, probe=False)
            first = None
        number = len(self.plans)
        plan = journal.plan(number, lambda: self._first_plan(store))
        self.plans.append(plan)
        measured.run(plan, first or self._plan_windows(plan.ids, number), self.target_key, keep=joins)
        if self.budget is None or not self.measures or not self.targets:
            return
        settled = False
        while self.settings.boundary > 0 and not settled:
            number = len(self.plans)
            left = self.budget - sum(len(plan.ids) for plan in self.plans[int(self.look > 0) :])
            if left <= 0:
                break
            plan = journal.plan(number, lambda left=left: self._at_the_cut(store, left))  # type: ignore[misc]
            settled = not plan.ids
            if not settled:
                self.plans.append(plan)
                measured.run(plan, self._plan_windows(plan.ids, number), self.target_key, keep=True)
        self.refreshed["settled"] = settled

    def _calibration_before(self, store: Store) -> Calibration | None:
        """Calibration of the previous round's probe; None if there is none."""
        kept = store.round(self.context.pool, self.number - 1).about.get("probe") if self.number else None
        return None if kept is None else Calibration.of(kept)

    def _unmeasured(self, store: Store) -> list[str]:
        """Candidates that have no row yet."""
        known = set(store.view(self.context.pool, self.step).ids.tolist())
        return [name for name in self.candidates if name not in known]

    def _first_plan(self, store: Store | None) -> list[str]:
        """The candidates to roll out first at this step. store: None if it does not exist yet."""
        settings = self.settings
        if not self.measures:
            return self.candidates[: settings.fit_problems]
        if self.budget is None:
            return self.candidates
        with self.costs.stage("plan"):
            n, budget = len(self.candidates), self.budget
            if store is None:
                zeros, never = np.zeros(n), np.zeros(n, bool)
                outlook = Outlook(zeros, np.ones(n), zeros, np.ones(n), never, never)
            else:
                now = self._forecast(store)
                self.refreshed["before"] = None if now.cosine.model is None else now.cosine.model.describe()
                outlook = now.outlook(self._kind(), settings.rollouts)
            at_once = budget - round(settings.boundary * budget) if outlook.pickable.any() else budget
            places = choose(outlook, self.n, at_once, settings.explore, settings.max_no_signal, self._random(_PLAN))
            return [self.candidates[place] for place in places]

    def _at_the_cut(self, store: Store, left: int) -> list[str]:
        """The next candidates near the cut to roll out (again); an empty list when the picks are settled."""
        assert self.budget is not None
        with self.costs.stage("plan"):
            now = self._forecast(store)
            mean_P, sd_P = aged_scores(self._kind(), now)
            unsure = straddling(
                mean_P, sd_P, now.outlook(self._kind(), self.settings.rollouts).noise, self.n, self.settings.confidence
            )
            open_P = now.fresh | (1 - now.signal <= self.settings.max_no_signal)
            unsure = unsure[open_P[unsure]]
            batch = max(1, round(self.settings.boundary * self.budget / _BATCHES))
            return [self.candidates[place] for place in unsure[: min(left, batch)]]

    def _kind(self) -> str:
        """Scale of the scores: "cosine" if every part of the selector ranks by cosine, else "dot"."""
        return "cosine" if all(part.selector.name == "cosine" for part in self.context.parts) else "dot"

    def _forecast(self, store: Store) -> CandidateForecast:
        settings, toward = self.settings, None
        if self.budget is not None and self.targets:
            self._toward = self._toward or ForecastTarget.of(
                store, self.context.pool, list(self.windows_of), [goal.vector for goal in self.targets], self.step
            )
            toward = self._toward
        wanted = ForecastSettings(settings.rollouts, settings.forgetting, settings.by_source)
        return forecast_candidates(store, self.context.pool, self.candidates, self.step, wanted, toward)

    def _length(self) -> float:
        """Norm of the target as the selectors see it."""
        vectors = [goal.vector for goal in self.targets]
        return float(np.linalg.norm(vectors[0].astype(np.float64) if len(vectors) == 1 else sum_of_units(vectors)))

    def _scale(self) -> float:
        """Factor from a sketch's norm x cosine to a probe's dot: the mean target's norm.

        0 for several targets or another `aggregate`, where no such factor exists.
        """
        return self._length() if len(self.targets) == 1 and self.settings.aggregate == "mean" else 0.0

    def _select(self, store: Store, parts: list[Part], probes: ProbeBatch | None) -> tuple[Selection, Selection]:
        """All candidates ranked by the selector alone, and the picks."""
        settings = self.settings
        common: dict[str, Any] = {
            "at": self.step,
            "candidates": self.candidates,
            "seed": self._seed(_SELECT),
            "allow_fewer": True,
            "probes": probes,
            "confidence": settings.confidence,
            "forgetting": settings.forgetting,
        }
        scored = select(store, self.context.pool, self.targets or None, len(self.candidates), parts, **common)
        chosen = select(
            store,
            self.context.pool,
            self.targets or None,
            self.n,
            parts,
            **common,
            diversity=settings.diversity,
            temperature=settings.temperature,
            quotas=settings.quotas,
        )
        return scored, chosen

    def _fill(self, now: CandidateForecast, chosen: Selection) -> list[str]:
        """Random picks if too few candidates can be ranked: never measured ones first, then any others not picked."""
        missing = self.n - len(chosen)
        if missing <= 0:
            return []
        self._warn(
            f"only {len(chosen)} candidates could be ranked: {missing} of the {self.n} picks were drawn at random"
        )
        taken = set(chosen.ids)
        order = self._random(_FILL).permutation(len(self.candidates)).tolist()
        order.sort(
            key=lambda place: now.newest.states[place] >= 0
        )  # stable: never measured ones come first, still shuffled
        return [self.candidates[place] for place in order if self.candidates[place] not in taken][:missing]

    def _record(
        self,
        store: Store,
        now: CandidateForecast,
        scored: Selection,
        chosen: Selection,
        filled: list[str],
        calibration: Calibration | None,
    ) -> None:
        rolled_out = {name for plan in self.plans for name in plan.ids}
        table = round_table(now, scored, chosen, filled, rolled_out)
        about = about_round(
            run_settings=self.settings,
            number=self.number,
            step=self.step,
            warm_up=self.warm_up,
            benchmarks=list(self.context.benchmarks),
            targets=[goal.describe() for goal in self.targets],
            now=now,
            chosen=chosen,
            filled=filled,
            n_rolled_out=len(rolled_out),
            rollouts=sum(self._rollouts(number) * len(plan.ids) for number, plan in enumerate(self.plans)),
            target_rollouts=self.settings.target_rollouts
            * sum(len(self.context.benchmarks[name]) for name in self.windows_of),
            seconds=self.costs.seconds,
            tokens=self.costs.tokens,
            probe=None if calibration is None else calibration.describe(),
            refreshed=self.refreshed,
            warnings=self.warnings,
        )
        for line in about["warnings"]:
            log.warning("round %d: %s", self.number, line)
        store.add_round(self.context.pool, about, table)

    def _plan_windows(self, ids: Sequence[str], number: int) -> Windows:
        records = [self.context.records[name] for name in ids]
        return self._windows(records, self._rollouts(number), (_POOL, number), f"{self.context.pool}-{number}")

    def _rollouts(self, number: int) -> int:
        """Rollouts per problem in the round's plan `number`."""
        return self.look if self.look and number == 0 else self.settings.rollouts

    def _windows(self, records: Sequence[Mapping[str, Any]], n: int, seed: tuple[int, ...], name: str) -> Windows:
        export = None if self.context.export is None else self.context.export / f"round-{self.number:04d}-{name}"
        settings = self.settings
        return Windows(
            self.policy, records, n, settings.window, (settings.seed, self.number, *seed), self.costs, export
        )

    def _seed(self, purpose: int) -> int:
        return derived_seed(self.settings.seed, self.number, purpose)

    def _random(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng(self._seed(purpose))

    def _warn(self, line: str) -> None:
        self.warnings.append(line)
