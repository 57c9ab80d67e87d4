"""Reward functions: a score for a response to a problem. rewards.py finds one by its name."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from gradstore.errors import RequestError

Item = tuple[Mapping[str, Any], str, int]
"""A response to score: (problem record, response text, number of the rollout in its group)."""


@dataclass(frozen=True)
class Reward:
    """A reward function with a name; call it with (record, response text, rollout number) to get a float.

    Raises RequestError, naming the problem, if the function does not return a finite number.
    """

    name: str
    score: Callable[[Mapping[str, Any], str, int], Any]
    score_many: Callable[[Sequence[Item]], Sequence[Any]] | None = None
    """Scores many responses at once, in order, if that is faster (as for a judge's requests); None: one by one."""
    check: Callable[[Mapping[str, Any]], None] | None = None
    """Raises RequestError for a problem that the reward cannot grade; None: there is no check."""
    score_async: Callable[[Sequence[Item]], Awaitable[Sequence[Any]]] | None = None
    """`score_many` for callers with an event loop, if it waits for others; None: `many` runs in a thread."""

    def __call__(self, record: Mapping[str, Any], response: str, rollout_index: int) -> float:
        return self._checked(record, rollout_index, self.score(record, response, rollout_index))

    def many(self, items: Sequence[Item]) -> list[float]:
        """The rewards of many responses, in their order."""
        if self.score_many is None:
            return [self(*item) for item in items]
        return self._all_checked(items, self.score_many(items))

    async def many_async(self, items: Sequence[Item]) -> list[float]:
        """`many`, awaited: the caller's event loop is not blocked."""
        if self.score_async is None:
            return await asyncio.to_thread(self.many, items)
        return self._all_checked(items, await self.score_async(items))

    def _all_checked(self, items: Sequence[Item], values: Sequence[Any]) -> list[float]:
        if len(values) != len(items):
            raise RequestError(f"reward {self.name!r} gave {len(values)} values for {len(items)} responses")
        return [self._checked(record, j, value) for (record, _, j), value in zip(items, values, strict=True)]

    def _checked(self, record: Mapping[str, Any], rollout_index: int, value: Any) -> float:
        name = f"problem {record['id']!r}: reward {self.name!r}"
        if isinstance(value, Mapping):
            if "score" not in value:
                raise RequestError(f"{name} gave a dict without 'score' (found: {', '.join(map(str, value))})")
            value = value["score"]
        if hasattr(value, "item") and not isinstance(value, Real):  # a scalar of numpy or torch
            value = value.item() if getattr(value, "ndim", 1) == 0 else value
        if not isinstance(value, Real) or not math.isfinite(value):
            raise RequestError(f"{name} gave {value!r} for rollout {rollout_index}, expected a finite number")
        return float(value)
