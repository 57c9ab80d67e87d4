"""The owner of a store as a Ray actor: trainers on other machines ask it for picks and hand it sketches.

    start("run", OwnerSettings(store=Path("run/store"), selected=64, benchmarks=("amc",)))   # once, in the cluster
    owner = connect("run")                              # in any process of the cluster
    owner.push("amc", sketches_of_amc, step, fingerprint)        # refreshes the target
    picks = owner.picks(7, at=step)                     # round 7, from the rows up to this step

Every answer depends on the arguments and on the store alone, and is in the store before it is given: a round's picks
are recorded, and rows that are there are not written again. So whoever repeats a call gets the same answer, in any
process. A call that has begun is finished without its caller. A call that never arrived, because its caller died, is
made by the next caller. An owner that dies is started again by Ray, which repeats the calls that were under way.

Imports no torch: neither the owner nor a caller needs a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

import gradstore
from gradstore import Round, State, Store
from gradstore.engine.searching.targets import Target, target
from gradstore.engine.selecting.membership import places
from gradstore.engine.selecting.selection import Selection, select
from gradstore.engine.sketches.spec import SketchBatch
from gradstore.errors import GradstoreError, RequestError, check_number, first_line, needing
from gradstore.trainer.round.recorded import selection_of
from gradstore.trainer.sampling.backends import derived_seed

NAMESPACE = "gradstore"
"""Ray's namespace of the owners."""
_PATIENCE = 600.0
"""Seconds that a caller waits for an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerSettings:
    """What an owner picks; the same for all rounds of a store."""

    store: Path
    """Store to own; its folder as the owner's machine sees it."""
    selected: int
    """Problems picked in a round."""
    selector: str = "cosine"
    """Any of engine.SELECTORS, or a mixture."""
    pool: str = "pool"
    """The pool's collection in the store."""
    benchmarks: tuple[str, ...] = ()
    """Collections whose gradients are the targets."""
    seed: int = 0
    """Seed; a round's draws depend only on it and on the round's number."""

    def __post_init__(self) -> None:
        check_number("selected", self.selected, least=1)
        check_number("seed", self.seed, least=0)

    def describe(self) -> dict[str, Any]:
        """What decides the picks, JSON-able; kept with each round."""
        names = ("selected", "selector", "seed")
        return {**{name: getattr(self, name) for name in names}, "benchmarks": list(self.benchmarks)}


class StoreOwner:
    """What the actor does, one call after another. A plain class, for use without Ray too."""

    def __init__(self, settings: OwnerSettings) -> None:
        self._settings = settings

    def check(self) -> None:
        """RequestError if the store lacks the pool or a benchmark; errors of `gradstore.open`."""
        store = self._open()
        for name in (self._settings.pool, *self._settings.benchmarks):
            if name not in store.collections:
                raise RequestError(f"{store.path} has no collection {name!r}: make it with `gradstore collect`")

    def picks(self, number: int, at: int | None = None) -> Selection:
        """Picks of round `number`, which is recorded; a recorded round is read back.

        at: the policy's step; rows of later steps do not count. None: the newest rows. RequestError for a round that is
        not the next, and for a recorded one of another step or other settings.
        """
        settings, store = self._settings, self._open("a")
        rounds = store.rounds(settings.pool)
        if not 0 <= number <= len(rounds):
            raise RequestError(f"{store.path} has {len(rounds)} rounds: {number} is not the next")
        if number == len(rounds):
            _record(store, settings, number, at)
        return _read_back(rounds[number], settings, at, f"{store.path}: round {number}")

    def push(self, collection: str, batch: SketchBatch, step: int, fingerprint: Mapping[str, Any]) -> int:
        """Append sketches of problems that the collection has, all or none; returns the number of problems.

        A problem with a row at this step keeps it. fingerprint: of the sketcher that made the batch; FingerprintError
        if the store's is another.
        """
        store = gradstore.open(self._settings.store, "a", fingerprint=dict(fingerprint))
        view = store.view(collection, at=step)
        known = set(view.ids[view.steps == step].tolist())
        new = [place for place, name in enumerate(batch.ids) if name not in known]
        if new:
            with store.writer(collection, step=step) as writer:
                writer.append(**batch.rows(new))
        return len(batch.ids)

    def target(self, benchmark: str, at: int | None = None) -> Target:
        """As `engine.target`."""
        return target(self._open(), benchmark, at)

    def _open(self, mode: Literal["r", "a"] = "r") -> Store:
        return gradstore.open(self._settings.store, mode)


class Owner:
    """A caller's end of an owner. The methods are those of `StoreOwner`, and raise its errors."""

    def __init__(self, handle: Any, name: str, patience: float) -> None:
        self._handle, self._name, self._patience = handle, name, patience

    def picks(self, number: int, at: int | None = None) -> Selection:
        found: Selection = self._ask("picks", number, at)
        return found

    def push(self, collection: str, batch: SketchBatch, step: int, fingerprint: Mapping[str, Any]) -> int:
        return int(self._ask("push", collection, batch, step, dict(fingerprint)))

    def target(self, benchmark: str, at: int | None = None) -> Target:
        found: Target = self._ask("target", benchmark, at)
        return found

    def check(self) -> None:
        self._ask("check")

    def stop(self) -> None:
        """End the owner, for all callers; a call under way is cut off, as by a crash."""
        import ray

        ray.kill(self._handle)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """GradstoreError if the owner is gone, or gives no answer in time."""
        import ray

        try:
            return ray.get(getattr(self._handle, method).remote(*arguments), timeout=self._patience)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, GradstoreError):
                raise error.cause from None
            raise
        except ray.exceptions.GetTimeoutError:
            line = f"no answer to {method!r} in {self._patience:.0f} s; the same call can be made again"
            raise GradstoreError(f"owner {self._name!r}: {line}") from None
        except ray.exceptions.RayActorError as error:
            raise GradstoreError(f"owner {self._name!r} is gone: {first_line(error)}") from None


def start(name: str, settings: OwnerSettings, *, cpus: int = 1, patience: float = _PATIENCE) -> Owner:
    """Start an owner under a name; it outlives this process, until `stop`.

    Ray must be initialised. cpus: CPUs that it occupies. patience: as for `connect`. RequestError for a name that is
    taken and for a store that does not fit the settings.
    """
    with needing("an owner of a store", "gradstore[ray]"):
        import ray

    kind = ray.remote(StoreOwner).options(
        name=name, namespace=NAMESPACE, lifetime="detached", num_cpus=cpus, max_restarts=-1, max_task_retries=-1
    )
    try:
        handle = kind.remote(settings)
    except ValueError as error:
        raise RequestError(f"owner {name!r}: {first_line(error)}: `connect` to it, or choose another name") from None
    owner = Owner(handle, name, patience)
    try:
        owner.check()
    except GradstoreError:
        owner.stop()
        raise
    return owner


def connect(name: str, *, patience: float = _PATIENCE) -> Owner:
    """An owner that was started under this name. patience: seconds to wait for each answer. RequestError if there is
    none."""
    with needing("an owner of a store", "gradstore[ray]"):
        import ray

    try:
        return Owner(ray.get_actor(name, namespace=NAMESPACE), name, patience)
    except ValueError:
        raise RequestError(
            f"this Ray cluster has no owner {name!r}: start it with gradstore.trainer.store_actor.start"
        ) from None


def _record(store: Store, settings: OwnerSettings, number: int, at: int | None) -> None:
    """Choose the round's picks and add it to the store."""
    targets = [target(store, name, at) for name in settings.benchmarks]
    seed, view = derived_seed(settings.seed, number), store.view(settings.pool, at)
    ids = store.problems(settings.pool)["id"].to_numpy().astype(object)
    ids = ids[places(ids, store.deleted(settings.pool)) < 0]

    def chosen(n: int, *, fewer: bool) -> Selection:
        found = targets or None
        return select(store, settings.pool, found, n, settings.selector, at, seed=seed, allow_fewer=fewer)

    picks, scored = chosen(settings.selected, fewer=False), chosen(len(ids), fewer=True)
    place_P = places(ids, view.ids)
    state_P = np.append(view.states, -1)[place_P]
    names = {int(state): state.name.lower() for state in State} | {-1: "unmeasured"}
    columns = {name: np.full(len(ids), np.nan) for name in ("score", "low", "high")}
    for found in (scored, picks):
        there = places(found.ids, ids)
        columns["score"][there], columns["low"][there], columns["high"][there] = found.scores, found.low, found.high
    picked, weights, rollouts = np.full(len(ids), -1), np.zeros(len(ids)), np.zeros(len(ids), np.int64)
    there = places(picks.ids, ids)
    picked[there], weights[there], rollouts[there] = np.arange(len(picks)), picks.weights, picks.rollouts
    table = {
        "id": ids,
        "state": [names[state] for state in state_P.tolist()],
        "step": np.append(view.steps, -1)[place_P],
        "pass_rate": np.append(view.pass_rates, np.nan)[place_P].astype(np.float64),
        "rolled_out": np.zeros(len(ids), bool),
        "picked": picked,
        "weight": weights,
        "rollouts": rollouts,
        **columns,
    }
    kept, counted = picks.describe(), np.bincount(state_P + 1, minlength=len(names))
    del kept["problems"]
    about = {
        "number": number,
        "step": int(view.steps.max(initial=0)) if at is None else at,
        "warm_up": False,
        "selector": picks.selector,
        "seed": settings.seed,
        "target": picks.target,
        "targets": picks.targets,
        "benchmarks": list(settings.benchmarks),
        "commit": picks.commit,
        "settings": settings.describe(),
        "pool": {"problems": len(ids), "seen": len(ids)},
        "n_candidates": len(ids),
        "n_rolled_out": 0,
        "rollouts": 0,
        "target_rollouts": 0,
        "costs": {},
        "tokens": 0,
        "probe": None,
        "counts": {name: int(counted[state + 1]) for state, name in names.items()},
        "refresh": {},
        "selection": kept,
        "picked_by": picks.picked_by,
        "ess": None,
        "warnings": [],
    }
    store.rounds(settings.pool).add(about, pa.table(table))


def _read_back(found: Round, settings: OwnerSettings, at: int | None, where: str) -> Selection:
    """The recorded picks; RequestError if they are of another step or of other settings."""
    kept, ours = found.about.get("settings", {}), settings.describe()
    wrong = [f"{name} was {kept.get(name)!r}, now {value!r}" for name, value in ours.items() if kept.get(name) != value]
    if at is not None and found.step != at:
        wrong.append(f"step was {found.step}, now {at}")
    if wrong:
        raise RequestError(f"{where} is of other settings: {'; '.join(wrong)}. Use those, or another store")
    return selection_of(found)
