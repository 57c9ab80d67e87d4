"""Reward functions: a score for a response to a problem. rewards.py finds one by its name."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

from gradstore.errors import RequestError

log = logging.getLogger(__name__)

Item = tuple[Mapping[str, Any], str, int]
"""A response to score: (problem record, response text, number of the rollout in its group)."""


class Score(NamedTuple):
    """A response's reward."""

    value: float
    stopped: str | None = None
    """Why the response was not graded, as when it overran its time; its value is 0 then. None: it was graded."""


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
    check_many: Callable[[Sequence[Mapping[str, Any]]], Sequence[str | None]] | None = None
    """For each of many problems why the reward cannot grade it, or None, if that is faster than `check`."""

    def __call__(self, record: Mapping[str, Any], response: str, rollout_index: int) -> float:
        score = self._checked(record, rollout_index, self.score(record, response, rollout_index))
        say_stopped([(record, response, rollout_index)], [score])
        return score.value

    def many(self, items: Sequence[Item]) -> list[float]:
        """The rewards of many responses, in their order; a warning counts those that were not graded."""
        scores = self.scores(items)
        say_stopped(items, scores)
        return [score.value for score in scores]

    async def many_async(self, items: Sequence[Item]) -> list[float]:
        """`many`, awaited: the caller's event loop is not blocked."""
        if self.score_async is None:
            return await asyncio.to_thread(self.many, items)
        scores = self._all_checked(items, await self.score_async(items))
        say_stopped(items, scores)
        return [score.value for score in scores]

    def scores(self, items: Sequence[Item]) -> list[Score]:
        """The rewards of many responses, in their order, with the reasons of those that were not graded."""
        return self._all_checked(
            items, [self.score(*item) for item in items] if self.score_many is None else self.score_many(items)
        )

    def _all_checked(self, items: Sequence[Item], values: Sequence[Any]) -> list[Score]:
        if len(values) != len(items):
            raise RequestError(f"reward {self.name!r} gave {len(values)} values for {len(items)} responses")
        return [self._checked(record, j, value) for (record, _, j), value in zip(items, values, strict=True)]

    def faults(self, records: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """For each problem why the reward cannot grade it; None if it can, or if the reward has no check."""
        if self.check_many is not None:
            return list(self.check_many(records))
        return [None if self.check is None else _fault(self.check, record) for record in records]

    def _checked(self, record: Mapping[str, Any], rollout_index: int, value: Any) -> Score:
        if isinstance(value, Score):
            return value
        try:
            return Score(as_number(value, f" for rollout {rollout_index}"))
        except ValueError as error:
            raise RequestError(f"problem {record['id']!r}: reward {self.name!r} {error}") from None


def as_number(value: Any, where: str = "") -> float:
    """A reward function's value as a float: a number, a scalar of numpy or torch, or a mapping with "score".

    ValueError says what it gave instead, and `where`.
    """
    if isinstance(value, Mapping):
        if "score" not in value:
            raise ValueError(f"gave a dict without 'score' (found: {', '.join(map(str, value))})")
        value = value["score"]
    if hasattr(value, "item") and not isinstance(value, Real):  # a scalar of numpy or torch
        value = value.item() if getattr(value, "ndim", 1) == 0 else value
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"gave {value!r}{where}, expected a finite number")
    return float(value)


def say_stopped(items: Sequence[Item], scores: Sequence[Score]) -> None:
    """Warn of responses that were not graded: their number, and the first one's problem and reason."""
    stopped = [(item, score) for item, score in zip(items, scores, strict=True) if score.stopped is not None]
    if stopped:
        (record, _, rollout_index), score = stopped[0]
        log.warning(
            "%d of %d answers were not graded and score 0; the first is rollout %d of problem %r: %s",
            *(len(stopped), len(items), rollout_index, record["id"], score.stopped),
        )


def _fault(check: Callable[[Mapping[str, Any]], None], record: Mapping[str, Any]) -> str | None:
    try:
        check(record)
    except RequestError as error:
        return str(error).removeprefix(f"problem {record['id']!r}: ")
    return None
