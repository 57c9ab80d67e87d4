"""Soft sampling: picks drawn without replacement, the better the likelier.

P candidates.
"""

import numpy as np

from gradstore.errors import RequestError


def softened(scores_P: np.ndarray, temperature: float, random: np.random.Generator) -> np.ndarray:
    """Keys whose n largest are a draw of n candidates, one after the other, with chances exp(score / (T sd)).

    The Gumbel top-k trick (Kool, van Hoof, Welling, ICML 2019): score / sd + T Gumbel noise. sd is the standard
    deviation of the candidates' scores, so that a temperature means the same for every selector and target. 0 is the
    ranking itself; at 1 a score one sd higher is e times likelier; large is uniform. float64 [P], NaN where the score
    is.
    """
    if not 0 <= temperature < np.inf:
        raise RequestError(f"temperature is {temperature}, expected a finite number of at least 0")
    ranked_P = np.isfinite(scores_P)
    if temperature == 0 or not ranked_P.any():
        return scores_P
    spread = float(scores_P[ranked_P].std())
    return scores_P / (spread or 1.0) + temperature * random.gumbel(size=len(scores_P))
