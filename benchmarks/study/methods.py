"""The selection methods compared. All except the oracle are gradstore's rounds with one or two settings changed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.study.ablations import PARTS, WITHOUT
from benchmarks.study.arms import is_useful
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.spec import SketchBatch
from gradstore.errors import RequestError
from gradstore.trainer.sampling.backends import derived_seed


@dataclass(frozen=True, slots=True)
class Method:
    """A selection method."""

    title: str
    rounds: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the round that differ from the study's."""
    without: str | None = None
    """Part of the forecast taken out (ablations.py)."""


ORACLE = "oracle"

METHODS: dict[str, Method] = {
    ORACLE: Method("clean problems of the target family, known beforehand"),
    "random": Method("uniform", {"selector": "rand"}),
    "accgreedy": Method("pass rate nearest to 1/2", {"selector": "accgreedy"}),
    "dynamic": Method("uniform among those with a signal (DAPO)", {"selector": "dynamic"}),
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
}

DEFAULT_METHODS = (
    *("oracle", "random", "accgreedy", "gradalign", "lcb", "budgeted-lcb", "fdr", "dot", "shrunk", "snr"),
    *("dynamic", "learnalign", "budgeted/2-lcb", "budgeted/4-lcb"),
)
"""Default methods, in running order."""

BUDGETED = "budgeted"
"""Name prefix of methods with a budgeted refresh: `budgeted-lcb` picks by `lcb`; `budgeted/4-lcb` has a quarter of the
budget."""


def method(name: str, budgeted: Mapping[str, int]) -> Method:
    """The method of this name. `budgeted-SELECTOR` has the round settings `budgeted`; `budgeted/N-SELECTOR` has 1/N of
    their budget; `METHOD~PART` does without a part of the forecast. RequestError for an unknown name."""
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

    def __init__(self, pool: Sequence[Mapping[str, Any]], n: int, seed: int) -> None:
        self._useful = [record["id"] for record in pool if is_useful(record)]
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

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._done = int(state["rounds"])
