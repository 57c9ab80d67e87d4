"""The order in which verl's data loader draws from the pool: what the rounds picked, and nothing else.

After each round the picks are fed in, as many times over as the steps until the next round go through them, each time
in a new order. What was fed and how far the loader has drawn is the sampler's state, which verl's `StatefulDataLoader`
keeps in every checkpoint: a resumed run draws on at the very next problem. The loader must not draw ahead
(data.dataloader_num_workers=0), or problems that were never trained on would count as drawn.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from gradstore.errors import RequestError


class RoundSampler(Sampler[int]):
    """Gives the pool's row numbers of the problems that were fed, in that order."""

    def __init__(self, ids: Sequence[str]) -> None:
        """ids: the pool's problem ids, in the order of its rows; RequestError where one occurs twice."""
        self._row_of = {name: row for row, name in enumerate(ids)}
        if len(self._row_of) < len(ids):
            twice = next(name for row, name in enumerate(ids) if self._row_of[name] != row)
            raise RequestError(
                f"problem id {twice!r} occurs more than once in data.train_files; make one file with ids that differ: "
                "gradstore data FILE FILE --out POOL.parquet"
            )
        self._pool = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
        self._order: list[str] = []
        self._drawn = 0
        self._rollouts: dict[str, int] = {}
        self._weights: dict[str, float] = {}
        self._rounds: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._row_of)

    def __iter__(self) -> Iterator[int]:
        while self._drawn < len(self._order):
            name = self._order[self._drawn]
            # Counted before it is handed over: the loader takes its snapshot between two draws.
            self._drawn += 1
            yield self._row_of[name]

    @property
    def left(self) -> int:
        """Draws until a round must feed more."""
        return len(self._order) - self._drawn

    @property
    def order(self) -> list[str]:
        """Ids of everything fed since the last round, in the order they are drawn."""
        return list(self._order)

    @property
    def rollouts(self) -> dict[str, int]:
        """Rollouts of the problems that should not get as many as verl is set to."""
        return dict(self._rollouts)

    @property
    def weights(self) -> dict[str, float]:
        """Of the problems whose part in a step's loss is not the usual one."""
        return dict(self._weights)

    def feed(
        self,
        order: Sequence[str],
        rollouts: Mapping[str, int] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Draw these next, the old ones being used up; RequestError for an id outside the pool, or when it is early.

        rollouts: of the problems that should not get as many as verl is set to. weights: of those that should not
        count as 1.
        """
        if self.left:
            raise RequestError(f"the sampler was fed with {self.left} problems still to draw")
        unknown = next((name for name in order if name not in self._row_of), None)
        if unknown is not None:
            raise RequestError(f"the round picked problem {unknown!r}, which data.train_files does not have")
        self._order, self._drawn = list(order), 0
        self._rollouts, self._weights = dict(rollouts or {}), dict(weights or {})

    def keep(self, rounds: dict[str, Any]) -> None:
        """What the rounds need to go on, kept in the sampler's state."""
        self._rounds = rounds

    @property
    def rounds(self) -> dict[str, Any]:
        """What `keep` was given last; empty for a run that has had no round."""
        return self._rounds

    def state_dict(self) -> dict[str, Any]:
        """Plain values: what was fed, how far it is drawn, rollouts and weight of each, the rounds' state, the pool's
        digest."""
        return {
            "pool": self._pool,
            "order": list(self._order),
            "drawn": self._drawn,
            "rollouts": dict(self._rollouts),
            "weights": dict(self._weights),
            "rounds": self._rounds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; RequestError for the state of another pool or of another sampler."""
        if not {"pool", "order", "drawn", "rollouts", "rounds"} <= state.keys():
            raise RequestError(
                "the checkpoint's sampler was not made by gradstore: resume it without gradstore, "
                "or start anew with trainer.resume_mode=disable"
            )
        if state["pool"] != self._pool:
            raise RequestError(
                "the checkpoint was made with another pool: data.train_files has other problems, or in another order"
            )
        self._order, self._drawn = list(state["order"]), int(state["drawn"])
        self._rollouts, self._rounds = dict(state["rollouts"]), dict(state["rounds"])
        self._weights = dict(state.get("weights", {}))  # checkpoints from before there were any have none


def drawing_order(picks: Sequence[str], n_draws: int, seed: int) -> list[str]:
    """The picks over and over until there are n_draws, each time through in an order of its own.

    RequestError unless n_draws is a multiple of the picks: each is trained on equally often.
    """
    if not len(picks) or n_draws % len(picks):
        raise RequestError(f"{n_draws} draws are not a multiple of {len(picks)} picks")
    random = np.random.default_rng([seed, 0x0D7A])
    return [picks[i] for _ in range(n_draws // len(picks)) for i in random.permutation(len(picks)).tolist()]
