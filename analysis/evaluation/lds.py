"""Linear datamodeling score (LDS): does the sum of scores over a training set predict the trained model's output?

Park et al., TRAK, ICML 2023 (arXiv 2303.14186), section 4. Dimension letters: Q queries, P problems, M training sets.
"""

import numpy as np

from gradstore.analysis.agreement import spearman
from gradstore.errors import RequestError


def lds(scores_QP: np.ndarray, subsets_MP: np.ndarray, outputs_MQ: np.ndarray) -> np.ndarray:
    """Spearman, over training sets, between the sum of scores and the trained model's output: float64 [Q].

    scores_QP: high for a problem that should raise the query's output. subsets_MP: bool, the problems that each model
    was trained on. outputs_MQ: each model's output for each query (for example its log-likelihood). A problem without a
    score (nan) counts as 0. RequestError if shapes do not fit, or for fewer than three sets.
    """
    (n_queries, n_problems), n_sets = scores_QP.shape, len(subsets_MP)
    if subsets_MP.shape != (n_sets, n_problems) or outputs_MQ.shape != (n_sets, n_queries):
        raise RequestError(
            f"scores {scores_QP.shape}, subsets {subsets_MP.shape} and outputs {outputs_MQ.shape} do not fit: "
            "expected [Q, P], [M, P] and [M, Q]"
        )
    if n_sets < 3:
        raise RequestError(f"{n_sets} training sets: a rank correlation needs at least 3")
    predicted_MQ = subsets_MP.astype(np.float64) @ np.nan_to_num(scores_QP.astype(np.float64)).T
    return np.array([spearman(predicted_MQ[:, q], outputs_MQ[:, q]) for q in range(n_queries)])


def random_subsets(n_problems: int, n_sets: int, share: float = 0.5, seed: int = 0) -> np.ndarray:
    """Seeded training sets of the same size, drawn without replacement: bool [M, P]."""
    size = round(share * n_problems)
    if not 0 < size < n_problems:
        raise RequestError(f"a share of {share} of {n_problems} problems leaves {size}: expected some and not all")
    subsets_MP = np.zeros((n_sets, n_problems), bool)
    for number, row in enumerate(subsets_MP):
        row[np.random.default_rng([seed, number]).choice(n_problems, size, replace=False)] = True
    return subsets_MP
