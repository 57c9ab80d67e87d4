"""A short training run of the demo's model, in rounds of measure, select, train; it gives a store with history.

It uses the embedded trainer and selection rounds, as in `gradstore train`. Selection uses one benchmark; a second one
is measured before each round but not used. With test sizes it takes seconds. The report, the explorer and the tutorial
use its store.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradstore
from gradstore import Store
from gradstore.demo import tasks
from gradstore.demo.run import Subject
from gradstore.engine.selecting.selection import Selection
from gradstore.engine.sketches.spec import SketchSpec
from gradstore.trainer.local.grpo import Learner
from gradstore.trainer.local.policy import LocalPolicy
from gradstore.trainer.local.settings import Sampling, UpdateSettings
from gradstore.trainer.local.training import Training
from gradstore.trainer.round.driver import Rounds
from gradstore.trainer.round.measuring import Costs, Windows, sketch_collection
from gradstore.trainer.round.settings import RoundSettings
from gradstore.trainer.sampling.reward import Reward

ROLLOUTS = "rollouts"
"""Subfolder of the run for the rollouts made for selection."""
TOKEN_BUDGET = 16_384
"""Tokens per micro-batch; for layers this small, large micro-batches are faster although they exceed the CPU caches."""


@dataclass(frozen=True, slots=True)
class CourseSettings:
    """Sizes of the run."""

    subject: Subject = field(default_factory=Subject)
    n_pool: int = 60
    n_benchmark: int = 16
    n_rounds: int = 3
    n_selected: int = 12
    n_rollouts: int = 8
    n_updates: int = 4
    """Training steps per round, each on all picks."""
    learning_rate: float = 2e-4
    dim: int = 256
    token_budget: int | None = TOKEN_BUDGET
    """Tokens per micro-batch; None: as many as memory allows."""
    seed: int = 0


SHOWN = CourseSettings(n_pool=240, n_benchmark=40, n_rounds=4, n_selected=48, n_rollouts=16, dim=512)
"""The run that `gradstore demo` shows."""


def run_course(
    folder: Path,
    settings: CourseSettings,
    on_step: Callable[[int], None] | None = None,
    on_values: Callable[[int, Mapping[str, float]], None] | None = None,
) -> Store:
    """Train for some rounds; `folder` is a run of the embedded trainer, with `store` and `rollouts/` in it.

    on_step, on_values: as in `Training.run`. A call after an interruption resumes the run.
    """
    model, tokenizer = settings.subject.load()
    pool = tasks.pool(settings.seed, settings.n_pool, settings.subject.families)
    sampling = Sampling(max_new_tokens=8, batch_tokens=None if settings.token_budget is None else 1 << 20)
    policy = LocalPolicy(model, tokenizer, Reward("demo", tasks.reward), sampling, token_budget=settings.token_budget)
    rounds = RoundSettings(
        selected=settings.n_selected,
        train_batch=settings.n_selected,
        steps=settings.n_updates,
        rounds=settings.n_rounds,
        rollouts=settings.n_rollouts,
        target_rollouts=settings.n_rollouts,
        seed=settings.seed,
        observe="none",
        window=settings.n_pool,
        fit_problems=min(100, settings.n_pool),
        accept_coverage=settings.subject.least_seen,
        spec=SketchSpec(basis="fitted", dim=settings.dim, seed=settings.seed),
    )
    chooser = _Course(folder, pool, rounds, settings)
    learner = Learner(model, UpdateSettings(lr=settings.learning_rate, token_budget=settings.token_budget))
    training = Training(policy, learner, chooser, pool, rounds, folder, rollouts=settings.n_rollouts, resume=True)
    training.run(on_step, on_values)
    return gradstore.open(folder / "store")


class _Course(Rounds):
    """Rounds whose benchmark is the target family; a second benchmark is measured before each round but not used."""

    def __init__(
        self, folder: Path, pool: Sequence[dict[str, Any]], rounds: RoundSettings, settings: CourseSettings
    ) -> None:
        benchmark = tasks.benchmark(settings.seed, settings.n_benchmark, settings.subject.families)
        super().__init__(folder / "store", pool, {"sums": benchmark}, rounds, export=folder / ROLLOUTS)
        self._folder, self._course = folder, settings
        self._second = settings.subject.second_benchmark
        self._beside = _second_benchmark(settings, pool)

    def next(self, policy: Any) -> Selection:
        picks = super().next(policy)
        store = gradstore.open(self._folder / "store", "a")
        store.add_problems(self._second, self._beside)
        name, seed = f"round-{self.done - 1:04d}-{self._second}", (self._course.seed, self.done)
        path = self._folder / ROLLOUTS / name
        windows = Windows(policy, self._beside, self._course.n_rollouts, len(self._beside), seed, Costs(), path)
        sketch_collection(store, self._second, windows, policy, Costs())
        return picks


def _second_benchmark(settings: CourseSettings, pool: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Clean problems of the second family that are not in the pool."""
    subject, prompts = settings.subject, {str(record["prompt"]) for record in pool}
    others = tasks.pool(settings.seed + 1, 20 * settings.n_benchmark, subject.families)
    found = [
        record
        for record in others
        if record["source"] == subject.second_family
        and record["tags"] == [tasks.CLEAN]
        and str(record["prompt"]) not in prompts
    ]
    name = subject.second_benchmark
    return [{**record, "id": f"{name}-{i:04d}"} for i, record in enumerate(found[: settings.n_benchmark])]
