"""Mislabel detection: AUC of a suspicion score, such as self-influence, for wrong labels."""

import numpy as np

from gradstore.analysis.suspicion import auc
from gradstore.errors import RequestError


def mislabel_auc(suspicion_P: np.ndarray, wrong_P: np.ndarray) -> float:
    """AUC: probability that a wrong label scores above a right one; ties count half, nan scores are left out.

    suspicion_P: high for suspicious problems, for example `scores.self_influence`. wrong_P: bool, the truth.
    RequestError if shapes do not fit, or if all or none are wrong.
    """
    if np.shape(suspicion_P) != np.shape(wrong_P):
        raise RequestError(f"scores {np.shape(suspicion_P)} and labels {np.shape(wrong_P)} do not fit")
    wrong_P = np.asarray(wrong_P, bool)
    if wrong_P.all() or not wrong_P.any():
        raise RequestError("all or none of the labels are wrong: there is nothing to tell apart")
    return auc(np.asarray(suspicion_P, np.float64), wrong_P)
