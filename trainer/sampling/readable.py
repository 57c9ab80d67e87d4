"""Which problems a reward can pay at all, found before anything is sampled rather than after hours of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from gradstore.errors import RequestError
from gradstore.trainer.sampling.reward import Reward

SHOWN = 5
"""Problems that the message of a refusal names."""


def named(problem: Mapping[str, Any], names: Mapping[str, str] | None = None) -> str:
    """What a problem is called in messages: its file and row where they are known, and its id."""
    where = (names or {}).get(problem["id"])
    return f"{f'{where}: ' if where else ''}problem {problem['id']!r}"


def readable(
    problems: Sequence[dict[str, Any]], reward: Reward, *, skip: bool = False, names: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The problems that the reward can pay, and for each of the others a line with its name and the reason.

    skip: leave the others out; otherwise they are refused together, in one RequestError with their number. names: what
    a problem is called by its id: its file and row. A reward without a check is taken to pay all.
    """
    kept, left_out = [], []
    for problem in problems:
        try:
            if reward.check is not None:
                reward.check(problem)
            kept.append(problem)
        except RequestError as error:
            reason = str(error).removeprefix(f"{named(problem)}: ")
            left_out.append(f"{named(problem, names)}: {reason}")
    if left_out and not skip:
        more = len(left_out) - SHOWN
        raise RequestError(
            f"reward {reward.name!r} cannot pay {len(left_out)} of {len(problems)} problems: "
            f"{'; '.join(left_out[:SHOWN])}{f'; and {more} more' if more > 0 else ''}. Mend them, or leave them out "
            "with --skip-unreadable, which names them all"
        )
    return kept, left_out
