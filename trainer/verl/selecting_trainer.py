"""verl's synchronous trainer with a selection round whenever the last round's picks are used up.

A round runs before the step that needs it, when the rollout engine is awake and has the newest weights. Only the
sampler's state decides when, so a resumed run does the same rounds as an uninterrupted one. Rollouts of training steps
are sketched before the update, by the policy that sampled them.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
from omegaconf import open_dict
from torchdata.stateful_dataloader import StatefulDataLoader
from verl.trainer.ppo.utils import Role, create_rl_dataset
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.debug import marked_timer

from gradstore.errors import RequestError
from gradstore.trainer.round.driver import Rounds
from gradstore.trainer.sampling.backends import derived_seed
from gradstore.trainer.verl.agent_loop import SEED_FIELD
from gradstore.trainer.verl.live_policy import LivePolicy
from gradstore.trainer.verl.sampler import RoundSampler, drawing_order, records_of
from gradstore.trainer.verl.settings import VerlSettings
from gradstore.trainer.verl.transfer import (
    ROLLOUTS_FIELD,
    groups_of,
    joined,
    place_of,
    row_seeds,
    uid_of,
    weigh,
)
from gradstore.trainer.verl.worker import SketchingWorker

log = logging.getLogger(__name__)

_ACTORS = (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef)
_TRAINING = 1
"""Seed component that separates training rollouts from rollouts of rounds."""


class SelectingTrainer(PPOTrainerSync):
    """verl's synchronous trainer, training on the rounds' picks."""

    def __init__(self, config: Any) -> None:
        self.settings = VerlSettings.of(config)
        super().__init__(config)
        self._problem_of: dict[str, str] = {}
        """uid -> problem id, for the rows of the current step."""
        self._weight_of: dict[str, float] = {}
        """uid -> weight, for rows whose weight is not 1."""
        self._policy: LivePolicy | None = None
        self._of_round: dict[str, float] = {}
        """Scalars of the last round, until they are passed to verl's logger."""

    # verl's set-up, with our sampler and our workers

    def _init_dataloader(self) -> None:
        rounds = self.settings.rounds
        with open_dict(self.config):
            if self.config.trainer.total_training_steps is None:
                self.config.trainer.total_training_steps = rounds.rounds * rounds.steps
        super()._init_dataloader()
        if self.steps_per_epoch == 0:
            raise RequestError(
                f"data.train_files has {len(self.train_dataset)} problems, fewer than one batch of "
                f"{self.config.data.train_batch_size}"
            )
        with open_dict(self.config):
            # The rounds decide the length of the run: verl must not stop after a pass through the pool.
            enough = math.ceil(self.total_training_steps / self.steps_per_epoch) + 1
            self.config.trainer.total_epochs = max(self.config.trainer.total_epochs, enough)
        records = records_of(self.train_dataset, "data.train_files")
        benchmarks = {name: self._benchmark(name, files) for name, files in self.settings.benchmarks.items()}
        self.sampler = RoundSampler([record["id"] for record in records])
        self.train_dataloader = StatefulDataLoader(
            dataset=self.train_dataset,
            batch_size=self.config.data.get("gen_batch_size", None) or self.config.data.train_batch_size,
            num_workers=0,
            drop_last=True,
            collate_fn=collate_fn,
            sampler=self.sampler,
        )
        self.rounds = Rounds(
            self.settings.store, records, benchmarks, rounds, name=self.settings.pool, logger=self._keep_numbers
        )

    def _benchmark(self, name: str, files: list[str]) -> list[dict[str, Any]]:
        dataset = create_rl_dataset(files, self.config.data, self.tokenizer, self.processor, is_train=False)
        return records_of(dataset, f"benchmark {name!r}")

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping.keys() & set(_ACTORS):
            self.role_worker_mapping[role] = ray.remote(SketchingWorker)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps == 0:
            return
        # The loader restores its sampler's state only when it is first iterated, and the rounds need that state.
        self.train_dataloader_it = iter(self.train_dataloader)
        if not self.sampler.rounds:
            raise RequestError(
                f"the checkpoint of step {self.global_steps} has no state of rounds: gradstore did not make it; use "
                "another trainer.default_local_dir, or trainer.resume_mode=disable"
            )
        self.rounds.load_state_dict(self.sampler.rounds)

    # Rounds

    @property
    def policy(self) -> LivePolicy:
        """The live policy for the rounds."""
        if self._policy is None:
            self._policy = LivePolicy(self, self.settings)
        return self._policy

    def prepare_step(self) -> dict[str, Any]:
        if self.sampler.left < self.config.data.train_batch_size:
            self._round()
        metrics, self._of_round = self._of_round, {}
        return {**metrics, **super().prepare_step()}

    def _keep_numbers(self, values: Mapping[str, float], step: int) -> None:
        self._of_round = {f"gradstore/{name}": value for name, value in values.items()}

    def _round(self) -> None:
        settings = self.settings.rounds
        with marked_timer("selection", self.timing_raw, color="blue"):
            selection = self.rounds.next(self.policy)
            self.policy.end_round()
        order = drawing_order(
            selection.ids, settings.train_batch * settings.steps, derived_seed(settings.seed, self.policy.step)
        )
        rollouts = {name: n for name, n in zip(selection.ids, selection.rollouts.tolist(), strict=True) if n}
        weights = dict(zip(selection.ids, selection.relative_weights.tolist(), strict=True))
        self.sampler.feed(order, rollouts, {name: weight for name, weight in weights.items() if weight != 1})
        self.sampler.keep(self.rounds.state_dict())
        self.train_dataloader_it = iter(self.train_dataloader)
        log.info("round %d at step %d picked %s", self.rounds.done, self.policy.step, ", ".join(selection.ids))

    def _fetch_one_gen_batch(self) -> Any:
        batch = super()._fetch_one_gen_batch()
        n = len(batch)
        ids = self.sampler.order[-self.sampler.left - n :][:n]
        first = len(self._problem_of)
        uids = [f"train-{self.global_steps:08d}-{first + i:06d}" for i in range(n)]
        self._problem_of |= dict(zip(uids, ids, strict=True))
        weights = self.sampler.weights
        self._weight_of |= {uid: weights[name] for uid, name in zip(uids, ids, strict=True) if name in weights}
        seed = (self.settings.rounds.seed, _TRAINING, self.global_steps, first) if self.settings.seeded else None
        columns = {"uid": np.array(uids, dtype=object), SEED_FIELD: row_seeds(seed, n)}
        chosen = self.sampler.rollouts
        if chosen:
            usual = self.config.actor_rollout_ref.rollout.n
            columns[ROLLOUTS_FIELD] = np.array([chosen.get(name, usual) for name in ids], dtype=object)
        return batch.update(tensordict_utils.get_tensordict(columns))

    # Steps

    def on_step_begin(self) -> None:
        super().on_step_begin()
        self._problem_of.clear()
        self._weight_of.clear()

    def on_sample_end(self) -> None:
        super().on_sample_end()
        self.policy.awake = False

    def on_step_end(self) -> None:
        super().on_step_end()
        self.policy.awake = True

    def _balance_batch(self, batch: Any, metrics: dict[str, Any], *args: Any, **options: Any) -> Any:
        # Rollouts arrive in any order; without sorting, sums over a batch would differ between runs in the last digits.
        batch.reorder(sorted(range(len(batch.keys)), key=lambda i: place_of(batch.keys[i])))
        return super()._balance_batch(batch, metrics, *args, **options)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        weights = [self._weight_of.get(uid_of(key), 1.0) for key in batch.keys]
        if self.settings.rounds.rollout_rule is not None:
            of_rollouts = self._rollout_weights(batch, metrics)
            weights = [weight * of_rollouts.get(key, 1.0) for weight, key in zip(weights, batch.keys, strict=True)]
        if any(weight != 1 for weight in weights):
            weigh(batch.keys, weights)
        drawn = len(self.sampler.order) - self.sampler.left
        if self.settings.rounds.observes(drawn, len(set(self.sampler.order))):
            with marked_timer("observe", self.timing_raw, color="blue"):
                groups = groups_of(_own(batch), self._problem_of, self.settings.logprobs)
                self.rounds.observe(self.policy, joined([groups[uid] for uid in sorted(groups)]))
        return batch

    def _rollout_weights(self, batch: Any, metrics: dict[str, Any]) -> dict[str, float]:
        """Weight of each rollout by its key, by the rounds' rollout rule; logs what was dropped and what it cost."""
        own = sorted(_own(batch), key=place_of)
        with marked_timer("weigh", self.timing_raw, color="blue"):
            groups = groups_of(own, self._problem_of, self.settings.logprobs)
            factors = [self._weight_of.get(uid, 1.0) for uid in groups]
            weighed = self.rounds.weigh(self.policy, list(groups.values()), factors)
        metrics |= {f"gradstore/{name}": value for name, value in weighed.scalars().items()}
        weights_of = dict(zip(groups, weighed.weights, strict=True))
        return {key: float(weights_of[uid_of(key)][place]) for key, place in _places(own)}


def _own(batch: Any) -> list[str]:
    """Keys of the rollouts in a batch, without the rows that verl fills it up with."""
    rows = zip(batch.keys, batch.tags, strict=True)
    return [key for key, tag in rows if not tag.get("is_padding", False)]


def _places(keys: list[str]) -> list[tuple[str, int]]:
    """Each key of sorted keys, with its place in its group."""
    seen: dict[str, int] = {}
    placed = []
    for key in keys:
        uid = uid_of(key)
        placed.append((key, seen.get(uid, 0)))
        seen[uid] = placed[-1][1] + 1
    return placed
