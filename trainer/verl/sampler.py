"""Sampler of verl's data loader: draws the rounds' picks from the pool; and the records of verl's data set.

After each round the picks are fed in, once per pass until the next round, each pass in a new order. The sampler's state
is the fed order and the number of draws. verl's `StatefulDataLoader` saves it in every checkpoint, so a resumed run
continues with the very next problem. The loader must not draw ahead (data.dataloader_num_workers=0): otherwise problems
would count as drawn without being trained on.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Sampler

from gradstore.errors import RequestError
from gradstore.problems import from_verl
from gradstore.trainer.feed import drawing_order as drawing_order


class RoundSampler(Sampler[int]):
    """Yields the pool's row numbers of the fed problems, in the order they were fed."""

    def __init__(self, ids: Sequence[str]) -> None:
        """ids: the pool's problem ids, in the order of its rows; RequestError if an id occurs twice."""
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
            # Count the draw before yielding: the loader takes its snapshot between two draws.
            self._drawn += 1
            yield self._row_of[name]

    def row_of(self, name: str) -> int:
        """A problem's row in the pool."""
        return self._row_of[name]

    @property
    def left(self) -> int:
        """Remaining draws before a round must feed more."""
        return len(self._order) - self._drawn

    @property
    def order(self) -> list[str]:
        """Ids fed by the last round, in drawing order."""
        return list(self._order)

    @property
    def rollouts(self) -> dict[str, int]:
        """Rollouts per problem id, for problems that do not use verl's default number."""
        return dict(self._rollouts)

    @property
    def weights(self) -> dict[str, float]:
        """Loss weight per problem id, for problems whose weight is not 1."""
        return dict(self._weights)

    def feed(
        self,
        order: Sequence[str],
        rollouts: Mapping[str, int] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Set the ids to draw next; RequestError if earlier ones are not used up, or for an id outside the pool.

        rollouts: for problems that do not use verl's default number. weights: for problems whose weight is not 1.
        """
        if self.left:
            raise RequestError(f"the sampler was fed with {self.left} problems still to draw")
        unknown = next((name for name in order if name not in self._row_of), None)
        if unknown is not None:
            raise RequestError(f"the round picked problem {unknown!r}, which data.train_files does not have")
        self._order, self._drawn = list(order), 0
        self._rollouts, self._weights = dict(rollouts or {}), dict(weights or {})

    def keep(self, rounds: dict[str, Any]) -> None:
        """Store the rounds' state in the sampler's state."""
        self._rounds = rounds

    @property
    def rounds(self) -> dict[str, Any]:
        """The state last passed to `keep`; empty before the first round."""
        return self._rounds

    def state_dict(self) -> dict[str, Any]:
        """State as plain values: fed ids, number drawn, rollouts and weights, the rounds' state, the pool's digest."""
        return {
            "pool": self._pool,
            "order": list(self._order),
            "drawn": self._drawn,
            "rollouts": dict(self._rollouts),
            "weights": dict(self._weights),
            "rounds": self._rounds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`; RequestError if it is of another pool or another sampler."""
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
        self._weights = dict(state.get("weights", {}))  # old checkpoints have no weights


def records_of(dataset: Any, where: str) -> list[dict[str, Any]]:
    """Canonical records of verl's dataset, in its order; RequestError for rows without an id or with other fields."""
    if not hasattr(dataset, "dataframe"):
        raise RequestError(f"{where}: dataset class {type(dataset).__name__} has no `dataframe` to read problems from")
    records = []
    for row, given in enumerate(dataset.dataframe):
        fields = dict(given)
        if dataset.prompt_key != "prompt":
            fields["prompt"] = fields.pop(dataset.prompt_key)
        records.append(from_verl(fields, f"{where}, row {row + 1}"))
    return records
