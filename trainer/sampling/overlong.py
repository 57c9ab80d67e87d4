"""DAPO's overlong reward shaping: a penalty that grows with a response's length near the limit.

A response that fills max_new_tokens was mostly cut off. Paying it like a short one gives noise, so the last `buffer`
tokens before the limit are penalised softly (arXiv 2503.14476, equation 13). The rewards are shaped where they are
made, so that what is sketched, probed and trained on is the same.
"""

from collections.abc import Sequence

import numpy as np

from gradstore.errors import RequestError, check_number

OVERLONG = "reward_overlong"
"""Member of a rollout row's `extra`: the penalty that its reward includes."""


def penalties(
    lengths: Sequence[int] | np.ndarray, max_new_tokens: int, buffer: int, penalty: float = 1.0
) -> np.ndarray:
    """What to add to the rewards of responses of these lengths in tokens, float64 [lengths]; none is above zero.

    0 up to max_new_tokens - buffer tokens, from there linear to -penalty at max_new_tokens. A buffer of 0: all zero.
    """
    if not buffer:
        return np.zeros(len(lengths))
    beyond = np.asarray(lengths, np.float64) - (max_new_tokens - buffer)
    return -penalty * np.clip(beyond / buffer, 0.0, 1.0)


def check_overlong(max_new_tokens: int, buffer: int, penalty: float) -> None:
    """RequestError for a buffer that is no part of max_new_tokens, or a penalty that is not above 0."""
    check_number("overlong_buffer", buffer, least=0)
    if buffer > max_new_tokens:
        raise RequestError(f"overlong_buffer is {buffer} tokens, expected at most max_new_tokens, {max_new_tokens}")
    check_number("overlong_penalty", penalty, above=0)
