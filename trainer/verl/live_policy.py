"""verl's live policy for selection rounds; implements `gradstore.trainer.round.policy.Policy`.

Rollouts use the same path as training: verl's agent loop, rollout engine and rewards. So there is no second model and
no second reward. Sketches and probes run in the actor's ranks (worker.py). The rollout engine and the actor share the
device: as in a training step, the engine sleeps while the actor works, and wakes with the actor's weights. A round's
rollouts all come from the weights that sketch them; where verl generates ahead of training that is checked.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import transfer_queue as tq
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.utils import tensordict_utils

from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.gradients.ranks import deal, gather
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.probing.calibration import Calibration
from gradstore.engine.rollouts.group import Group
from gradstore.engine.rollouts.solutions import solution_groups
from gradstore.engine.sketches.bases import SketcherFiles
from gradstore.engine.sketches.rollout_sketches import RolloutSketches
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.errors import GradstoreError
from gradstore.trainer.verl.settings import VerlSettings
from gradstore.trainer.verl.transfer import PARTITION, Rows, groups_of, rows_of, uid_of, versions_of, wait_for


class LivePolicy:
    """The policy of a running trainer; create it after the trainer's workers and agent loops have started."""

    def __init__(self, trainer: Any, settings: VerlSettings) -> None:
        self._trainer, self._settings = trainer, settings
        self._calls = 0
        self._aimed = False
        """Whether the ranks hold a probe direction in memory."""
        self._takes_turns = bool(trainer.config.actor_rollout_ref.rollout.free_cache_engine)
        """Whether the rollout engine frees its memory while it sleeps; if not, it never has to sleep."""
        self.awake = True
        """Whether the rollout engine holds the current weights and can generate; the trainer updates this value."""

    @property
    def step(self) -> int:
        """Training steps done; verl's `global_steps` also counts the step it is about to do."""
        return max(self._trainer.global_steps - 1, 0)

    def roll_out(self, problems: Sequence[Mapping[str, Any]], n: int, *, seed: int) -> list[Group]:
        """Sample and score n rollouts per problem, through verl's agent loop and rewards.

        With a KL term they have the reference policy's log-probabilities, where the rewards have a signal.
        GradstoreError when the rollout engine failed on a problem, or wrote with other weights than the actor's.
        """
        if not problems:
            return []
        self._wake()
        self._calls += 1
        uids = [f"select-{self._calls:06d}-{i:06d}" for i in range(len(problems))]
        rows = rows_of(self._trainer.train_dataset, problems, uids, n, (seed,) if self._settings.seeded else None)
        return self._generated(rows, [record["id"] for record in problems])

    def solutions(self, problems: Sequence[Mapping[str, Any]]) -> list[Group]:
        """The problems' reference solutions, after their prompts as verl renders them."""
        arguments = self._trainer.config.data.get("apply_chat_template_kwargs", None)
        return solution_groups(
            problems, self._trainer.tokenizer, template_kwargs=None if arguments is None else dict(arguments)
        )

    def fit(self, spec: SketchSpec, groups: Sequence[Group], benchmark: Sequence[Group] = ()) -> SketcherFiles:
        """Make the sketcher on every rank; a fitted basis is fitted to the groups and the benchmark.

        Every rank reads all groups, from Ray's shared memory, and runs its share of them.
        """
        self._rest()
        with _plain_errors():
            files: list[SketcherFiles] = self._workers.fit_sketcher(
                spec, ray.put(list(groups)), ray.put(list(benchmark))
            )
        return files[0]

    def use(self, fingerprint: dict, attachments: Mapping[str, bytes]) -> None:
        """Make a store's sketcher on every rank; RequestError, with the reason, if rows would not be comparable."""
        self._rest()
        with _plain_errors():
            self._workers.use_sketcher(fingerprint, dict(attachments), self._settings.rounds.spec.token_budget)

    def sketch(self, groups: Sequence[Group]) -> SketchBatch:
        """Sketch the groups; each group is computed by one rank."""
        return self._on_ranks("sketch_groups", groups)

    def sketch_rollouts(self, groups: Sequence[Group], objective: Objective | None = None) -> RolloutSketches:
        """Sketch each rollout of the groups for itself; each group is computed by one rank."""
        return self._on_ranks("sketch_rollouts", groups, objective)

    def aim(self, groups: Sequence[Group]) -> SketchBatch:
        """Sketch validation groups, each on one rank; the ranks keep the gradient as this round's probe direction."""
        self._aimed = True
        return self._on_ranks("aim", groups)

    def probe(self, groups: Sequence[Group], like: Calibration | None = None) -> ProbeBatch:
        """Probe the groups along the gradient of the validation groups passed to `aim`."""
        return self._on_ranks("probe_groups", groups, self._settings.probe_rank, like)

    def end_round(self) -> None:
        """Free the probe direction and wake the rollout engine for training."""
        if self._aimed:
            self._aimed = False
            self._workers.forget_direction()
        self._wake()

    def _on_ranks(self, method: str, groups: Sequence[Group], *options: Any) -> Any:
        """Results of a worker's method for the groups, each computed by one rank, in the groups' order."""
        self._rest()
        n_ranks = self._workers.world_size
        shares = deal(groups, n_ranks)
        with _plain_errors():
            parts = [[groups[i] for i in share] for share in shares]
            batches = getattr(self._workers, method)(parts, *([option] * n_ranks for option in options))
        return gather(batches, shares)

    @property
    def _workers(self) -> Any:
        return self._trainer.actor_rollout_wg

    def _generated(self, rows: Rows, ids: Sequence[str]) -> list[Group]:
        trainer = self._trainer
        tensordict_utils.assign_non_tensor_data(rows.batch, "global_steps", trainer.global_steps)
        trainer._submit_batch_to_rollout(rows.batch)
        keys, failed = wait_for(rows.uids)
        try:
            if failed:
                names = ", ".join(repr(ids[rows.uids.index(uid)]) for uid in sorted(failed)[:5])
                raise GradstoreError(
                    f"verl's rollout engine failed on {len(failed)} of {len(ids)} problems ({names}); "
                    "the agent loop workers' log says why"
                )
            if trainer.reward_loop_manager.reward_loop_worker_handles is None:
                # A reward model on the same device scores after generation, as in verl's own step.
                self._rest()
                trainer._compute_reward_colocate(
                    tq.KVBatchMeta(partition_id=PARTITION, keys=keys, tags=[{}] * len(keys))
                )
                self._wake()
            self._check_version(keys)
            found = self.groups(keys, dict(zip(rows.uids, ids, strict=True)))
        finally:
            tq.kv_clear(keys=[*rows.uids, *keys], partition_id=PARTITION)
        return [found[uid] for uid in rows.uids]

    def groups(self, keys: Sequence[str], id_of: Mapping[str, str], *, referred: bool = False) -> dict[str, Group]:
        """Groups of rollouts in the queue by uid, with what the sketches' objective needs.

        id_of: uid -> problem id. referred: whether the queue has the reference policy's log-probabilities.
        """
        has_kl = self._settings.rounds.spec.objective.kl_beta > 0
        found = groups_of(keys, id_of, logprobs=self._settings.logprobs, reference=has_kl and referred)
        if has_kl and not referred:
            live = [key for key in keys if found[uid_of(key)].has_signal]
            if live:
                self._refer(live)
                found |= groups_of(live, id_of, logprobs=self._settings.logprobs, reference=True)
        return found

    def _refer(self, keys: Sequence[str]) -> None:
        """Have verl compute the reference's log-probabilities of rollouts, into the queue."""
        self._rest()
        trainer, settings = self._trainer, self._trainer.config.actor_rollout_ref
        forwards = settings.rollout if trainer.ref_in_actor else settings.ref
        multiple = self._workers.world_size
        if not forwards.log_prob_use_dynamic_bsz:
            multiple *= int(forwards.log_prob_micro_batch_size_per_gpu or 1)
        tags = tq.kv_list(PARTITION)[PARTITION]
        batch = tq.KVBatchMeta(partition_id=PARTITION, keys=list(keys), tags=[dict(tags[key]) for key in keys])
        batch = upsample_batch_to_divisible_size(batch, multiple, trainer.tokenizer.eos_token_id)
        try:
            trainer._compute_ref_log_prob(batch, {})
        finally:
            padding = batch.keys[len(keys) :]
            if padding:
                tq.kv_clear(keys=padding, partition_id=PARTITION)

    def _check_version(self, keys: Sequence[str]) -> None:
        """GradstoreError if the rollout engine says that it wrote with other weights than those that sketch."""
        tags = tq.kv_list(PARTITION)[PARTITION]
        wrong = versions_of([tags[key] for key in keys]) - {self.step}
        if wrong:
            raise GradstoreError(
                f"rollouts of a round at step {self.step} are of the policy of step {min(wrong)}: "
                "the rollout engine's weights were not those of the actor"
            )

    def _wake(self) -> None:
        if not self.awake:
            self._trainer.wake_engine(self.step)
            self.awake = True

    def _rest(self) -> None:
        if self.awake and self._takes_turns:
            self._trainer.rest_engine()
            self.awake = False


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Re-raise an error of this project from a worker with its own type, instead of Ray's."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, GradstoreError):
            raise type(error.cause)(str(error.cause)) from None
        raise
