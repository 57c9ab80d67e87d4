"""Rounds of selection during training, the same for every trainer.

    rounds = Rounds("run/store", pool, {"amc": problems}, settings)
    while training:
        picks = rounds.next(policy)             # before the first step of each round
        ...                                     # settings.steps training steps on the picks
        rounds.observe(policy, groups)          # keep the step's own rollouts, or their sketches

The store holds a round's decisions when `next` returns. A resumed process needs only the store and the trainer's
checkpoint: killed at any moment, it makes the same picks as an uninterrupted run. A recorded round is read back; an
interrupted one is completed. docs/rounds.md explains rounds in full.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradstore
from gradstore import Round, Store
from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.rollouts.group import Group
from gradstore.engine.rollouts.solutions import solution_text
from gradstore.engine.searching.targets import kind_of
from gradstore.engine.selecting.selection import Selection
from gradstore.engine.sketches.spec import SketchBatch
from gradstore.errors import RequestError
from gradstore.layout import SOLUTIONS, check_name
from gradstore.trainer.loggers import Log, log_of
from gradstore.trainer.round.measuring import Costs, append, ids_at_step, publish
from gradstore.trainer.round.policy import Policy, ReadsSolutions
from gradstore.trainer.round.recorded import selection_of
from gradstore.trainer.round.recording import scalars
from gradstore.trainer.round.records import Records
from gradstore.trainer.round.run import Run
from gradstore.trainer.round.runner import RoundRunner
from gradstore.trainer.round.settings import RoundSettings
from gradstore.trainer.round.weighing import Weighed, weigh

_FREE = ("rounds", "window", "observe", "accept_coverage")
"""Settings that may change when a run is resumed."""


class Rounds:
    """The rounds of one training run and the store they live in."""

    def __init__(
        self,
        store: str | Path,
        pool: Sequence[Mapping[str, Any]],
        benchmarks: Mapping[str, Sequence[Mapping[str, Any]]],
        settings: RoundSettings,
        *,
        name: str = "pool",
        logger: Log | None = None,
        export: str | Path | None = None,
        dtype: str = "int8",
    ) -> None:
        """store: path of the run's store; the first round creates it if it does not exist. Each run needs its own
        store, which may already hold rows collected at step 0. pool, benchmarks: problem records. name: name of the
        pool's collection. logger: receives each round's scalars (trainer/loggers.py); a function of values and step
        will do. export: folder for rollout files of the rollouts made for selection. dtype: dtype of a new store's
        rows.

        RequestError for settings that do not fit the pool, for invalid records, and for a selector that needs a target
        when there is no benchmark.
        """
        names = [check_name(name), *map(check_name, benchmarks)]
        if len(set(names)) < len(names):
            raise RequestError(f"collection {name!r} is the pool's: give the benchmark another name")
        settings = settings.for_pool(len(pool))
        self._run = Run(
            Path(store),
            name,
            Records(pool, name),
            {own: list(Records(records, own).values()) for own, records in benchmarks.items()},
            settings,
            dtype,
            None if export is None else Path(export),
        )
        if self._run.needs_target and not any(self._run.benchmarks.values()):
            raise RequestError(f"selector {settings.selector!r} needs a target: give a benchmark with problems")
        if self._run.weighs_by_target and not any(self._run.benchmarks.values()):
            raise RequestError(f"rollout_rule {settings.rollout_rule!r} needs a target: give a benchmark with problems")
        self._check_solutions()
        if self._run.needs_probes and 0 in (settings.refresh, settings.refresh_first):
            raise RequestError(f"selector {settings.selector!r} goes by probes of this step: refresh must be above 0")
        self._log = None if logger is None else log_of(logger)
        self._done = 0
        self._store: Store | None = None
        self._policy: Policy | None = None

    def _check_solutions(self) -> None:
        """RequestError if a name of the pool or of a benchmark claims solutions that cannot be used."""
        run = self._run
        if kind_of(run.pool) == "solutions":
            raise RequestError(f"the pool is called {run.pool!r}: names that end in {SOLUTIONS} are for solutions")
        for name, records in run.benchmarks.items():
            if kind_of(name) == "rollouts":
                continue
            if run.needs_probes:
                raise RequestError(
                    f"benchmark {name!r}: probes need its rollouts: leave {SOLUTIONS} out of its name, or take another "
                    "selector"
                )
            for record in records:
                solution_text(record)

    @property
    def settings(self) -> RoundSettings:
        """The run's settings, with every count filled in."""
        return self._run.settings

    @property
    def ids(self) -> list[str]:
        """Ids of the pool's problems, in its order."""
        return list(self._run.records)

    @property
    def done(self) -> int:
        """Rounds done."""
        return self._done

    @property
    def current(self) -> Selection | None:
        """The picks of the last round; None before the first."""
        if not self._done:
            return None
        if self._store is None:
            return selection_of(gradstore.open(self._run.path).rounds(self._run.pool)[self._done - 1])
        return selection_of(self._store.rounds(self._run.pool)[self._done - 1])

    def next(self, policy: Policy) -> Selection:
        """Do the next round with the current policy, record it, and return its picks, best first.

        A round that the store already holds is returned as recorded. RequestError when all rounds are done, or when the
        stored round has another step or other settings.
        """
        number = self._done
        if number >= self.settings.rounds:
            raise RequestError(f"all {self.settings.rounds} rounds (num_selections) are done")
        store = self._open(policy)
        if store is None and number:
            raise RequestError(f"{self._run.path}: there is no store, but the saved state is after round {number - 1}")
        found = self._recorded(store, number, policy) if store else None
        if found is None:
            kept = self._kept_choice(store, number)
            if kept is not None and store is not None:
                store.rounds(self._run.pool).add(
                    {**kept.about, "number": number, "step": policy.step, **_NOTHING}, kept.table
                )
            else:
                self._check_policy(policy)
                runner = RoundRunner(self._run, policy, number)
                if store is None:
                    self._store = store = runner.make_store()
                runner.run(store)
            assert store is not None
            found = store.rounds(self._run.pool)[number]
        self._done = number + 1
        if self._log is not None:
            assert store is not None
            before = store.rounds(self._run.pool)[number - 1] if number else None
            self._log(scalars(found, before), policy.step)
        return selection_of(found)

    def observe(self, policy: Policy, seen: Sequence[Group] | SketchBatch) -> int:
        """Store sketches of the trainer's own rollouts as rows at the policy's step; returns the number of new rows.

        seen: groups, one per problem, before the update, so that the policy is still the one that sampled them; this
        call sketches them. Or their sketches, if the trainer's own backward pass made them
        (sketches/from_training_pass.py) with the sketcher of `policy`'s `fit` or `use`. A problem that already has a
        row at this step keeps it, so repeating a step after an interruption changes nothing. RequestError before the
        first round, and for a problem that is not in the pool.
        """
        store = self._open(policy)
        if store is None:
            raise RequestError("no round was done yet: call next before observe")
        ids = seen.ids if isinstance(seen, SketchBatch) else [group.problem_id for group in seen]
        unknown = [name for name in ids if name not in self._run.records]
        if unknown:
            raise RequestError(f"problem {unknown[0]!r} is not in the pool {self._run.pool!r}")
        known = ids_at_step(store, self._run.pool, policy.step)
        new = [place for place, name in enumerate(ids) if name not in known]
        name, most = Counter(ids[place] for place in new).most_common(1)[0] if new else ("", 0)
        if most > 1:
            raise RequestError(f"problem {name!r} has several groups of one step: join them")
        if isinstance(seen, SketchBatch):
            publish(store, self._run.pool, seen, policy.step, new)
        else:
            append(store, self._run.pool, [seen[place] for place in new], policy, Costs())
        return len(new)

    def weigh(
        self,
        policy: Policy,
        groups: Sequence[Group],
        factors: Sequence[float] | None = None,
        objective: Objective | None = None,
    ) -> Weighed:
        """Weights of a training step's rollouts by the setting `rollout_rule`; call it before the update.

        groups: the step's own rollouts, by the policy that sampled them. factors: the problems' weights in the step;
        None: all 1. objective: that of the update; None: that of the sketches. The weights depend on the store's rows
        and on the arguments alone, so a repeated step has the same. RequestError before the first round.
        """
        store = self._open(policy)
        if store is None:
            raise RequestError("no round was done yet: call next before weigh")
        return weigh(store, self._run, policy, groups, factors, objective)

    def state_dict(self) -> dict[str, Any]:
        """State to save with the trainer's checkpoint, as plain values."""
        return {"rounds": self._done, "settings": _plain(self.settings)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`; RequestError if it was saved with other settings."""
        if not {"rounds", "settings"} <= state.keys():
            raise RequestError("this is not a state of selection rounds: it has no member `rounds` or `settings`")
        _check_same(dict(state["settings"]), _plain(self.settings), "the saved state")
        self._done = int(state["rounds"])

    def _check_policy(self, policy: Policy) -> None:
        of_solutions = [name for name in self._run.benchmarks if kind_of(name) == "solutions"]
        if of_solutions and not isinstance(policy, ReadsSolutions):
            raise RequestError(f"benchmark {of_solutions[0]!r}: this trainer makes no targets from solutions")

    def _open(self, policy: Policy) -> Store | None:
        if self._store is None or self._policy is not policy:
            self._store = self._run.open(policy)
            self._policy = policy
        return self._store

    def _recorded(self, store: Store, number: int, policy: Policy) -> Round | None:
        """The round, if an earlier process recorded it; None otherwise."""
        pool = self._run.pool
        recorded = len(store.rounds(pool))
        if number > recorded:
            raise RequestError(
                f"{store.path}: has {recorded} rounds, the saved state is after round {number - 1}: use its own store"
            )
        if number == recorded:
            return None
        found = store.rounds(pool)[number]
        where = f"{store.path}: round {number}"
        if found.about.get("step") != policy.step:
            raise RequestError(
                f"{where} was done at step {found.about.get('step')}, this run comes to it at step {policy.step}: "
                "a store holds one run; use another path"
            )
        _check_same(found.about["settings"], _plain(self.settings), where)
        return found

    def _kept_choice(self, store: Store | None, number: int) -> Round | None:
        """The round whose picks are reused (setting `once`); None when this round must choose."""
        chosen_in = self.settings.warm_up
        if store is None or not self.settings.once or number <= chosen_in:
            return None
        return store.rounds(self._run.pool)[chosen_in]


_NOTHING = {
    "n_rolled_out": 0,
    "rollouts": 0,
    "target_rollouts": 0,
    "costs": {},
    "tokens": 0,
    "ess": None,
    "warnings": [],
}
"""Zero costs, for a round that reuses earlier picks."""


def _plain(settings: RoundSettings) -> dict[str, Any]:
    """The settings as JSON returns them."""
    plain: dict[str, Any] = json.loads(json.dumps(settings.describe()))
    return plain


def _check_same(stored: Mapping[str, Any], offered: Mapping[str, Any], where: str) -> None:
    stored = {"draw": "independent", **stored}  # the only way before this setting
    stored, offered = ({**of, "spec": {**of["spec"], "token_budget": None}} for of in (stored, offered))
    differing = [
        f"{name} was {stored.get(name)!r}, now {offered.get(name)!r}"
        for name in sorted(stored.keys() | offered.keys())
        if name not in _FREE and stored.get(name) != offered.get(name)
    ]
    if differing:
        raise RequestError(f"{where} is of other settings: {'; '.join(differing)}. Use those, or another store")
