"""verl's trainers with a selection round whenever the last round's picks are used up.

A round runs when the data loader needs a problem and has none: the rollout engine is awake and has the newest weights.
Only the sampler's state decides when, so a resumed run does the same rounds as an uninterrupted one. Rollouts of
training steps are sketched before the update, if the policy at that step sampled them.

`Selecting` holds all of it, for verl's synchronous trainer and for the one that generates ahead of training.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from omegaconf import open_dict
from torchdata.stateful_dataloader import StatefulDataLoader
from verl.trainer.ppo.utils import Role, create_rl_dataset
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.debug import marked_timer

from gradstore.engine.selecting.selection import Selection
from gradstore.errors import RequestError
from gradstore.trainer.round.driver import Rounds
from gradstore.trainer.sampling.backends import derived_seed
from gradstore.trainer.verl.agent_loop import SEED_FIELD, SeededClient, SeededResumingClient
from gradstore.trainer.verl.live_policy import LivePolicy
from gradstore.trainer.verl.sampler import RoundSampler, drawing_order, records_of
from gradstore.trainer.verl.settings import VerlSettings
from gradstore.trainer.verl.transfer import (
    ROLLOUTS_FIELD,
    WEIGHT_FIELD,
    joined,
    place_of,
    rollout_numbers,
    row_seeds,
    row_weights,
    uid_of,
    versions_of,
    weigh,
)
from gradstore.trainer.verl.worker import SketchingWorker

log = logging.getLogger(__name__)

_ACTORS = (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef)
_TRAINING = 1
"""Seed component that separates training rollouts from rollouts of rounds."""


_Base: Any = PPOTrainer if TYPE_CHECKING else object


class Selecting(_Base):
    """Training on the rounds' picks; stands before one of verl's trainers among a class's bases."""

    def __init__(self, config: Any) -> None:
        self.settings = VerlSettings.of(config)
        for note in self.settings.notes:
            log.warning("the sketches' objective follows verl's, except: %s", note)
        super().__init__(config)
        self._n_drawn: Counter[int] = Counter()
        """Rows drawn while each step was the current one, for uids that differ."""
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
        self._ids = [record["id"] for record in records]
        self.rounds = Rounds(
            self.settings.store,
            records,
            benchmarks,
            rounds,
            name=self.settings.pool,
            logger=self._keep_numbers,
            export=self.settings.export,
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
        found = super().prepare_step()
        metrics, self._of_round = self._of_round, {}
        return {**found, **metrics}

    def _keep_numbers(self, values: Mapping[str, float], step: int) -> None:
        self._of_round = {f"gradstore/{name}": value for name, value in values.items()}

    def _round(self) -> None:
        timing: dict[str, float] = {}
        with marked_timer("selection", timing, color="blue"):
            selection = self.rounds.next(self.policy)
            self.policy.end_round()
        self._of_round["timing_s/selection"] = timing["selection"]
        self.sampler.keep(self.rounds.state_dict())
        self._feed(selection)
        log.info("round %d at step %d picked %s", self.rounds.done, self.policy.step, ", ".join(selection.ids))

    def _feed(self, selection: Selection) -> None:
        """Have the data loader draw a selection's picks, for the steps of one round."""
        settings = self.settings.rounds
        order = drawing_order(
            selection.ids, settings.train_batch * settings.steps, derived_seed(settings.seed, self.policy.step)
        )
        rollouts = {name: n for name, n in zip(selection.ids, selection.rollouts.tolist(), strict=True) if n}
        weights = dict(zip(selection.ids, selection.relative_weights.tolist(), strict=True))
        self.sampler.feed(order, rollouts, {name: weight for name, weight in weights.items() if weight != 1})
        self.train_dataloader_it = iter(self.train_dataloader)

    def _fetch_one_gen_batch(self) -> Any:
        size = self.config.data.get("gen_batch_size", None) or self.config.data.train_batch_size
        if self.sampler.left < size:
            last = self.rounds.current
            if last is None or self.rounds.done < self.settings.rounds.rounds:
                self._round()
            else:  # drawn ahead of a step that the run does not have
                self._feed(last)
        batch = super()._fetch_one_gen_batch()
        n = len(batch)
        ids = self.sampler.order[-self.sampler.left - n :][:n]
        first = self._n_drawn[self.global_steps]
        self._n_drawn[self.global_steps] += n
        uids = [
            f"train-{self.global_steps:08d}-{first + i:06d}-{self.sampler.row_of(name)}" for i, name in enumerate(ids)
        ]
        seed = (self.settings.rounds.seed, _TRAINING, self.global_steps, first) if self.settings.seeded else None
        columns = {"uid": np.array(uids, dtype=object), SEED_FIELD: row_seeds(seed, n)}
        chosen = self.sampler.rollouts
        if chosen or self.settings.asynchronous:
            usual = self.config.actor_rollout_ref.rollout.n
            columns[ROLLOUTS_FIELD] = np.array([chosen.get(name, usual) for name in ids], dtype=object)
        if self._weighs:
            columns[WEIGHT_FIELD] = np.array([self.sampler.weights.get(name, 1.0) for name in ids], dtype=object)
        return batch.update(tensordict_utils.get_tensordict(columns))

    @property
    def _weighs(self) -> bool:
        """Whether rows carry a weight. A batch drawn ahead may be of two rounds, so there all do."""
        return bool(self.sampler.weights) or self.settings.asynchronous

    def _problems(self, keys: Sequence[str]) -> dict[str, str]:
        """uid -> problem id, for the rollouts of training rows: a uid ends with the problem's row in the pool."""
        return {uid: self._ids[int(uid.rsplit("-", 1)[1])] for uid in map(uid_of, keys)}

    # Steps

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
        weights = row_weights(batch.keys) if self._weighs else [1.0] * len(batch.keys)
        if self.settings.rounds.rollout_rule is not None:
            of_rollouts = self._rollout_weights(batch, weights, metrics)
            weights = [weight * of_rollouts.get(key, 1.0) for weight, key in zip(weights, batch.keys, strict=True)]
        weigh(batch.keys, weights)
        if self._observes():
            with marked_timer("observe", self.timing_raw, color="blue"):
                self._observe(batch, metrics)
        return batch

    def _rollout_weights(self, batch: Any, weights: Sequence[float], metrics: dict[str, Any]) -> dict[str, float]:
        """Weight of each rollout by its key, by the rounds' rollout rule; logs what was dropped and what it cost."""
        own = [key for key, _ in _own(batch)]
        weight_of = {uid_of(key): weight for key, weight in zip(batch.keys, weights, strict=True)}
        with marked_timer("weigh", self.timing_raw, color="blue"):
            groups = self.policy.groups(own, self._problems(own), referred=self.use_reference_policy)
            weighed = self.rounds.weigh(self.policy, list(groups.values()), [weight_of[uid] for uid in groups])
        metrics |= {f"gradstore/{name}": value for name, value in weighed.scalars().items()}
        weights_of = dict(zip(groups, weighed.weights, strict=True))
        return {key: float(weights_of[uid_of(key)][number]) for key, number in rollout_numbers(own).items()}

    def _observes(self) -> bool:
        """Whether this step's rollouts become rows. Ahead of training, steps and passes over the picks do not match."""
        if self.settings.asynchronous:
            return self.settings.rounds.observe != "none"
        drawn = len(self.sampler.order) - self.sampler.left
        return self.settings.rounds.observes(drawn, len(set(self.sampler.order)))

    def _observe(self, batch: Any, metrics: dict[str, Any]) -> None:
        """Sketch a step's rollouts. Those of an earlier policy only if the objective has importance ratios."""
        tags_of: dict[str, list[dict[str, Any]]] = {}
        own = []
        for key, tag in _own(batch):
            own.append(key)
            tags_of.setdefault(uid_of(key), []).append(tag)
        if self.settings.asynchronous and not self.settings.rounds.spec.objective.importance:
            fresh = {uid for uid, tags in tags_of.items() if versions_of(tags) == {self.policy.step}}
            metrics["gradstore/observe/of_earlier_policies"] = len(tags_of) - len(fresh)
            own = [key for key in own if uid_of(key) in fresh]
        if own:
            groups = self.policy.groups(own, self._problems(own), referred=self.use_reference_policy)
            self.rounds.observe(self.policy, joined([groups[uid] for uid in sorted(groups)]))


def _own(batch: Any) -> list[tuple[str, dict[str, Any]]]:
    """Keys and tags of the rollouts in a batch, without the rows that verl fills it up with."""
    rows = zip(batch.keys, batch.tags, strict=True)
    return [(key, tag) for key, tag in rows if not tag.get("is_padding", False)]


class SelectingTrainer(Selecting, PPOTrainerSync):
    """verl's synchronous trainer, training on the rounds' picks."""

    def get_llm_client(self) -> SeededClient:
        return self.llm_server_manager.get_client(client_cls=SeededClient)

    def rest_engine(self) -> None:
        """Have the rollout engine give its memory to the actor."""
        self.checkpoint_manager.sleep_replicas()

    def wake_engine(self, step: int) -> None:
        """Give the rollout engine the actor's weights, those of `step`."""
        self.checkpoint_manager.update_weights(step)


class SelectingAheadTrainer(Selecting, PPOTrainerColocateAsync):
    """verl's trainer that generates ahead of training (colocate_async), training on the rounds' picks.

    Training rollouts under way when the engine rests are broken off and go on when it wakes, as at verl's own steps.
    """

    def get_llm_client(self) -> SeededResumingClient:
        return self.llm_server_manager.get_client(client_cls=SeededResumingClient)

    def rest_engine(self) -> None:
        """Break off what is generated, and have the rollout engine give its memory to the actor."""
        self.checkpoint_manager.abort_replicas()
        self.checkpoint_manager.sleep_replicas()

    def wake_engine(self, step: int) -> None:
        """Give the rollout engine the actor's weights, those of `step`, and let it go on."""
        self.checkpoint_manager.update_weights(step)
        self.checkpoint_manager.resume_generation_replicas()
