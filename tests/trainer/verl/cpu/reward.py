"""The reward of the verl tests, reached through verl's custom_reward_function: the share of digits in a response."""

from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **unused: Any
) -> float:
    return sum(character.isdigit() for character in solution_str) / max(1, len(solution_str))
