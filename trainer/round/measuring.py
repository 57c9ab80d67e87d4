"""Roll out, sketch and probe the problems of a round, window by window; each window is stored when it is done.

A window's rollouts depend only on the policy, the seed and the window's problems. A window whose rows are already
stored is skipped. If its rollouts are needed again (as a probe direction, or to add more rollouts), they are sampled
again and come out the same.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gradstore import Store
from gradstore.engine.probing.calibration import Calibration
from gradstore.engine.rollouts.group import Group, joined
from gradstore.engine.rollouts.rollout import Rollout
from gradstore.engine.rollouts.write import write_rollouts
from gradstore.engine.searching.targets import kind_of
from gradstore.engine.sketches.effective_sizes import EffectiveSizes
from gradstore.engine.sketches.spec import SketchBatch
from gradstore.errors import GradstoreError
from gradstore.trainer.round.journal import Journal, Plan
from gradstore.trainer.round.policy import Policy, ReadsSolutions
from gradstore.trainer.round.run import BENCHMARK, POOL, Scope
from gradstore.trainer.sampling.backends import derived_seed


@dataclass(slots=True)
class Costs:
    """Costs of a round, time and tokens, and what its rollouts are worth."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by stage, in seconds."""
    tokens: int = 0
    """Tokens that went through the model for sketches."""
    sizes: EffectiveSizes = field(default_factory=EffectiveSizes)
    """Effective sample sizes of the rollouts that were sketched."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


class Windows:
    """Rollouts of some problems in windows of fixed size, sampled on demand and optionally kept in memory."""

    def __init__(
        self,
        policy: Policy,
        records: Sequence[Mapping[str, Any]],
        n: int,
        size: int,
        seed: tuple[int, ...],
        costs: Costs,
        export: Path | None,
        *,
        solutions: bool = False,
    ) -> None:
        """n: rollouts per problem. size: problems per window. seed: each window's seed is derived from it. export: path
        prefix of the rollout files. solutions: the problems' reference solutions instead of rollouts."""
        self._policy, self._records, self._n, self._size = policy, records, n, size
        self._seed, self._costs, self._export, self._solutions = seed, costs, export, solutions
        self._kept: dict[int, list[Group]] = {}
        self.all_ids = [record["id"] for record in records]
        """Problem ids of all windows."""
        self._place_of = {problem_id: place for place, problem_id in enumerate(self.all_ids)}

    def __len__(self) -> int:
        return -(-len(self._records) // self._size)

    def ids(self, window: int) -> list[str]:
        return self.all_ids[window * self._size : (window + 1) * self._size]

    def groups(self, window: int, *, keep: bool = False) -> list[Group]:
        """The window's rollouts, one group per problem, in the window's order."""
        if window in self._kept:
            return self._kept[window] if keep else self._kept.pop(window)
        records = self._records[window * self._size : (window + 1) * self._size]
        with self._costs.stage("rollouts"):
            if self._solutions:
                assert isinstance(self._policy, ReadsSolutions)  # `Rounds.next` checked it
                groups = self._policy.solutions(records)
            else:
                groups = self._policy.roll_out(records, self._n, seed=derived_seed(*self._seed, window))
        if [group.problem_id for group in groups] != [record["id"] for record in records]:
            raise GradstoreError(
                f"the policy rolled out {len(groups)} problems, not the {len(records)} asked for in their order"
            )
        if self._export is not None:
            path = self._export.with_name(f"{self._export.name}-{window:04d}.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_rollouts(path) as writer:
                writer.append(rollouts_of(records, groups, self._policy.step))
        if keep:
            self._kept[window] = groups
        return groups

    def all_groups(self, *, keep: bool = False) -> list[Group]:
        """The rollouts of all windows."""
        return [group for window in range(len(self)) for group in self.groups(window, keep=keep)]

    def group(self, problem_id: str) -> Group:
        """One problem's rollouts; its window stays in memory."""
        place = self._place_of[problem_id]
        return self.groups(place // self._size, keep=True)[place % self._size]

    def holds(self, problem_id: str) -> bool:
        return problem_id in self._place_of


def rollouts_of_benchmarks(scope: Scope, policy: Policy, costs: Costs) -> dict[str, Windows]:
    """Rollouts, or reference solutions, of the benchmarks that the round measures."""
    n, records_of = scope.settings.target_rollouts, scope.run.benchmarks
    return {
        name: _windows(scope, policy, costs, records_of[name], n, (BENCHMARK, i), name)
        for i, name in enumerate(scope.benchmarks if scope.measures_target else [])
    }


def rollouts_of_plan(scope: Scope, policy: Policy, costs: Costs, ids: Sequence[str], number: int) -> Windows:
    """Rollouts of the candidates in plan `number` of the round."""
    records, name = [scope.run.records[problem_id] for problem_id in ids], f"{scope.run.pool}-{number}"
    return _windows(scope, policy, costs, records, scope.rollouts(number), (POOL, number), name)


def _windows(
    scope: Scope,
    policy: Policy,
    costs: Costs,
    records: Sequence[Mapping[str, Any]],
    n: int,
    seed: tuple[int, int],
    name: str,
) -> Windows:
    settings, folder, solutions = scope.settings, scope.run.export, kind_of(name) == "solutions"
    export = None if folder is None or solutions else folder / f"round-{scope.number:04d}-{name}"
    seeds = (settings.seed, scope.number, *seed)
    return Windows(policy, records, n, settings.window, seeds, costs, export, solutions=solutions)


def sketch_collection(store: Store, collection: str, windows: Windows, policy: Policy, costs: Costs) -> None:
    """Store rows of a benchmark at the policy's step, for the problems that have none."""
    done = ids_at_step(store, collection, policy.step)
    for window in range(len(windows)):
        todo = [name not in done for name in windows.ids(window)]
        if any(todo):
            groups = windows.groups(window)
            append(store, collection, [group for group, new in zip(groups, todo, strict=True) if new], policy, costs)


def sketch_benchmarks(
    store: Store, windows_of: Mapping[str, Windows], policy: Policy, costs: Costs, *, aim: bool
) -> None:
    """Store rows of all benchmarks at the policy's step.

    aim: also set the policy's probe direction, from the same passes. Then problems that already have rows are measured
    again; their rows stay unchanged.
    """
    if not (aim and windows_of):
        for name, windows in windows_of.items():
            sketch_collection(store, name, windows, policy, costs)
        return
    groups = [group for windows in windows_of.values() for group in windows.all_groups()]
    with costs.stage("sketch"):
        batch = policy.aim(groups)
    costs.tokens += batch.n_tokens
    costs.sizes.add(batch)
    start = 0
    for name, windows in windows_of.items():
        done = ids_at_step(store, name, policy.step)
        with costs.stage("store"):
            places = [start + place for place, problem_id in enumerate(windows.all_ids) if problem_id not in done]
            publish(store, name, batch, policy.step, places)
        start += len(windows.all_ids)


def ids_at_step(store: Store, collection: str, step: int) -> set[str]:
    """Ids of the problems with a row at a step."""
    view = store.view(collection, step, since=step)
    return set(view.ids_at(np.arange(len(view))))


class Measured:
    """Measures a round's candidates plan by plan; a problem's new rollouts join its earlier ones of the round."""

    def __init__(
        self,
        store: Store,
        scope: Scope,
        policy: Policy,
        journal: Journal,
        costs: Costs,
        *,
        probes: bool,
        first: Windows | None,
    ) -> None:
        """probes: also probe, along the direction of `policy.aim`. first: rollouts of plan 0, if they were made."""
        self._store, self._scope, self._policy, self._journal = store, scope, policy, journal
        self._costs, self._probes, self._first = costs, probes, first
        self._like = _calibration_before(store, scope) if probes else None
        self._joins = scope.budget is not None and scope.settings.boundary > 0
        self._before: list[Windows] = []

    def run(self, plan: Plan, number: int) -> None:
        """Measure the problems of plan `number`. A first look brings rows only, without probes."""
        journal, looks = self._journal, number == 0 and self._scope.look > 0
        windows = self._first if number == 0 else None
        windows = windows or rollouts_of_plan(self._scope, self._policy, self._costs, plan.ids, number)
        planned_rows, planned_probes = (dict(zip(plan.ids, counts, strict=True)) for counts in (plan.rows, plan.probes))
        for window in range(len(windows)):
            ids = windows.ids(window)
            needs_rows = _lacks(ids, journal.rows, planned_rows)
            needs_probes = self._probes and not looks and _lacks(ids, journal.probes, planned_probes)
            if not (needs_rows or needs_probes):
                continue
            groups = [self._joined(group) for group in windows.groups(window, keep=looks or self._joins)]
            if needs_rows:
                append(self._store, self._scope.run.pool, groups, self._policy, self._costs)
                journal.rows.update(ids)
            if needs_probes:
                self._probe(groups)
                journal.probes.update(ids)
        self._before.append(windows)

    def _probe(self, groups: Sequence[Group]) -> None:
        scope = self._scope
        with self._costs.stage("probe"):
            batch = self._policy.probe(groups, self._like)
        with self._costs.stage("store"):
            self._journal.calibrated(batch.calibration)
            batch.save(self._store, scope.run.pool, step=scope.step, target=scope.target)

    def _joined(self, group: Group) -> Group:
        """All rollouts of the problem so far in this round."""
        earlier = [windows.group(group.problem_id) for windows in self._before if windows.holds(group.problem_id)]
        return joined([*earlier, group])


def _calibration_before(store: Store, scope: Scope) -> Calibration | None:
    """Calibration of the previous round's probe; None if there is none."""
    kept = store.rounds(scope.run.pool).about(scope.number - 1).get("probe") if scope.number else None
    return None if kept is None else Calibration.of(kept)


def append(store: Store, collection: str, groups: Sequence[Group], policy: Policy, costs: Costs) -> None:
    """Sketch groups and publish their rows at the policy's step, all or none."""
    if not groups:
        return
    with costs.stage("sketch"):
        batch = policy.sketch(groups)
    costs.tokens += batch.n_tokens
    costs.sizes.add(batch)
    with costs.stage("store"):
        publish(store, collection, batch, policy.step, range(len(groups)))


def publish(store: Store, collection: str, batch: SketchBatch, step: int, rows: Sequence[int]) -> None:
    """Publish these rows of a batch at a step, all or none."""
    if len(rows):
        with store.writer(collection, step=step) as writer:
            writer.append(**batch.rows(rows))


def _lacks(ids: Sequence[str], now: Counter[str], planned: Mapping[str, int]) -> bool:
    return any(now[name] <= planned[name] for name in ids)


def rollouts_of(records: Sequence[Mapping[str, Any]], groups: Sequence[Group], step: int) -> Iterator[Rollout]:
    """The groups' rollouts as rows of a rollout file; records: of their problems, in the same order."""
    for record, group in zip(records, groups, strict=True):
        for j, response_ids in enumerate(group.responses):
            yield Rollout(
                problem_id=group.problem_id,
                reward=float(group.rewards[group.rollouts[j]]),
                prompt=record["prompt"],
                prompt_ids=group.prompt_of(j),
                response_ids=response_ids,
                response_mask=None if group.masks is None else group.masks[j],
                rollout=None if group.rollout_of is None else str(group.rollout_of[j]),
                logprobs=None if group.logprobs is None else group.logprobs[j],
                reference_logprobs=None if group.reference_logprobs is None else group.reference_logprobs[j],
                source=record.get("source", ""),
                ground_truth=record.get("ground_truth", ""),
                tags=list(record.get("tags", ())),
                step=step,
            )
