"""The policy-gradient objective of one problem, as one weight per response token.

The objective of a problem with rollouts y_1..y_G is J = sum_j sum_t w_jt * log pi(y_jt | x, y_j<t). Its gradient is the
policy gradient in the ascent direction. The weight is advantage x aggregation. Importance sampling multiplies it by
the importance ratio; a KL penalty to a reference policy adds a term. A weight depends only on its problem, so a
problem's gradient does not depend on the batch, the rank or the file.
Formulas and sources: docs/methods.md.

Dimension letters: G rollouts of a problem, R their responses (one each, or several outputs), N tokens.
"""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from gradstore.engine.rollouts.group import ROUNDING, differ
from gradstore.errors import RequestError, check_known, check_number

if TYPE_CHECKING:
    from torch import Tensor

Advantage = Literal["mean", "mean_std", "rloo"]
Aggregation = Literal["seq-mean-token-sum", "seq-mean-token-mean", "token-mean"]


@dataclass(frozen=True, slots=True)
class Objective:
    """How rewards become token weights. Part of a store's fingerprint."""

    advantage: Advantage = "mean"
    """`mean`: r - mean(r) (Dr. GRPO, GradAlign). `mean_std`: also divided by the group's standard deviation (GRPO).
    `rloo`: r minus the mean of the other rewards."""
    aggregation: Aggregation = "seq-mean-token-mean"
    """How token terms are averaged within the problem; names as in verl's `loss_agg_mode`."""
    importance: bool = False
    """Multiply each token by its importance ratio, pi / behaviour policy; needs the rollouts' log-probabilities."""
    clip_low: float | None = None
    """With importance: no gradient if the advantage is negative and the ratio below 1 - clip_low (PPO)."""
    clip_high: float | None = None
    """With importance: no gradient if the advantage is positive and the ratio above 1 + clip_high (PPO)."""
    temperature: float = 1.0
    """Logits are divided by this before log-probabilities are computed."""
    kl_beta: float = 0.0
    """Weight of GRPO's KL penalty to a reference policy; above 0 it needs the rollouts' log-probabilities under that
    policy (`engine.Reference`). Problems whose rewards are all equal still have no signal."""
    reference: str | None = None
    """Digest of the reference's weights; None: the reference that the rollouts were recorded with."""

    def __post_init__(self) -> None:
        check_known("advantage", self.advantage, get_args(Advantage))
        check_known("aggregation", self.aggregation, get_args(Aggregation))
        check_number("temperature", self.temperature, above=0)
        if not self.importance and (self.clip_low, self.clip_high) != (None, None):
            raise RequestError("clip_low and clip_high need importance=True")
        check_number("kl_beta", self.kl_beta, least=0)
        if self.reference is not None and not self.kl_beta:
            raise RequestError("a reference policy needs kl_beta above 0")

    @classmethod
    def from_text(cls, text: str) -> "Objective":
        """The preset of this name, for settings that are read by name."""
        return objective(text)

    def as_dict(self) -> dict:
        """The fields as a JSON-ready dict; without a KL term its settings are omitted, as in older stores."""
        unused = () if self.kl_beta else ("kl_beta", "reference")
        return {name: value for name, value in asdict(self).items() if name not in unused}


PRESETS: dict[str, Objective] = {
    "gradalign": Objective("mean", "seq-mean-token-mean"),
    "grpo": Objective("mean_std", "seq-mean-token-mean"),
    "dr_grpo": Objective("mean", "seq-mean-token-sum"),
}


def objective(preset: str, **changes: object) -> Objective:
    """The preset with fields replaced; RequestError for a name that is not in PRESETS."""
    check_known("objective", preset, PRESETS)
    return replace(PRESETS[preset], **changes)  # type: ignore[arg-type]


def advantages(rewards_G: np.ndarray, kind: Advantage) -> np.ndarray:
    """Advantages of a group, float64 [G]; all zero if the rewards are equal up to rounding.

    mean: Dr. GRPO (arXiv 2503.20783). mean_std: GRPO (arXiv 2402.03300), sample deviation (n - 1) plus 1e-6 as in
    verl. rloo: arXiv 2402.14740, the same as mean x G / (G - 1).
    """
    centred_G = rewards_G - rewards_G.mean()
    if not differ(rewards_G):
        return np.zeros_like(centred_G)
    centred_G[np.abs(centred_G) <= ROUNDING * np.abs(rewards_G).max()] = 0.0
    return _scaled(centred_G, rewards_G, kind)


def _scaled(values_G: np.ndarray, rewards_G: np.ndarray, kind: Advantage) -> np.ndarray:
    """Centred rewards, scaled to advantages of this kind."""
    if kind == "mean_std":
        return values_G / (rewards_G.std(ddof=1) + 1e-6)
    if kind == "rloo":
        return values_G * (len(rewards_G) / (len(rewards_G) - 1))
    return values_G


def rollout_weights(
    rewards_G: np.ndarray, lengths_R: np.ndarray, objective: Objective, rollout_of_R: np.ndarray | None = None
) -> np.ndarray:
    """Token weight of each response before importance ratios and KL term, float64 [R].

    rewards_G: float64. lengths_R: tokens of each response that the policy wrote (`Group.n_written`); a response without
    any has weight 0 but counts in the baseline and in the number of sequences. rollout_of_R: the rollout that each
    response is an output of (`Group.rollout_of`); None: each is a rollout.
    """
    values_R = _of_responses(advantages(rewards_G, objective.advantage), rollout_of_R)
    return _shared_out(values_R, lengths_R, objective.aggregation)


def weight_rounding(
    rewards_G: np.ndarray, lengths_R: np.ndarray, objective: Objective, rollout_of_R: np.ndarray | None = None
) -> np.ndarray:
    """Upper bound of the rounding error in each of `rollout_weights`, from the rewards alone, float64 [R]."""
    if not differ(rewards_G):
        return np.zeros(len(lengths_R))
    slack_G = np.full(len(rewards_G), ROUNDING * np.abs(rewards_G).max())
    values_R = _of_responses(_scaled(slack_G, rewards_G, objective.advantage), rollout_of_R)
    return _shared_out(values_R, lengths_R, objective.aggregation)


def kl_scales(rewards_G: np.ndarray, lengths_R: np.ndarray, objective: Objective) -> np.ndarray:
    """Factor of the KL term of each response's tokens, float64 [R]: beta times the aggregation's weight.

    Zero if all rewards are equal: LearnAlign weights such problems by p (1 - p) = 0, and they are never run.
    """
    betas_R = np.full(len(lengths_R), objective.kl_beta if differ(rewards_G) else 0.0)
    return _shared_out(betas_R, lengths_R, objective.aggregation)


def _of_responses(values_G: np.ndarray, rollout_of_R: np.ndarray | None) -> np.ndarray:
    return values_G if rollout_of_R is None else values_G[rollout_of_R]


def _shared_out(values_R: np.ndarray, lengths_R: np.ndarray, aggregation: Aggregation) -> np.ndarray:
    """Each response's value times the aggregation's weight per token."""
    if aggregation == "seq-mean-token-sum":
        weights_R = values_R / len(values_R)
    elif aggregation == "seq-mean-token-mean":
        weights_R = values_R / (len(values_R) * np.maximum(lengths_R, 1))
    else:
        weights_R = values_R / max(int(lengths_R.sum()), 1)
    return np.where(lengths_R > 0, weights_R, 0.0)


def kl_weights(logprobs_N: "Tensor", reference_N: "Tensor", scales_N: "Tensor") -> "Tensor":
    """KL part of the token weights: derivative of -KL with respect to the log-probability, times scales_N.

    logprobs_N, reference_N: log-probabilities of the same tokens under the current and the reference policy.
    KL = exp(ref - lp) - (ref - lp) - 1, with derivative 1 - exp(ref - lp) (GRPO, arXiv 2402.03300, equation 4).
    """
    import torch

    return torch.where(scales_N == 0, 0.0, scales_N * torch.expm1(reference_N - logprobs_N))


def importance_weights(
    logprobs_N: "Tensor", behaviour_N: "Tensor", weights_N: "Tensor", clip_low: float | None, clip_high: float | None
) -> "Tensor":
    """Token weights times the importance ratio, zero where PPO's clipped surrogate has no gradient.

    logprobs_N, behaviour_N: log-probabilities of the same tokens under the current and the behaviour policy.
    The gradient of min(ratio A, clip(ratio) A) is ratio x A x grad log pi if the first term is the smaller one,
    and zero otherwise (PPO, arXiv 1707.06347, equation 7).
    """
    import torch  # Here, so that statistics of stored probes need not import it.

    ratio_N = torch.exp(logprobs_N - behaviour_N)
    clipped_N = torch.zeros_like(weights_N, dtype=torch.bool)
    if clip_high is not None:
        clipped_N |= (weights_N > 0) & (ratio_N > 1 + clip_high)
    if clip_low is not None:
        clipped_N |= (weights_N < 0) & (ratio_N < 1 - clip_low)
    return torch.where(clipped_N, 0.0, weights_N * ratio_N)
