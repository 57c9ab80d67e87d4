"""Convert a data set's answer column to the ground truth for a reward; one small function per form.

Each function raises ValueError, with the expected form, when the answer does not have it.
"""

import math
from collections.abc import Mapping
from typing import Any

from gradstore.trainer.sampling.grading import last_box

BOX = "\\boxed"


def plain(value: Any) -> str:
    """Text, a number or a truth value as text; 142.0 (from a float column) becomes 142."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"answer {value} is not finite")
        value = int(value) if value == int(value) else value
    if value is None:
        raise ValueError("the answer is empty")
    if not isinstance(value, str | int | float):
        raise ValueError(f"an answer must be text, a number or a truth value, not {type(value).__name__}")
    text = str(value).strip()
    if not text:
        raise ValueError("the answer is empty")
    return text


def boxed(solution: Any) -> str:
    r"""Content of a solution's last \boxed{...} or \fbox{...}, with balanced braces; `\boxed 7` gives 7."""
    text = plain(solution)
    content = last_box(text)
    if content is None:
        there = "\\boxed" in text or "\\fbox" in text
        raise ValueError(
            f"the {BOX} answer of the solution is not closed" if there else f"the solution has no {BOX} answer"
        )
    return plain(content)


def boxed_or_plain(value: Any) -> str:
    """The boxed answer if there is one, else the text."""
    text = plain(value)
    return boxed(text) if "\\boxed" in text or "\\fbox" in text else text


def after_hashes(solution: Any) -> str:
    """GSM8K's form: the number after the last ####, without thousands separators."""
    _, hashes, answer = plain(solution).rpartition("####")
    if not hashes:
        raise ValueError("the solution has no #### before its answer")
    return plain(answer.replace(",", ""))


def after_phrase(response: Any) -> str:
    """MetaMathQA's form: the text after the last `The answer is:`."""
    _, phrase, answer = plain(response).rpartition("The answer is:")
    if not phrase:
        raise ValueError("the response has no 'The answer is:'")
    return plain(answer)


def ground_truth(reward_model: Any) -> str:
    """verl's form: the ground_truth of a reward_model."""
    if not isinstance(reward_model, Mapping) or "ground_truth" not in reward_model:
        raise ValueError("the reward_model has no ground_truth")
    return plain(reward_model["ground_truth"])
