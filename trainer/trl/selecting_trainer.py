"""TRL's GRPOTrainer with a selection round whenever the last round's picks are used up.

TRL's data loader draws ahead, so its sampler cannot ask for picks: they would be chosen by a policy of a step before.
Instead the rows of a generation batch are exchanged when TRL generates, for those of the round's picks in TRL's own
order (order.py). What is due follows from the number of micro-batches done, which is saved with every checkpoint.
"""

import copy
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from gradstore.errors import RequestError, needing
from gradstore.trainer.loggers import log_of
from gradstore.trainer.round.driver import Rounds
from gradstore.trainer.trl.lockstep import Lockstep
from gradstore.trainer.trl.order import Passes
from gradstore.trainer.trl.policy import TrlPolicy
from gradstore.trainer.trl.rank import Rank
from gradstore.trainer.trl.rollouts import Sampled, Scored, groups_of, sampled_of, weighted_rewards
from gradstore.trainer.trl.rows import Rows
from gradstore.trainer.trl.settings import WHERE, TrlSettings

with needing("selection in TRL", "gradstore[trl]"):
    from trl import GRPOTrainer
    from trl import __version__ as trl_version

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Base
else:
    _Base = object  # what is mixed in is the user's choice

log = logging.getLogger(__name__)

STATE = "gradstore"
"""Name of the rounds' state in TRL's trainer_state.json."""
_USED = (
    *("_generate_and_score_completions", "_calculate_rewards", "_get_per_token_logps_and_entropies"),
    *("_remove_unused_columns", "add_callback"),
)
"""Methods of GRPOTrainer that are used or replaced."""


@dataclass(frozen=True, slots=True)
class _InHand:
    """The picks of the round whose problems are being drawn."""

    number: int
    order: list[int]
    """Rows of the pool, one per draw."""
    n_picks: int
    weights: dict[str, float]
    """Of the problems whose weight is not 1."""


class Selecting(_Base):
    """Mixin for a GRPOTrainer or a subclass of it: `class Mine(Selecting, MyTrainer)`."""

    def __init__(self, *args: Any, selection: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """selection: settings by name (`TrlSettings`, `RoundSettings`); None: TRL alone. Everything else is TRL's.

        RequestError for settings that contradict TRL's, and for what rounds do not support.
        """
        self._rounds: Rounds | None = None
        self._sampling = False
        self._scored: Scored | None = None
        super().__init__(*args, **kwargs)
        if selection is not None:
            self._begin_selecting(selection)

    def _begin_selecting(self: Any, selection: Mapping[str, Any]) -> None:
        _check(self)
        data = self.train_dataset
        found = TrlSettings.of(selection, self.args, len(data), self.eval_dataset)
        self._settings = found
        self._rows = Rows(_columns(self, data), found.pool, found.benchmarks, found.id_column)
        self._rounds = Rounds(
            found.store,
            self._rows.pool,
            self._rows.benchmarks,
            found.rounds,
            name=found.pool,
            logger=self._log_round,
            export=found.export,
        )
        if found.max_steps is not None:
            self.args.max_steps = found.max_steps
        self._passes = Passes(self._rounds.settings.selected, self.args.seed, shuffle=self.shuffle_dataset)
        self._ranks = Lockstep(Rank(self, found), self.accelerator.process_index, self.accelerator.num_processes)
        self._policy = TrlPolicy(self, self._ranks)
        self._in_hand: _InHand | None = None
        self._before = 0
        """Micro-batches that were done before `_step` began to count."""
        self.add_callback(_Position(self))

    # Position and state

    @property
    def _generate_every(self: Any) -> int:
        """Micro-batches that share a generation batch."""
        return int(self.args.steps_per_generation * self.num_iterations)

    def _restore(self: Any, state: Any) -> None:
        """Before the first draw: where the run stands, from TRL's checkpoint."""
        self._in_hand, self._before = None, -self._step
        fresh = {**self._rounds.state_dict(), "rounds": 0}
        if not state.global_step:
            self._rounds.load_state_dict(fresh)
            return
        kept = state.stateful_callbacks.get(STATE)
        if kept is None:
            raise RequestError(
                f"the checkpoint of step {state.global_step} has no state of rounds: gradstore did not make it; go on "
                "without `selection`, or begin anew"
            )
        kept = kept["attributes"]
        if kept["pool"] != self._rows.digest:
            raise RequestError(
                "the checkpoint was made with another pool: the training set has other problems, or in another order"
            )
        self._rounds.load_state_dict(kept["rounds"])
        self._before += kept["micro_batches"]

    def _keep(self: Any, state: Any) -> None:
        """After each step: the state for TRL's next checkpoint, which process 0 writes."""
        kept = {
            "rounds": self._rounds.state_dict(),
            "micro_batches": self._before + self._step,
            "pool": self._rows.digest,
        }
        state.stateful_callbacks[STATE] = {"args": {}, "attributes": kept}

    # Rounds

    def _due(self: Any) -> tuple[list[int], _InHand, int]:
        """Rows of the generation batch that is due, after the round that picks them; and draws of the round so far."""
        settings = self._rounds.settings
        number, place = divmod((self._before + self._step) // self._generate_every, settings.steps)
        if self._in_hand is None or self._in_hand.number != number:
            self._in_hand = self._round(number)
        start = place * settings.train_batch
        end = start + settings.train_batch
        return self._in_hand.order[start:end], self._in_hand, end

    def _round(self: Any, number: int) -> _InHand:
        def choose() -> tuple[list[str], list[int], list[float]]:
            if self._rounds.done == number + 1:  # resumed within the round
                picked = self._rounds.current
            elif self._rounds.done != number:
                raise RequestError(f"the run comes to round {number}, but {self._rounds.done} rounds are done")
            else:
                picked = self._rounds.next(self._policy)
                self._policy.end_round()
            return picked.ids, picked.rollouts.tolist(), picked.relative_weights.tolist()

        ids, rollouts, weights = self._ranks.lead(choose)
        if any(n not in (0, self.num_generations) for n in rollouts):
            raise RequestError(
                f"{WHERE}selector {self._rounds.settings.selector!r} gives problems different numbers of rollouts; TRL "
                f"takes num_generations ({self.num_generations}) for all: use another selector"
            )
        settings = self._rounds.settings
        rows = [self._rows.place_of[name] for name in ids]
        order = self._passes.order(rows, number, settings.train_batch * settings.steps)
        log.info("round %d at step %d picked %d problems", number, self.state.global_step, len(ids))
        own = {name: weight for name, weight in zip(ids, weights, strict=True) if weight != 1}
        return _InHand(number, order, len(ids), own)

    def _log_round(self: Any, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._metrics["train"][f"gradstore/{name}"].append(float(value))
        if self._settings.logger is not None:
            log_of(self._settings.logger)(values, step)

    def sample(self: Any, ids: Sequence[str]) -> list[Sampled]:
        """Sample and score one rollout for each id on this process, as TRL does; its logs do not see them."""
        kept = self.num_generations_eval, self._metrics["eval"], self._logs
        self.num_generations_eval, self._metrics["eval"] = 1, defaultdict(list)
        self._logs, self._sampling = copy.deepcopy(kept[2]), True
        try:
            output = super()._generate_and_score_completions([self._rows.row(name) for name in ids])
        finally:
            self.num_generations_eval, self._metrics["eval"], self._logs = kept
            self._sampling = False
        return sampled_of(ids, output, self._scored)

    # TRL's steps

    def _generate_and_score_completions(self: Any, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._rounds is None or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        rows, in_hand, drawn = self._due()
        repeated = [row for row in rows for _ in range(self.num_generations)]
        first = self.accelerator.process_index * len(inputs)
        ids = [self._rows.pool[row]["id"] for row in repeated[first : first + len(inputs)]]
        output = super()._generate_and_score_completions([self._rows.row(name) for name in ids])
        if in_hand.weights:
            weights = [in_hand.weights.get(name, 1.0) for name in ids]
            output["advantages"] = output["advantages"] * output["advantages"].new_tensor(weights)
        if self._rounds.settings.observes(drawn, in_hand.n_picks):
            self._observe(sampled_of(ids, output, self._scored))
        return output

    def _observe(self: Any, sampled: list[Sampled]) -> None:
        """Sketch the batch's rollouts before the update, by the policy that sampled them."""
        everyones = gather_object(sampled)
        self._ranks.lead(lambda: self._rounds.observe(self._policy, groups_of(everyones)))

    def _calculate_rewards(self: Any, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._rounds is not None:
            first = self.accelerator.process_index * len(prompts)
            own = rewards[first : first + len(prompts)]
            self._scored = Scored(completion_ids_list, weighted_rewards(own, self.reward_weights))
        return rewards

    def _get_per_token_logps_and_entropies(
        self: Any,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: Any,
        logits_to_keep: int,
        *rest: Any,
        **named: Any,
    ) -> Any:
        if self._sampling:  # a round uses none of the log-probabilities that TRL would compute here
            return input_ids.new_zeros((len(input_ids), logits_to_keep), dtype=torch.float32), None, None
        given = (model, input_ids, attention_mask, logits_to_keep, *rest)
        return super()._get_per_token_logps_and_entropies(*given, **named)


class SelectingGRPOTrainer(Selecting, GRPOTrainer):
    """TRL's GRPOTrainer, training on the rounds' picks."""


class _Position(TrainerCallback):
    """Restores the position before the first draw and keeps it for the next checkpoint."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._restore(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._keep(state)


def _check(trainer: Any) -> None:
    """RequestError for a TRL, or a way to train with it, that rounds do not support."""
    missing = [name for name in _USED if not hasattr(GRPOTrainer, name)]
    if missing:
        raise RequestError(f"TRL {trl_version} has no GRPOTrainer.{missing[0]}: use TRL 1.16, or a newer gradstore")
    data, args, state = trainer.train_dataset, trainer.args, trainer.accelerator.state
    zero = getattr(state.deepspeed_plugin, "zero_stage", 0) if state.deepspeed_plugin is not None else 0
    plan = getattr(state, "parallelism_config", None)
    for needed, lacks in {
        "a training set": data is None,
        "a training set with a length: rounds pick rows, and a stream has none": data is not None
        and (isinstance(data, IterableDataset) or not hasattr(data, "__len__")),
        "a text model: sketches are of tokens alone": trainer._is_vlm,
        "multi_objective_aggregation='sum_then_normalize': rounds have one reward per rollout": (
            trainer.multi_objective_aggregation != "sum_then_normalize"
        ),
        "one process for each GPU (torchrun, accelerate launch)": args.n_gpu > 1,
        "DeepSpeed's ZeRO stage 2 or lower, or FSDP2: sketches need the weights of whole layers": zero > 2,
        "fsdp_version 2: sketches read a policy sharded by FSDP2": _is_fsdp1(trainer),
        "data parallelism alone (tp_size, cp_size and sp_size of 1)": plan is not None
        and any(getattr(plan, f"{kind}_size", 1) > 1 for kind in ("tp", "cp", "sp")),
    }.items():
        if lacks:
            raise RequestError(f"{WHERE}rounds in TRL need {needed}")


def _is_fsdp1(trainer: Any) -> bool:
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return bool(trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2)


def _columns(trainer: Any, data: Any) -> Any:
    """The data set as TRL hands it on (`remove_unused_columns`)."""
    return trainer._remove_unused_columns(data, "training") if hasattr(data, "column_names") else data
