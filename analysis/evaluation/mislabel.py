"""Finding wrong labels: problems whose score says that they are explained by nothing but themselves."""

import numpy as np

from gradstore.analysis.suspicion import auc
from gradstore.errors import RequestError


def mislabel_auc(suspicion_P: np.ndarray, wrong_P: np.ndarray) -> float:
    """Chance that a wrong label scores above a right one, ties counting half; nan scores are left out.

    suspicion_P: high for those suspected, such as `scores.self_influence`. wrong_P: bool, the truth.
    RequestError where shapes do not fit, or all or none are wrong.
    """
    if np.shape(suspicion_P) != np.shape(wrong_P):
        raise RequestError(f"scores {np.shape(suspicion_P)} and labels {np.shape(wrong_P)} do not fit")
    wrong_P = np.asarray(wrong_P, bool)
    if wrong_P.all() or not wrong_P.any():
        raise RequestError("all or none of the labels are wrong: there is nothing to tell apart")
    return auc(np.asarray(suspicion_P, np.float64), wrong_P)
