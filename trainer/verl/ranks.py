"""Groups dealt to the actor's ranks, and their results put back in order.

A rank's share of the tokens, not of the problems, decides how long it runs: the longest group goes to the rank that has
least. Ranks may be left without any.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np

from gradstore.engine.rollouts.group import Group

Batch = TypeVar("Batch")


def deal(groups: Sequence[Group], n_ranks: int) -> list[list[int]]:
    """Which groups each rank gets, as places in `groups`; the same for the same groups."""
    tokens = np.array([sum(len(group.prompt_ids) + len(response) for response in group.responses) for group in groups])
    shares: list[list[int]] = [[] for _ in range(n_ranks)]
    loads = np.zeros(n_ranks)
    for place in np.argsort(-tokens, kind="stable").tolist():
        rank = int(loads.argmin())
        shares[rank].append(place)
        loads[rank] += tokens[place]
    return [sorted(share) for share in shares]


def gather(batches: Sequence[Batch], shares: Sequence[Sequence[int]]) -> Batch:
    """One batch of the ranks' batches, its rows where `deal` took them from.

    Batches are dataclasses of the engine: fields with a row a problem are put together, numbers of tokens added, and
    other fields are taken from the first rank, where they are the same on all.
    """
    n = sum(map(len, shares))
    places = np.concatenate([np.asarray(share, np.int64) for share in shares])
    back = np.argsort(places)
    first: Any = batches[0]
    merged = {}
    for field in fields(first):
        values = [getattr(batch, field.name) for batch in batches]
        if field.name == "n_tokens":
            merged[field.name] = sum(values)
        elif all(isinstance(value, np.ndarray) and value.ndim for value in values):
            merged[field.name] = np.concatenate(values)[back]
        elif all(isinstance(value, list) for value in values):
            joined = [row for value in values for row in value]
            merged[field.name] = [joined[i] for i in back.tolist()]
    wrong = [name for name, rows in merged.items() if name != "n_tokens" and len(rows) != n]
    if wrong:
        raise ValueError(f"{type(first).__name__}.{wrong[0]} has {len(merged[wrong[0]])} rows for {n} problems")
    return replace(first, **merged)
