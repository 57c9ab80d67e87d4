"""The policy-gradient objective of one problem, as one weight per response token.

The objective of a problem with rollouts y_1..y_G is J = sum_j sum_t w_jt * log pi(y_jt | x, y_j<t), so that its
gradient is the policy gradient in the ascent direction. The weight is advantage x aggregation, times the importance
ratio when behaviour log-probabilities are used. Nothing outside the problem enters a weight, so the gradient of a
problem does not depend on the batch, the rank or the file it came in. Formulas and sources: docs/methods.md.
"""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from gradstore.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

Advantage = Literal["mean", "mean_std", "rloo"]
Aggregation = Literal["seq-mean-token-sum", "seq-mean-token-mean", "token-mean"]


@dataclass(frozen=True, slots=True)
class Objective:
    """How rewards become token weights. Part of a store's fingerprint."""

    advantage: Advantage = "mean"
    """`mean`: r - mean(r) (Dr. GRPO, GradAlign). `mean_std`: divided by the group's deviation too (GRPO).
    `rloo`: r minus the mean of the other rewards."""
    aggregation: Aggregation = "seq-mean-token-mean"
    """How token terms are averaged, named as verl's `loss_agg_mode`, within the problem."""
    importance: bool = False
    """Multiply by pi / behaviour policy, token by token; needs the rollouts' log-probabilities."""
    clip_low: float | None = None
    """With importance: no gradient where the advantage is negative and the ratio below 1 - clip_low (PPO)."""
    clip_high: float | None = None
    """With importance: no gradient where the advantage is positive and the ratio above 1 + clip_high (PPO)."""
    temperature: float = 1.0
    """Logits are divided by it before log-probabilities are taken."""

    def __post_init__(self) -> None:
        if self.advantage not in get_args(Advantage):
            raise RequestError(f"advantage {self.advantage!r} is not one of {', '.join(get_args(Advantage))}")
        if self.aggregation not in get_args(Aggregation):
            raise RequestError(f"aggregation {self.aggregation!r} is not one of {', '.join(get_args(Aggregation))}")
        if not self.temperature > 0:
            raise RequestError(f"temperature is {self.temperature}, expected a number above 0")
        if not self.importance and (self.clip_low, self.clip_high) != (None, None):
            raise RequestError("clip_low and clip_high need importance=True")

    def as_dict(self) -> dict:
        return asdict(self)


PRESETS: dict[str, Objective] = {
    "gradalign": Objective("mean", "seq-mean-token-mean"),
    "grpo": Objective("mean_std", "seq-mean-token-mean"),
    "dr_grpo": Objective("mean", "seq-mean-token-sum"),
}


def objective(preset: str, **changes: object) -> Objective:
    """The preset with fields replaced; RequestError for a name that is not in PRESETS."""
    if preset not in PRESETS:
        raise RequestError(f"objective {preset!r} is not one of {', '.join(PRESETS)}")
    return replace(PRESETS[preset], **changes)  # type: ignore[arg-type]


def advantages(rewards_G: np.ndarray, kind: Advantage) -> np.ndarray:
    """Advantages of a group, float64 [G]; all zero when the rewards are equal or there is one rollout.

    mean: Dr. GRPO (arXiv 2503.20783). mean_std: GRPO (arXiv 2402.03300), sample deviation (n - 1) plus 1e-6 as in
    verl. rloo: arXiv 2402.14740, the same as mean x G / (G - 1).
    """
    centred_G = rewards_G - rewards_G.mean()
    if len(rewards_G) == 1 or rewards_G.max() == rewards_G.min():
        return np.zeros_like(centred_G)
    if kind == "mean_std":
        return centred_G / (rewards_G.std(ddof=1) + 1e-6)
    if kind == "rloo":
        return centred_G * (len(rewards_G) / (len(rewards_G) - 1))
    return centred_G


def rollout_weights(rewards_G: np.ndarray, lengths_G: np.ndarray, objective: Objective) -> np.ndarray:
    """Weight of every token of each rollout before importance ratios, float64 [G].

    rewards_G: float64. lengths_G: response tokens; an empty response has weight 0 but counts in the baseline and in
    the number of sequences.
    """
    advantages_G = advantages(rewards_G, objective.advantage)
    n_rollouts = len(rewards_G)
    if objective.aggregation == "seq-mean-token-sum":
        weights_G = advantages_G / n_rollouts
    elif objective.aggregation == "seq-mean-token-mean":
        weights_G = advantages_G / (n_rollouts * np.maximum(lengths_G, 1))
    else:
        weights_G = advantages_G / max(int(lengths_G.sum()), 1)
    return np.where(lengths_G > 0, weights_G, 0.0)


def importance_weights(
    logprobs_N: "Tensor", behaviour_N: "Tensor", weights_N: "Tensor", clip_low: float | None, clip_high: float | None
) -> "Tensor":
    """Token weights times the importance ratio, zero where PPO's clipped surrogate has no gradient.

    logprobs_N, behaviour_N: log-probabilities of the same tokens under the current and the behaviour policy.
    The gradient of min(ratio A, clip(ratio) A) is ratio x A x grad log pi where the first term is the smaller one,
    and zero elsewhere (PPO, arXiv 1707.06347, equation 7).
    """
    import torch  # Here, so that statistics of stored probes do not wait for it.

    ratio_N = torch.exp(logprobs_N - behaviour_N)
    clipped_N = torch.zeros_like(weights_N, dtype=torch.bool)
    if clip_high is not None:
        clipped_N |= (weights_N > 0) & (ratio_N > 1 + clip_high)
    if clip_low is not None:
        clipped_N |= (weights_N < 0) & (ratio_N < 1 - clip_low)
    return torch.where(clipped_N, 0.0, weights_N * ratio_N)
