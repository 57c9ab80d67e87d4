"""Distribute groups over the ranks of a sharded or replicated policy, and put their results back in order.

A rank's run time depends on its tokens, not on its number of problems. So groups are assigned longest first, each to
the rank with the fewest tokens. A rank may get no group.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from torch import nn

from gradstore.engine.gradients.sharding import is_sharded, of_all_ranks
from gradstore.engine.rollouts.group import Group

Batch = TypeVar("Batch")


def deal(groups: Sequence[Group], n_ranks: int) -> list[list[int]]:
    """Indices into `groups` for each rank; deterministic."""
    tokens = np.array(
        [sum(len(group.prompt_of(j)) + len(response) for j, response in enumerate(group.responses)) for group in groups]
    )
    shares: list[list[int]] = [[] for _ in range(n_ranks)]
    loads = np.zeros(n_ranks)
    for place in np.argsort(-tokens, kind="stable").tolist():
        rank = int(loads.argmin())
        shares[rank].append(place)
        loads[rank] += tokens[place]
    return [sorted(share) for share in shares]


def each_its_share(
    model: nn.Module, groups: Sequence[Group], run: Callable[[list[Group]], list[Batch]], equal: Collection[str] = ()
) -> list[Batch]:
    """`run(groups)`, divided over the ranks of a sharded model: each runs its share, and all get the whole batches.

    All ranks call this together with the same groups. A rank's share may be empty. run: returns equally many batches on
    every rank. equal: as in `gather`.
    """
    if not is_sharded(model):
        return run(list(groups))
    shares = deal(groups, dist.get_world_size())
    own = run([groups[place] for place in shares[dist.get_rank()]])
    return [gather(batches, shares, equal) for batches in zip(*of_all_ranks(model, own), strict=True)]


def gather(batches: Sequence[Batch], shares: Sequence[Sequence[int]], equal: Collection[str] = ()) -> Batch:
    """Merge the ranks' batches into one, with rows in the order of the groups given to `deal`.

    Batches are dataclasses of the engine. Fields with one row per problem are concatenated and token counts are added.
    Other fields come from the first rank; they are equal on all ranks. equal: those of them that are lists or arrays.
    """
    n = sum(map(len, shares))
    places = np.concatenate([np.asarray(share, np.int64) for share in shares])
    back = np.argsort(places)
    first: Any = batches[0]
    merged = {}
    for field in fields(first):
        values = [getattr(batch, field.name) for batch in batches]
        if field.name in equal:
            continue
        if field.name == "n_tokens":
            merged[field.name] = sum(values)
        elif all(isinstance(value, np.ndarray) and value.ndim for value in values):
            merged[field.name] = np.concatenate(values)[back]
        elif all(isinstance(value, list) for value in values):
            joined = [row for value in values for row in value]
            merged[field.name] = [joined[i] for i in back.tolist()]
        elif any(value is None for value in values):  # one rank does not know it
            merged[field.name] = None
    wrong = [name for name, rows in merged.items() if name != "n_tokens" and rows is not None and len(rows) != n]
    if wrong:
        raise ValueError(f"{type(first).__name__}.{wrong[0]} has {len(merged[wrong[0]])} rows for {n} problems")
    return replace(first, **merged)
