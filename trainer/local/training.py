"""The training loop: each round picks problems, GRPO steps train on them, checkpoints limit what a kill can cost.

A run is deterministic: every draw is seeded by the run's seed and the number of the step or round. A run that was
killed and resumed ends with the same weights as an uninterrupted one, bit for bit (on the same machine).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gradstore.durable import writing
from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.spec import SketchBatch
from gradstore.errors import RequestError
from gradstore.trainer.local.checkpoint import load_checkpoint, save_checkpoint
from gradstore.trainer.local.grpo import Learner
from gradstore.trainer.local.metrics import Metrics
from gradstore.trainer.local.policy import LocalPolicy
from gradstore.trainer.loggers import Logger
from gradstore.trainer.round.settings import RoundSettings
from gradstore.trainer.round.weighing import Weighed
from gradstore.trainer.sampling.backends import derived_seed

ORDER, ROLLOUTS, MINIBATCHES = range(3)
"""Purposes of derived seeds."""


class Picks(Protocol):
    """Picks of a round; `engine.Selection` implements it."""

    @property
    def ids(self) -> list[str]: ...

    @property
    def rollouts(self) -> np.ndarray: ...

    @property
    def relative_weights(self) -> np.ndarray: ...


class Chooser(Protocol):
    """Picks the problems of each round; `gradstore.trainer.round.driver.Rounds` implements it."""

    def next(self, policy: Any) -> Picks: ...

    def observe(self, policy: Any, seen: Sequence[Group] | SketchBatch) -> Any: ...

    def weigh(
        self, policy: Any, groups: Sequence[Group], factors: Sequence[float] | None, objective: Objective
    ) -> Weighed: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Training:
    """One run in its folder: `checkpoint.pt`, `metrics.jsonl`, `tensorboard/`."""

    def __init__(
        self,
        policy: LocalPolicy,
        learner: Learner,
        chooser: Chooser,
        records: Sequence[Mapping[str, Any]],
        settings: RoundSettings,
        folder: Path,
        *,
        rollouts: int = 16,
        save_every: int = 0,
        resume: bool = False,
        log: Sequence[str] | None = None,
        loggers: Sequence[Logger] = (),
    ) -> None:
        """settings: the settings of the chooser's rounds; they give the number of steps and the batch size. rollouts:
        rollouts per problem, if the selection does not set a number. save_every: steps between checkpoints; 0: save
        only at the end of each round. log, loggers: where the metrics go besides `metrics.jsonl`, by name and as
        objects (`Metrics`). RequestError when the folder already holds a run and `resume` is False."""
        self._rollouts, self._save_every = rollouts, save_every
        self.policy, self.learner, self.chooser, self.settings = policy, learner, chooser, settings
        self._records = {record["id"]: record for record in records}
        self._path = folder / "checkpoint.pt"
        self._round, self._done = 0, 0  # current round, number of its steps done
        self._picks: list[tuple[str, int]] = []
        self._weights: dict[str, float] = {}  # of picks whose weight is not 1
        self.seconds = 0.0
        """Seconds of this process's training steps: rollouts and updates (including the projections of sketches)."""
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if self._path.exists() and not resume:
            raise RequestError(f"{folder}: holds a run already; go on with it (--resume), or choose another folder")
        if self._path.exists():
            self._restore()
        self.metrics = Metrics(folder, policy.step, log, loggers)

    def run(
        self,
        after_step: Callable[[int], None] | None = None,
        on_values: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        """Train until the last round. after_step: callback(number of steps done). on_values: callback(round, the step's
        metrics), before after_step."""
        while self._round < self.settings.rounds:
            if not self._done:
                started = time.monotonic()
                chosen = self.chooser.next(self.policy)
                self.policy.forget_direction()
                self._picks = list(zip(chosen.ids, chosen.rollouts.tolist(), strict=True))
                weights = zip(chosen.ids, chosen.relative_weights.tolist(), strict=True)
                self._weights = {name: weight for name, weight in weights if weight != 1}
                about = {"round": self._round, "picked": len(self._picks), "seconds": time.monotonic() - started}
                self.metrics.add("round", self.policy.step, about)
            batches = self._batches()
            for batch in batches[self._done :]:
                values = self._step(batch)
                if on_values:
                    on_values(self._round, values)
                every = self._save_every
                if self._done == len(batches):
                    self._round, self._done = self._round + 1, 0
                if self._done == 0 or (every and self.policy.step % every == 0):
                    self._save()
                if after_step:
                    after_step(self.policy.step)
        self.metrics.close()

    def _step(self, batch: Sequence[tuple[str, int]]) -> Mapping[str, float]:
        step, seed = self.policy.step, self.settings.seed
        started = time.monotonic()
        groups: list[Group] = []
        for n in sorted({n for _, n in batch}):
            records = [self._records[name] for name, own in batch if own == n]
            rollout_seed = derived_seed(seed, ROLLOUTS, step, n)
            groups += self.policy.roll_out(records, n or self._rollouts, seed=rollout_seed)
        sampled = time.monotonic()
        deal = derived_seed(seed, MINIBATCHES, step)
        weights = [self._weights.get(group.problem_id, 1.0) for group in groups] if self._weights else None
        rollout_weights: list[np.ndarray] | None = None
        about: dict[str, float] = {}
        if self.settings.rollout_rule is not None:
            weighed = self.chooser.weigh(self.policy, groups, weights, self.learner.settings.objective)
            rollout_weights = weighed.weights
            about = {**weighed.scalars(), "seconds_weigh": time.monotonic() - sampled}
        weighed_at = time.monotonic()
        sketches: SketchBatch | None = None
        if self._observes(self._done):
            values, sketches = self.learner.step_and_sketch(
                groups, self.policy.sketcher, deal, weights, rollout_weights
            )
        else:
            values = self.learner.step(groups, deal, weights, rollout_weights)
        updated = time.monotonic()
        if sketches is not None:
            self.chooser.observe(self.policy, sketches)
        self.policy.step += 1
        self._done += 1
        self.seconds += updated - started
        seconds = {
            "seconds_rollouts": sampled - started,
            "seconds_update": updated - weighed_at,
            "seconds_observe": time.monotonic() - updated,
        }
        self.metrics.add("step", self.policy.step, {"round": self._round, **values, **about, **seconds})
        return values

    def _observes(self, step: int) -> bool:
        """Whether the rollouts of this step of the round become rows."""
        return self.settings.observes((step + 1) * self.settings.train_batch, len(self._picks))

    def _batches(self) -> list[list[tuple[str, int]]]:
        """Passes over the round's picks, each shuffled differently, cut into steps of (problem id, rollouts)."""
        needed = self.settings.train_batch * self.settings.steps
        if not self._picks or needed % len(self._picks):
            raise RequestError(
                f"a round of {self.settings.steps} steps of {self.settings.train_batch} problems cannot go through "
                f"{len(self._picks)} picks a whole number of times: change steps, train_batch or the picks"
            )
        order: list[int] = []
        while len(order) < needed:
            seed = derived_seed(self.settings.seed, ORDER, self._round, len(order))
            order += np.random.default_rng(seed).permutation(len(self._picks)).tolist()
        size = self.settings.train_batch
        return [[self._picks[i] for i in order[start : start + size]] for start in range(0, needed, size)]

    def _save(self) -> None:
        progress = {
            "step": self.policy.step,
            "round": self._round,
            "done": self._done,
            "picks": self._picks,
            "weights": self._weights,
            "chooser": self.chooser.state_dict(),
        }
        save_checkpoint(self._path, self.learner, progress)

    def _restore(self) -> None:
        progress = load_checkpoint(self._path, self.learner)
        self.policy.step = progress["step"]
        self._round, self._done = progress["round"], progress["done"]
        self._picks = [(name, n) for name, n in progress["picks"]]
        self._weights = progress.get("weights", {})  # old checkpoints have no weights
        self.chooser.load_state_dict(progress["chooser"])
        if self._done and any(map(self._observes, range(self._done, self.settings.steps))):
            self.chooser.observe(self.policy, [])  # opens the store, so that the policy uses its sketcher
