"""Conversion between problem records, rows of verl's TransferQueue, and rollout groups.

A rollout's key is UID_SESSION_OUTPUT: its row, its number, the turn's output. gradstore makes the uids; they sort like
the rows, so a batch has the same order in every run.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from verl.utils import tensordict_utils
from verl.utils.dataset.rl_dataset import collate_fn

from gradstore.engine.rollouts import group
from gradstore.engine.rollouts.group import Group
from gradstore.problems import to_verl
from gradstore.trainer.sampling.backends import derived_seed
from gradstore.trainer.verl.agent_loop import SEED_FIELD

PARTITION = "train"
ROLLOUTS_FIELD = "__rollout_n__"
"""Field of a row with its number of rollouts, if that is not rollout.n."""
FIELDS = ["prompts", "responses", "response_mask", "rm_scores"]
LOGPROBS = "rollout_log_probs"
REFERENCE = "ref_log_prob"
WEIGHT_FIELD = "gradstore_weight"
"""Field of a row with the weight of its rollouts in the loss."""
_LONGEST_WAIT = 1.0


@dataclass(frozen=True, slots=True)
class Rows:
    """Prompts ready for verl's agent loop."""

    batch: TensorDict
    uids: list[str]


def rows_of(
    dataset: Any, problems: Sequence[Mapping[str, Any]], uids: Sequence[str], n: int, seed: tuple[int, ...] | None
) -> Rows:
    """Rows for verl's agent loop, as the trainer's dataset would make them, with n rollouts per problem.

    dataset: its class converts the records to rows. seed: each row's seed is derived from it; None: unseeded.
    """
    view = copy.copy(dataset)
    view.dataframe = [_fields(record, dataset.prompt_key) for record in problems]
    columns = collate_fn([view[i] for i in range(len(problems))])
    columns["uid"] = np.array(list(uids), dtype=object)
    columns[ROLLOUTS_FIELD] = np.array([n] * len(problems), dtype=object)
    columns[SEED_FIELD] = row_seeds(seed, len(problems))
    batch = tensordict_utils.get_tensordict(columns)
    return Rows(batch, list(uids))


def row_seeds(seed: tuple[int, ...] | None, n: int) -> np.ndarray:
    """A seed for each of n rows, object [n]; -1 if seed is None."""
    return np.array([-1 if seed is None else derived_seed(*seed, i) for i in range(n)], dtype=object)


def wait_for(uids: Sequence[str]) -> tuple[list[str], set[str]]:
    """Wait until every prompt has been rolled out; returns (keys of the rollouts in order, uids that failed)."""
    wanted, pause = set(uids), 0.05
    while True:
        tags = tq.kv_list(PARTITION).get(PARTITION, {})
        states = {uid: tags.get(uid, {}).get("status", "pending") for uid in uids}
        if all(state in ("finished", "failure") for state in states.values()):
            break
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_WAIT)
    keys = [key for key in tags if uid_of(key) in wanted and key not in wanted]
    return sorted(keys, key=place_of), {uid for uid, state in states.items() if state == "failure"}


def groups_of(
    keys: Sequence[str], id_of: Mapping[str, str], *, logprobs: bool, reference: bool = False
) -> dict[str, Group]:
    """Read groups of rollouts from the queue; returns uid -> group.

    id_of: uid -> problem id. logprobs: keep the rollout engine's log-probabilities. reference: keep the reference
    policy's, which the trainer has computed. Tokens that the policy did not write (of tools, of users) are masked out.
    Several outputs of a rollout are sequences with a prompt each; as in verl, the reward is that of the last one.
    """
    keys = sorted(keys, key=place_of)
    wanted = [*FIELDS, *([LOGPROBS] if logprobs else []), *([REFERENCE] if reference else [])]
    data = tq.kv_batch_get(keys=keys, partition_id=PARTITION, select_fields=wanted)
    columns = {name: list(data[name].unbind(0)) for name in wanted}
    members: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        members.setdefault(uid_of(key), []).append(place)

    def floats(name: str, places: list[int]) -> list[np.ndarray] | None:
        given = columns.get(name)
        return None if given is None else [given[place].numpy().astype(np.float32) for place in places]

    groups = {}
    for uid, places in members.items():
        last_of = {place_of(keys[place])[1]: place for place in places}
        rollouts = {session: number for number, session in enumerate(last_of)}
        prompts = [columns["prompts"][place].numpy().astype(np.int64) for place in places]
        masks = [columns["response_mask"][place].numpy() > 0 for place in places]
        groups[uid] = Group(
            id_of[uid],
            prompts[0],
            [columns["responses"][place].numpy().astype(np.int64) for place in places],
            np.array([float(columns["rm_scores"][place].sum()) for place in last_of.values()]),
            floats(LOGPROBS, places),
            floats(REFERENCE, places),
            None if all(mask.all() for mask in masks) else masks,
            None if all(np.array_equal(prompt, prompts[0]) for prompt in prompts) else prompts,
            None
            if len(last_of) == len(places)
            else np.array([rollouts[place_of(keys[place])[1]] for place in places], dtype=np.int64),
        )
    return groups


def row_weights(keys: Sequence[str]) -> list[float]:
    """Weight of the row that each rollout in the queue was sampled for."""
    column = tq.kv_batch_get(keys=list(keys), partition_id=PARTITION, select_fields=[WEIGHT_FIELD])[WEIGHT_FIELD]
    return [float(getattr(weight, "data", weight)) for weight in column]


def weigh(keys: Sequence[str], weights: Sequence[float]) -> None:
    """Multiply the advantages of each rollout in the queue by its weight; weights of 1 write nothing."""
    if all(weight == 1 for weight in weights):
        return
    given = tq.kv_batch_get(keys=list(keys), partition_id=PARTITION, select_fields=["advantages"])["advantages"]
    rows = [row * weight for row, weight in zip(given.unbind(0), weights, strict=True)]
    scaled = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    tq.kv_batch_put(
        keys=list(keys), partition_id=PARTITION, fields=TensorDict({"advantages": scaled}, batch_size=len(rows))
    )


def rollout_numbers(keys: Sequence[str]) -> dict[str, int]:
    """Key of each output -> its rollout's position in the group that `groups_of` makes."""
    seen: dict[str, dict[int, int]] = {}
    numbers = {}
    for key in sorted(keys, key=place_of):
        sessions = seen.setdefault(uid_of(key), {})
        numbers[key] = sessions.setdefault(place_of(key)[1], len(sessions))
    return numbers


def joined(groups: Sequence[Group]) -> list[Group]:
    """Join several groups of the same problem into one; problems are in the order of their first group."""
    parts: dict[str, list[Group]] = {}
    for each in groups:
        parts.setdefault(each.problem_id, []).append(each)
    return [group.joined(same) for same in parts.values()]


def versions_of(tags: Sequence[Mapping[str, Any]]) -> set[int]:
    """Policy versions that wrote rollouts, from their tags; an engine that does not say is left out."""
    found = {tag.get(f"{which}_global_steps") for tag in tags for which in ("min", "max")}
    return {int(version) for version in found if version is not None}


def uid_of(key: str) -> str:
    """uid of the row that a rollout was sampled for."""
    return key.split("_", 1)[0]


def place_of(key: str) -> tuple[str, int, int]:
    """Sort key of a rollout: (uid, rollout number, output number)."""
    uid, session, output = key.rsplit("_", 2)
    return uid, int(session), int(output)


def _fields(record: Mapping[str, Any], prompt_key: str) -> dict[str, Any]:
    fields = to_verl(dict(record))
    if prompt_key != "prompt":
        fields[prompt_key] = fields.pop("prompt")
    return fields
