"""One run of the study (an arm, a method, a seed) and its row of results."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import gradstore
from benchmarks.study.ablations import without
from benchmarks.study.accuracy import expected_accuracy
from benchmarks.study.bed import Bed, StudySettings
from benchmarks.study.methods import ORACLE, ROUNDS, Oracle, method
from gradstore.engine.gradients.objectives import Objective, objective
from gradstore.engine.rollouts.group import Group
from gradstore.engine.rollouts.solutions import FIELD, solutions_of
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.trainer.local.grpo import Learner
from gradstore.trainer.local.policy import LocalPolicy
from gradstore.trainer.local.settings import Sampling, UpdateSettings
from gradstore.trainer.local.training import Chooser, Picks, Training
from gradstore.trainer.round.driver import Rounds
from gradstore.trainer.round.settings import RoundSettings
from gradstore.trainer.round.weighing import Weighed


@dataclass(slots=True)
class Meter:
    """Costs of selection, round by round."""

    rollouts: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Wall seconds of each selection round."""
    rollout_seconds: list[float] = field(default_factory=list)
    """Seconds of these that were spent on rollouts."""
    observe_seconds: float = 0.0
    weigh_seconds: float = 0.0
    """Seconds of finding the weights of rollouts."""
    weigh_tokens: int = 0
    """Tokens that went through the model for this."""
    dropped: list[float] = field(default_factory=list)
    """Share of the rollouts with an advantage that was dropped, step by step."""


class MeteredPolicy(LocalPolicy):
    """A policy that counts its rollouts and measures their time."""

    n_rollouts = 0
    seconds = 0.0

    def roll_out(self, problems: Sequence[Mapping[str, Any]], n: int, *, seed: int) -> list[Group]:
        started = time.monotonic()
        groups = super().roll_out(problems, n, seed=seed)
        self.n_rollouts += len(groups) * n
        self.seconds += time.monotonic() - started
        return groups


class MeteredChooser:
    """Wraps a chooser, measures each round's cost and keeps its picks."""

    def __init__(self, chooser: Chooser) -> None:
        self._chooser, self.meter = chooser, Meter()
        self.picks: list[list[str]] = []

    def next(self, policy: MeteredPolicy) -> Picks:
        started, rollouts, seconds = time.monotonic(), policy.n_rollouts, policy.seconds
        chosen = self._chooser.next(policy)
        self.meter.seconds.append(time.monotonic() - started)
        self.meter.rollouts.append(policy.n_rollouts - rollouts)
        self.meter.rollout_seconds.append(policy.seconds - seconds)
        self.picks.append(list(chosen.ids))
        return chosen

    def observe(self, policy: MeteredPolicy, seen: Sequence[Group] | SketchBatch) -> None:
        started = time.monotonic()
        self._chooser.observe(policy, seen)
        self.meter.observe_seconds += time.monotonic() - started

    def weigh(
        self,
        policy: MeteredPolicy,
        groups: Sequence[Group],
        factors: Sequence[float] | None,
        objective: Objective,
    ) -> Weighed:
        started = time.monotonic()
        weighed = self._chooser.weigh(policy, groups, factors, objective)
        self.meter.weigh_seconds += time.monotonic() - started
        self.meter.weigh_tokens += weighed.n_tokens
        self.meter.dropped.append(weighed.dropped)
        return weighed

    def state_dict(self) -> dict[str, Any]:
        return self._chooser.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._chooser.load_state_dict(state)


def run_one(bed: Bed, arm: str, name: str, seed: int, settings: StudySettings) -> dict[str, Any]:
    """Train once and return the row of results, JSON-able. The same call gives the same row, except for seconds."""
    started, processor = time.monotonic(), time.process_time()
    about = method(name, settings.budgeted)
    found = bed.problems(arm, seed, settings)
    records = {record["id"]: record for record in found.pool}
    policy, learner = begun(bed, settings)
    model, tokenizer = policy.model, policy.tokenizer
    accuracy = [expected_accuracy(model, tokenizer, found.test)]

    def after_step(step: int) -> None:
        if step % settings.steps == 0:
            accuracy.append(expected_accuracy(model, tokenizer, found.test))

    with tempfile.TemporaryDirectory(prefix="gradstore-study-") as folder:
        rounds = round_settings(bed, settings, seed, about.rounds)
        inner: Chooser
        if name.partition(ROUNDS)[0] == ORACLE:
            inner = Oracle([one["id"] for one in found.pool if bed.is_useful(one)], settings.selected, seed)
        else:
            inner = Rounds(Path(folder) / "store", found.pool, benchmark(found.validation, about.solutions), rounds)
        chooser, run = MeteredChooser(inner), Path(folder) / "run"
        training = Training(policy, learner, chooser, found.pool, rounds, run, rollouts=settings.rollouts)
        with without(about.without):
            training.run(after_step)
        stages = _stages(Path(folder) / "store")
    picks = [[records[problem_id] for problem_id in ids] for ids in chooser.picks]
    meter = chooser.meter
    return {
        "arm": arm,
        "method": name,
        "seed": seed,
        "settings": asdict(settings),
        "accuracy": accuracy,
        "bad": [sum(bed.is_bad(arm, record) for record in own) / len(own) for own in picks],
        "useful": [sum(map(bed.is_useful, own)) / len(own) for own in picks],
        "selection_rollouts": meter.rollouts,
        "selection_seconds": meter.seconds,
        "selection_rollout_seconds": meter.rollout_seconds,
        "observe_seconds": meter.observe_seconds,
        **_weighing(meter),
        "stage_seconds": stages,
        "training_seconds": training.seconds,
        "training_rollout_seconds": policy.seconds - sum(meter.rollout_seconds),
        "seconds": time.monotonic() - started,
        "processor_seconds": time.process_time() - processor,
    }


def _stages(path: Path) -> list[dict[str, float]]:
    """Seconds of each selection round by stage (fit, rollouts, sketch, probe, plan, store), as the rounds say."""
    if not path.exists():
        return []
    rounds = gradstore.open(path).rounds("pool")
    return [dict(rounds[number].about["costs"]) for number in range(len(rounds))]


def begun(bed: Bed, settings: StudySettings) -> tuple[MeteredPolicy, Learner]:
    """The bed's policy before training, and its learner; this process then uses one thread."""
    torch.set_num_threads(1)  # two runs side by side do more than one on two threads
    model, tokenizer = bed.load()
    sampling = Sampling(max_new_tokens=bed.max_new_tokens, batch_tokens=bed.batch_tokens)
    policy = MeteredPolicy(model, tokenizer, bed.reward, sampling, token_budget=bed.token_budget)
    return policy, Learner(model, update_settings(bed, settings))


def update_settings(bed: Bed, settings: StudySettings) -> UpdateSettings:
    return UpdateSettings(lr=settings.lr, objective=objective(settings.objective), token_budget=bed.token_budget)


def benchmark(records: Sequence[dict[str, Any]], solutions: bool) -> dict[str, list[dict[str, Any]]]:
    """The benchmark under its name. solutions: as one of reference solutions, which are the ground truths."""
    if not solutions:
        return {"benchmark": list(records)}
    solved = [{**record, "extra": {**record.get("extra", {}), FIELD: record["ground_truth"]}} for record in records]
    return {solutions_of("benchmark"): solved}


def _weighing(meter: Meter) -> dict[str, Any]:
    """What weighing rollouts cost and dropped; nothing where no rollout was weighed."""
    if not meter.dropped:
        return {}
    return {"weigh_seconds": meter.weigh_seconds, "weigh_tokens": meter.weigh_tokens, "dropped": meter.dropped}


def round_settings(bed: Bed, settings: StudySettings, seed: int, changes: Mapping[str, Any]) -> RoundSettings:
    """The study's round settings with a method's changes."""
    common: dict[str, Any] = {
        "selected": settings.selected,
        "train_batch": settings.train_batch,
        "steps": settings.steps,
        "rounds": settings.rounds,
        "rollouts": settings.rollouts,
        "target_rollouts": settings.rollouts,
        "observe": "none",  # only a budgeted refresh uses observed rows
        "seed": seed,
        "window": settings.window,
        "fit_problems": settings.fit_problems,
        "draw": "independent",  # as the runs were made that are there
        "accept_coverage": bed.accept_coverage,
        "spec": SketchSpec(basis="fitted", rank=settings.rank, dim=settings.dim),
    }
    return RoundSettings(**{**common, **changes})
