"""Check which problems a reward can grade, before sampling instead of after hours of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from gradstore.errors import RequestError
from gradstore.trainer.sampling.reward import Reward

SHOWN = 2
"""Maximum number of problems named in the error message."""


def named(problem: Mapping[str, Any], names: Mapping[str, str] | None = None) -> str:
    """A problem's name in messages: its file and row, if known, and its id."""
    where = (names or {}).get(problem["id"])
    return f"{f'{where}: ' if where else ''}problem {problem['id']!r}"


def readable(
    problems: Sequence[dict[str, Any]], reward: Reward, *, skip: bool = False, names: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """(problems that the reward can grade; for each other problem, a line with its name and the reason).

    skip: leave the other problems out; if False, one RequestError names them. names: problem id -> file and row, for
    messages. A reward without a check is assumed to grade all problems.
    """
    faults = reward.faults(problems)
    kept = [problem for problem, fault in zip(problems, faults, strict=True) if fault is None]
    left_out = [
        f"{named(problem, names)}: {fault}"
        for problem, fault in zip(problems, faults, strict=True)
        if fault is not None
    ]
    if left_out and not skip:
        more = len(left_out) - SHOWN
        shown, expected = _expected_once(left_out[:SHOWN])
        raise RequestError(
            f"reward {reward.name!r} cannot pay {len(left_out)} of {len(problems)} problems: "
            f"{'; '.join(shown)}{f'; and {more} more' if more > 0 else ''}. {expected}Mend them, or leave them out "
            "with --skip-unreadable, which names them all"
        )
    return kept, left_out


def _expected_once(reasons: list[str]) -> tuple[list[str], str]:
    """(the reasons, a sentence): what all reasons say was expected is said once, in the sentence."""
    heads, ends = zip(
        *((head, end) for head, _, end in (reason.partition("; expected ") for reason in reasons)), strict=True
    )
    if len(set(ends)) > 1 or not ends[0]:
        return reasons, ""
    return list(heads), f"Expected {ends[0]}. "
