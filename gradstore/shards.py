"""Shards: a file of problems or rollouts divided among N runs that know nothing of each other.

The file is cut into blocks of consecutive problems; block b belongs to shard b mod N. So each problem is in exactly one
shard, whatever a run does with it, and every shard has problems from the whole length of the file. `rollout` samples a
block at once, with the seed of the block's number in the file: the shards' rollouts are those of an undivided run.
"""

import re
from dataclasses import dataclass
from typing import Self

import numpy as np

from gradstore.errors import RequestError

BLOCK = 64
"""Most problems in a block: as many as an undivided `rollout` samples at once."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `index` (counted from 0) of `count`."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise RequestError(f"shard {self}: expected I/N with 0 <= I < N: shards are counted from 0")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str, where: str = "--shard") -> Self:
        """The shard that "I/N" names; RequestError, beginning with `where`, for another text."""
        match = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise RequestError(
                f"{where} {text}: expected I/N with 0 <= I < N, whole numbers, as in 0/4 for the first of four"
            )
        return cls(int(match[1]), int(match[2]))

    def block(self, n: int) -> int:
        """Problems in a block of a file of n: 64, or fewer so that every shard gets one."""
        return max(1, min(BLOCK, n // self.count))

    def number(self, block: int) -> int:
        """Number in the whole file of this shard's block with the given number, both counted from 0."""
        return self.index + self.count * block

    def places(self, n: int, where: str) -> np.ndarray:
        """Places of this shard's problems in a file of n, int64, ascending.

        RequestError, beginning with `where`, for more shards than problems: one would be empty.
        """
        if n < self.count:
            raise RequestError(f"{where}: has {n} problems, too few for {self.count} shards")
        every = np.arange(n)
        mine: np.ndarray = every[every // self.block(n) % self.count == self.index]
        return mine


WHOLE = Shard()
