"""Run of rounds, and the scope of one round: everything that is known before its first rollout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import gradstore
from gradstore import Store
from gradstore.engine.selecting.mixture import Part, parts_of
from gradstore.engine.selecting.rollout_rules import ROLLOUT_RULES
from gradstore.engine.sketches.bases import files_in
from gradstore.trainer.round.drawing import chunk, independent, shuffled
from gradstore.trainer.round.policy import Policy
from gradstore.trainer.round.records import Records
from gradstore.trainer.round.settings import RoundSettings
from gradstore.trainer.sampling.backends import derived_seed

DRAW, BENCHMARK, POOL, PLAN, SELECT, FILL = range(6)
"""Purposes of derived seeds."""


@dataclass(frozen=True, slots=True)
class Run:
    """Data shared by all rounds of a run."""

    path: Path
    pool: str
    records: Records
    """The pool's problems."""
    benchmarks: Mapping[str, Sequence[Mapping[str, Any]]]
    settings: RoundSettings
    dtype: str
    export: Path | None
    _orders: dict[int, list[str]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def order(self) -> list[str]:
        """Ids of the pool in the order of its chunks; made once."""
        seed = self.settings.seed
        if seed not in self._orders:
            self._orders[seed] = shuffled(self.records, seed)
        return self._orders[seed]

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

    @property
    def weighs_by_target(self) -> bool:
        """Whether rollouts of training steps are weighed by the target."""
        rule = self.settings.rollout_rule
        return rule is not None and ROLLOUT_RULES[rule].needs_target

    @property
    def kind(self) -> str:
        """Scale of the scores: "cosine" if every part of the selector ranks by cosine, else "dot"."""
        return "cosine" if all(part.selector.name == "cosine" for part in self.parts) else "dot"

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
        store.add_problems(self.pool, map(dict, self.records.given))
        for name, records in self.benchmarks.items():
            store.add_problems(name, map(dict, records))


@dataclass(frozen=True, slots=True)
class Scope:
    """What one round of a run does."""

    run: Run
    number: int
    step: int
    candidates: list[str]
    """Ids of the problems drawn from the pool, in the order of the draw."""
    n_picks: int
    budget: int | None
    """Number of candidates that may be measured; None: all."""
    warm_up: bool
    """Whether the round picks at random, without rollouts of candidates."""
    measures: bool
    """Whether candidates are measured to pick from them."""
    fits: bool
    """Whether a new store's projection is fitted to rollouts of candidates."""
    look: int
    """Rollouts per candidate without a row, as plan 0; 0: no such plan."""
    benchmarks: list[str]
    """Benchmarks that are aimed at."""
    measures_target: bool
    """Whether the benchmarks are measured; if not, older rows give the target."""

    @classmethod
    def of(cls, run: Run, number: int, step: int) -> "Scope":
        """The scope of round `number` for the policy of a step."""
        settings = run.settings
        assert settings.candidates is not None
        assert settings.selected is not None
        if settings.draw == "chunks":
            candidates = chunk(run.order, settings.candidates, number)
        else:
            candidates = independent(list(run.records), settings.candidates, derived_seed(settings.seed, number, DRAW))
        warm_up, budget = number < settings.warm_up, settings.budget(number)
        measures = run.needs_rows and not warm_up
        looks = measures and budget is not None and number == settings.warm_up
        aims = run.weighs_by_target or (measures and (run.needs_target or budget is not None))
        aims_from = 0 if run.weighs_by_target else settings.warm_up
        return cls(
            run,
            number,
            step,
            candidates=candidates,
            n_picks=settings.selected,
            budget=budget,
            warm_up=warm_up,
            measures=measures,
            fits=number == 0 and run.needs_rows and settings.spec.basis == "fitted",
            look=settings.first_look if looks else 0,
            benchmarks=list(run.benchmarks) if aims else [],
            measures_target=aims and (number - aims_from) % settings.target_every == 0,
        )

    @property
    def settings(self) -> RoundSettings:
        return self.run.settings

    @property
    def target(self) -> str:
        """Name under which probes are stored."""
        return "+".join(self.benchmarks)

    def rollouts(self, plan: int) -> int:
        """Rollouts per problem in plan number `plan`."""
        return self.look if self.look and plan == 0 else self.settings.rollouts

    def seed(self, purpose: int) -> int:
        return derived_seed(self.settings.seed, self.number, purpose)

    def random(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng(self.seed(purpose))
