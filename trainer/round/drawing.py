"""Draw the candidates of each round from the pool.

`chunks` is GradAlign's rule (arXiv 2602.21492): the pool is shuffled once, and the rounds take chunks of it in turn,
again and again. A chunk that reaches the end of the order goes on at its start, so the leftover of one pass begins the
next (GradAlign's code never uses it). After any number of rounds, no problem was drawn more than once more often than
another. `independent` draws each round anew.

A draw follows from the pool's ids, the seed and the round's number alone, so a resumed run draws the same. The shuffled
order ranks each id by a hash of its own: it does not depend on the order of the pool's file, and problems that join or
leave the pool do not change the order of the others.
"""

import hashlib
from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np

Draw = Literal["chunks", "independent"]


def shuffled(ids: Collection[str], seed: int) -> list[str]:
    """The ids in a random order that depends on the seed."""
    keyed = hashlib.blake2b(digest_size=16, key=hashlib.sha256(str(seed).encode()).digest())

    def rank(problem_id: str) -> bytes:
        own = keyed.copy()
        own.update(problem_id.encode())
        return own.digest()

    return sorted(ids, key=rank)


def chunk(order: Sequence[str], size: int, number: int) -> list[str]:
    """Chunk `number` of an order, counted from 0: `size` ids, going on at the start where the order ends."""
    start = number * size % len(order)
    taken = list(order[start : start + size])
    return taken + list(order[: size - len(taken)])


def independent(ids: Sequence[str], size: int, seed: int) -> list[str]:
    """`size` of the ids at random, without regard to other rounds. seed: of this round."""
    return np.array(ids, dtype=object)[np.random.default_rng(seed).permutation(len(ids))[:size]].tolist()
