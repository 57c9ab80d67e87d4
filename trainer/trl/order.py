"""The order in which TRL draws, for the picks of a round.

TRL's `RepeatSampler` draws one permutation of the data set per epoch, all from one generator, and cuts it into batches.
Here a pass over the picks is an epoch. With the whole pool as picks, the batches are those of TRL alone.
"""

from collections.abc import Sequence

import torch


class Passes:
    """Permutations of n picks: number k is the one that TRL would draw for epoch k of a data set of n rows."""

    def __init__(self, n: int, seed: int, *, shuffle: bool) -> None:
        """shuffle: False: every pass is in the picks' own order (TRL's `shuffle_dataset=False`)."""
        self._n, self._shuffle = n, shuffle
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: list[list[int]] = []

    def of(self, number: int) -> list[int]:
        """The permutation of pass `number`, counted over the whole run."""
        while len(self._drawn) <= number:
            drawn = torch.randperm(self._n, generator=self._generator).tolist() if self._shuffle else range(self._n)
            self._drawn.append(list(drawn))
        return self._drawn[number]

    def order(self, picks: Sequence[int], number: int, n_draws: int) -> list[int]:
        """Row numbers to draw in round `number`, as many as `n_draws`, a multiple of the picks.

        picks: row numbers of the round's n picks; they are permuted from ascending order, as TRL does with a data set.
        """
        rows, n_passes = sorted(picks), n_draws // self._n
        return [rows[i] for k in range(number * n_passes, (number + 1) * n_passes) for i in self.of(k)]
