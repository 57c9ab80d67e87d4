"""A feed gives a trainer the ids of the problems to train on, and takes back what became of them.

    feed = RoundFeed(rounds, policy)              # the policy can be called: rounds measure it (docs/rounds.md)
    feed = StoreFeed(settings, records)           # it cannot: picks from a store that others add to
    feed = OwnerFeed(owner, ids, draws=320)       # the same through the owner of a store (store_actor.py)
    while training:
        ids = feed.draw(batch)
        ...                                       # sample, score, update
        feed.observe(groups, step)
        save(weights, feed.state_dict())

This is all that an adapter to a trainer needs to know (docs/trainers.md; trainer/adapters has some).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import gradstore
from gradstore.engine.rollouts.group import Group
from gradstore.engine.rollouts.write import write_rollouts
from gradstore.engine.searching.targets import target
from gradstore.engine.selecting.selection import Selection, select
from gradstore.errors import RequestError
from gradstore.trainer.round.driver import Rounds
from gradstore.trainer.round.measuring import rollouts_of
from gradstore.trainer.round.policy import Policy
from gradstore.trainer.sampling.backends import derived_seed


class Feed(Protocol):
    """Ids out, outcomes in, state to save."""

    def draw(self, n: int) -> list[str]:
        """Ids of the next n problems to train on. Chooses anew when the picks are used up."""
        ...

    def weight(self, problem_id: str) -> float:
        """Factor of a picked problem's loss; the picks' mean is 1."""
        ...

    def observe(self, groups: Sequence[Group], step: int) -> None:
        """Take a step's rollouts, one group per problem. step: training steps done by the policy that sampled them."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State to save with the trainer's checkpoint, as JSON-able values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; RequestError if it is of another pool."""
        ...


class _Drawn:
    """The picks in drawing order, and how many of them are drawn."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._pool = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
        self._order: list[str] = []
        self._n_drawn = self._choices = 0
        self._weights: dict[str, float] = {}

    def draw(self, n: int) -> list[str]:
        found: list[str] = []
        while len(found) < n:
            if self._n_drawn == len(self._order):
                picks, n_draws, seed = self._choose(self._choices)
                self._order, self._n_drawn = drawing_order(picks.ids, n_draws, seed), 0
                weights = zip(picks.ids, picks.relative_weights.tolist(), strict=True)
                self._weights = {name: weight for name, weight in weights if weight != 1}
                self._choices += 1
            more = self._order[self._n_drawn : self._n_drawn + n - len(found)]
            self._n_drawn += len(more)
            found += more
        return found

    def weight(self, problem_id: str) -> float:
        return self._weights.get(problem_id, 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "pool": self._pool,
            "order": list(self._order),
            "drawn": self._n_drawn,
            "weights": dict(self._weights),
            "choices": self._choices,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not {"pool", "order", "drawn", "weights", "choices"} <= state.keys():
            raise RequestError("this is not a state of a feed: it has no member `order` or `drawn`")
        if state["pool"] != self._pool:
            raise RequestError("the saved state is of another pool: other problems, or in another order")
        self._order, self._n_drawn = list(state["order"]), int(state["drawn"])
        self._weights, self._choices = dict(state["weights"]), int(state["choices"])

    def _choose(self, number: int) -> tuple[Selection, int, int]:
        """Choice `number`: the picks, how many draws to make of them, and a seed for their order."""
        raise NotImplementedError


class RoundFeed(_Drawn):
    """Picks of rounds, which measure the policy when they are due."""

    def __init__(self, rounds: Rounds, policy: Policy) -> None:
        """RequestError for rounds with a `rollout_rule`: a feed has one weight for a problem's rollouts."""
        super().__init__(rounds.ids)
        if rounds.settings.rollout_rule is not None:
            raise RequestError(
                f"rollout_rule {rounds.settings.rollout_rule!r}: a feed weighs problems alone; leave it out"
            )
        self._rounds, self._policy = rounds, policy

    def observe(self, groups: Sequence[Group], step: int) -> None:
        """Sketch the step's rollouts, if the rounds keep those of this step; before the update."""
        if step != self._policy.step:
            raise RequestError(f"rollouts of step {step} come when the policy is at step {self._policy.step}")
        if self._rounds.settings.observes(self._n_drawn, len(set(self._order))):
            self._rounds.observe(self._policy, groups)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rounds": self._rounds.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._rounds.load_state_dict(state["rounds"])

    def _choose(self, number: int) -> tuple[Selection, int, int]:
        settings = self._rounds.settings
        picks = self._rounds.next(self._policy)
        return picks, settings.train_batch * settings.steps, derived_seed(settings.seed, number)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFeedSettings:
    """Settings of picks from a store."""

    store: Path
    """Store to select from; it may grow during the run."""
    selected: int
    """Problems picked per choice."""
    draws: int
    """Problems drawn until the next choice, a multiple of `selected`."""
    selector: str = "cosine"
    """Any of engine.SELECTORS, or a mixture."""
    pool: str = "pool"
    """The pool's collection in the store."""
    benchmarks: tuple[str, ...] = ()
    """Collections whose gradients are the targets."""
    seed: int = 0
    """Seed; every random draw depends only on it and the choice's number."""
    rollouts: Path | None = None
    """Folder for each step's rollouts, `step-000000.jsonl` and so on, for `gradstore collect`; None: keep none."""


class StoreFeed(_Drawn):
    """Picks from a store's newest rows, for trainers whose data source cannot reach the policy.

    Sketches are made outside: each step's rollouts are written to a file, and `gradstore collect` sketches them with a
    saved checkpoint, at any pace.
    """

    def __init__(self, settings: StoreFeedSettings, records: Sequence[Mapping[str, Any]]) -> None:
        """records: canonical records of the problems to train on. RequestError for settings that do not fit, and for a
        store without the pool or a benchmark."""
        super().__init__([record["id"] for record in records])
        self._settings, self._records = settings, {record["id"]: record for record in records}
        if settings.selected < 1 or settings.draws % settings.selected:
            raise RequestError(f"draws is {settings.draws}, expected a multiple of the {settings.selected} selected")
        store = gradstore.open(settings.store)
        for name in (settings.pool, *settings.benchmarks):
            if name not in store.collections:
                raise RequestError(f"{store.path} has no collection {name!r}: make it with `gradstore collect`")

    def observe(self, groups: Sequence[Group], step: int) -> None:
        """Write the step's rollouts to a file, whole or not at all; RequestError for an unknown problem."""
        if self._settings.rollouts is None or not groups:
            return
        unknown = [group.problem_id for group in groups if group.problem_id not in self._records]
        if unknown:
            raise RequestError(f"problem {unknown[0]!r} is not in the pool")
        self._settings.rollouts.mkdir(parents=True, exist_ok=True)
        path = self._settings.rollouts / f"step-{step:06d}.jsonl"
        if path.exists():
            return  # written before an interruption, by the same policy
        unfinished = path.with_name(f"unfinished-{path.name}")
        with write_rollouts(unfinished) as writer:
            writer.append(rollouts_of([self._records[group.problem_id] for group in groups], groups, step))
        unfinished.replace(path)

    def _choose(self, number: int) -> tuple[Selection, int, int]:
        settings, seed = self._settings, derived_seed(self._settings.seed, number)
        store = gradstore.open(settings.store)
        here = [name for name in store.view(settings.pool).ids.tolist() if name in self._records]
        targets = [target(store, name) for name in settings.benchmarks]
        picks = select(store, settings.pool, targets, settings.selected, settings.selector, candidates=here, seed=seed)
        return picks, settings.draws, seed


class Picking(Protocol):
    """What gives a round's picks by number: `store_actor.Owner`, for example."""

    def picks(self, number: int) -> Selection:
        """The picks of round `number`; the same whenever it is asked again."""
        ...


class OwnerFeed(_Drawn):
    """Picks of a store's owner, for trainers on other nodes; each choice is a round of the store."""

    def __init__(self, owner: Picking, ids: Sequence[str], *, draws: int, seed: int = 0) -> None:
        """ids: of the problems that the trainer has. draws: problems drawn until the next choice, a multiple of the
        owner's `selected`. seed: of the drawing order."""
        super().__init__(ids)
        self._owner, self._ids, self._draws, self._seed = owner, set(ids), draws, seed

    def observe(self, groups: Sequence[Group], step: int) -> None:
        """Nothing: the owner gets sketches by `push`, from whatever process has the policy."""

    def _choose(self, number: int) -> tuple[Selection, int, int]:
        picks = self._owner.picks(number)
        unknown = [name for name in picks.ids if name not in self._ids]
        if unknown:
            raise RequestError(f"the store's owner picked problem {unknown[0]!r}, which this trainer does not have")
        return picks, self._draws, derived_seed(self._seed, number)


def drawing_order(picks: Sequence[str], n_draws: int, seed: int) -> list[str]:
    """Repeat the picks until there are n_draws ids, each pass shuffled differently.

    RequestError unless n_draws is a multiple of the number of picks, so that each is trained on equally often.
    """
    if not len(picks) or n_draws % len(picks):
        raise RequestError(f"{n_draws} draws are not a multiple of {len(picks)} picks")
    random = np.random.default_rng([seed, 0x0D7A])
    return [picks[i] for _ in range(n_draws // len(picks)) for i in random.permutation(len(picks)).tolist()]
