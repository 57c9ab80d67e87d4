"""The selection methods compared. All except the oracle are gradstore's rounds with one or two settings changed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.study.ablations import PARTS, WITHOUT
from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.rollouts.group import Group
from gradstore.engine.selecting.rollout_rules import ROLLOUT_RULES
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.errors import RequestError
from gradstore.trainer.round.weighing import Weighed
from gradstore.trainer.sampling.backends import derived_seed


@dataclass(frozen=True, slots=True)
class Method:
    """A selection method."""

    title: str
    rounds: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the round that differ from the study's."""
    without: str | None = None
    """Part of the forecast taken out (ablations.py)."""
    solutions: bool = False
    """Whether the target is of the benchmark's reference solutions."""


ORACLE = "oracle"

METHODS: dict[str, Method] = {
    ORACLE: Method("clean problems of the target family, known beforehand"),
    "random": Method("uniform", {"selector": "rand"}),
    "accgreedy": Method("pass rate nearest to 1/2", {"selector": "accgreedy"}),
    "dynamic": Method("uniform among those with a signal (DAPO)", {"selector": "dynamic"}),
    "dapo": Method(
        "DAPO's filter: each round 12 problems drawn at random are rolled out; uniform among those with a signal",
        {"selector": "dynamic", "candidates": 12},
    ),
    "learnalign": Method(
        "LearnAlign: one random round as warm-up, then one static choice",
        {"selector": "learnalign", "warm_up": 1, "once": True},
    ),
    "gradalign": Method("GradAlign: cosine, everything rolled out anew", {"selector": "cosine"}),
    "dot": Method("sketched dot product", {"selector": "dot"}),
    "snr": Method("probe: dot over its standard error", {"selector": "snr"}),
    "lcb": Method("probe: lower confidence bound", {"selector": "lcb"}),
    "shrunk": Method("probe: empirical Bayes", {"selector": "shrunk"}),
    "fdr": Method("probe: false-discovery cut, then dot", {"selector": "fdr"}),
    "refresh0-dot": Method(
        "sketched dot product, no candidate rolled out after the first look: rows of training rollouts",
        {"selector": "dot", "refresh": 0, "observe": "last"},
    ),
    "pilot": Method(
        "as Pilot-Commit: each round 4 rollouts of each of 64 problems drawn at random, those nearest to p = 1/2 "
        "are trained on (the 4 are not)",
        {"selector": "accgreedy", "candidates": 64, "rollouts": 4},
    ),
}

SOLUTIONS = "@solutions"
"""After a method whose target is of the benchmark's reference solutions: no rollouts of the benchmark."""

BUDGETED = "budgeted"
"""Name prefix of methods with a budgeted refresh: `budgeted-lcb` picks by `lcb`; `budgeted/4-lcb` has a quarter of the
budget."""


ROLLOUTS = (
    *("random*13", "random+dtv*13", "random+dtv_loo*13", "random+oppose_target*11", "random+oppose_target_soft*11"),
    *("budgeted/4-lcb+oppose_target", "budgeted/4-lcb+dtv_loo", "refresh0-dot*10", "pilot*11"),
    f"refresh0-dot{SOLUTIONS}*12",
)
"""Methods with the rollout as unit, and others that spend few rollouts on selection, with as many rounds as bring their
total to that of `budgeted/4-lcb` or more."""

DENSE = SketchSpec(basis="dense", rank=64, dim=2048)
"""Sketches of rollouts where no candidate is rolled out to fit a projection to: a dense one needs a higher rank."""

RULE, ROUNDS, EVERY = "+", "*", "%"
"""Before the rollout rule that a method is joined with, before its number of rounds, and before the number of rounds
between two measurements of the benchmark."""


def method(name: str, budgeted: Mapping[str, int]) -> Method:
    """The method of this name. `budgeted-SELECTOR` has the round settings `budgeted`; `budgeted/N-SELECTOR` has 1/N of
    their budget; `METHOD~PART` does without a part of the forecast; `METHOD+RULE` weighs the rollouts of training steps
    by a rule; `METHOD@solutions` aims at the benchmark's solutions; `METHOD%N` measures the benchmark every N rounds;
    `METHOD*N` has N rounds. RequestError for an
    unknown name."""
    whole, _, rounds = name.partition(ROUNDS)
    if rounds:
        if not rounds.isdecimal() or int(rounds) < 1:
            raise RequestError(f"method {name!r}: {rounds!r} is no number of rounds")
        about = method(whole, budgeted)
        return replace(about, title=f"{about.title}; {rounds} rounds", rounds={**about.rounds, "rounds": int(rounds)})
    whole, _, every = name.partition(EVERY)
    if every:
        if not every.isdecimal() or int(every) < 2:
            raise RequestError(f"method {name!r}: {every!r} is no number of rounds of 2 or more")
        about = method(whole, budgeted)
        title = f"{about.title}; the benchmark measured every {every} rounds"
        return replace(about, title=title, rounds={**about.rounds, "target_every": int(every)})
    whole, _, rule = name.partition(RULE)
    if rule:
        about, own = method(whole, budgeted), ROLLOUT_RULES[rule]
        aimed = {"target_rollouts": budgeted["target_rollouts"]} if own.needs_target else {}
        title = f"{about.title}; each rollout of a training step weighed by `{rule}`: {own.formula}"
        finer = {"spec": DENSE} if about.rounds.get("selector") == "rand" else {}
        return replace(about, title=title, rounds={**finer, **aimed, **about.rounds, "rollout_rule": rule})
    if name.endswith(SOLUTIONS):
        about = method(name.removesuffix(SOLUTIONS), budgeted)
        return replace(about, title=f"{about.title}; target from reference solutions", solutions=True)
    if name == "refresh0-dot":
        own_settings = {name: budgeted[name] for name in ("first_look", "target_rollouts")}
        return replace(METHODS[name], rounds={**METHODS[name].rounds, **own_settings})
    whole, _, part = name.partition(WITHOUT)
    if part:
        if part not in PARTS:
            raise RequestError(f"method {name!r}: the forecast has no part {part!r}, only {', '.join(PARTS)}")
        about = method(whole, budgeted)
        return replace(about, title=f"{about.title}; {PARTS[part][0]}", without=part)
    if name in METHODS:
        return METHODS[name]
    parts = re.fullmatch(rf"{BUDGETED}(?:/([1-9]\d*))?-(.+)", name)
    if parts is None:
        raise RequestError(f"method {name!r} is not one of {', '.join(METHODS)} or {BUDGETED}[/N]-SELECTOR")
    share, selector = int(parts[1] or 1), parts[2]
    own = {**budgeted, "refresh": max(1, budgeted["refresh"] // share)}
    title = (
        f"{selector}, {own['refresh']} problems rolled out anew in a round, {own['first_look']} rollouts of "
        f"each before the first plan, {own['target_rollouts']} a round of each of the benchmark's"
    )
    return Method(title, {"selector": selector, "observe": "last", **own})


@dataclass(frozen=True, slots=True)
class Chosen:
    """Picks of the oracle."""

    ids: list[str]
    rollouts: np.ndarray
    relative_weights: np.ndarray


class Oracle:
    """Picks random problems among the useful ones, with the interface of `Rounds`."""

    def __init__(self, useful: Sequence[str], n: int, seed: int) -> None:
        """useful: ids of the useful problems."""
        self._useful = list(useful)
        self._n, self._seed, self._done = n, seed, 0
        if len(self._useful) < n:
            raise RequestError(f"the pool has {len(self._useful)} useful problems, the oracle picks {n}")

    def next(self, policy: Any) -> Chosen:
        random = np.random.default_rng(derived_seed(self._seed, self._done))
        self._done += 1
        picks = random.permutation(len(self._useful))[: self._n]
        return Chosen([self._useful[i] for i in picks], np.zeros(self._n, np.int64), np.ones(self._n))

    def observe(self, policy: Any, seen: Sequence[Group] | SketchBatch) -> None:
        """Do nothing: the oracle stores no rollouts."""

    def weigh(
        self, policy: Any, groups: Sequence[Group], factors: Sequence[float] | None, objective: Objective
    ) -> Weighed:
        raise RequestError("the oracle has no sketches to weigh rollouts by")

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._done = int(state["rounds"])
