"""Soft sampling: random picks without replacement; better scores have a higher probability.

P candidates.
"""

import numpy as np

from gradstore.errors import check_number


def softened(scores_P: np.ndarray, temperature: float, random: np.random.Generator) -> np.ndarray:
    """Random keys, float64 [P]: the n largest are a draw without replacement, with weights exp(score / (T sd)).

    The Gumbel top-k trick (Kool, van Hoof, Welling, ICML 2019): score / sd + T Gumbel noise. sd is the standard
    deviation of the candidates' scores, so a temperature means the same for every selector and target. T = 0 keeps the
    ranking. At T = 1 a score one sd higher is e times likelier. A large T is close to uniform. NaN scores stay NaN.
    """
    check_number("temperature", temperature, least=0)
    ranked_P = np.isfinite(scores_P)
    if temperature == 0 or not ranked_P.any():
        return scores_P
    spread = float(scores_P[ranked_P].std())
    return scores_P / (spread or 1.0) + temperature * random.gumbel(size=len(scores_P))
