"""The policy-gradient objective of one problem, as one weight per response token.

The objective of a problem with rollouts y_1..y_G is J = sum_j sum_t w_jt * log pi(y_jt | x, y_j<t). Its gradient is the
policy gradient in the ascent direction. The weight is advantage x aggregation. Importance sampling multiplies it by
the importance ratio, as an off-policy rule bounds it; a KL penalty to a reference policy adds a term. A weight depends
only on its problem, so a problem's gradient does not depend on the batch, the rank or the file.
Formulas and sources: docs/methods.md.

Dimension letters: G rollouts of a problem, R their responses (one each, or several outputs), B sequences, N tokens.
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
Ratio = Literal["token", "sequence", "product"]
OffPolicy = Literal["ppo", "cispo", "truncate", "mask"]


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
    """`ppo`: no gradient if the advantage is negative and the ratio below 1 - clip_low. `cispo`: the ratio is at least
    1 - clip_low. None: no such bound."""
    clip_high: float | None = None
    """`ppo`: no gradient if the advantage is positive and the ratio above 1 + clip_high. `cispo`: the ratio is at most
    1 + clip_high. None: no such bound."""
    ratio: Ratio = "token"
    """The importance ratio of a token: its own (`token`), the geometric mean of its response's (`sequence`, GSPO), or
    their product, which is the response's own ratio (`product`: without bias, but of high variance)."""
    off_policy: OffPolicy = "ppo"
    """What bounds the ratios. `ppo`: the clipped surrogate. `cispo`: ratios are clipped, and every token keeps its
    gradient. `truncate`: ratios are at most ratio_cap. `mask`: ratios outside [1 / ratio_cap, ratio_cap] have no
    gradient."""
    ratio_cap: float | None = None
    """The bound C, above 1, of `truncate` and `mask`. With `ppo` it is dual clip's: no gradient if the advantage is
    negative and the ratio above C (verl's clip_ratio_c: 3)."""
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
        self._check_off_policy()
        check_number("kl_beta", self.kl_beta, least=0)
        if self.reference is not None and not self.kl_beta:
            raise RequestError("a reference policy needs kl_beta above 0")

    def _check_off_policy(self) -> None:
        check_known("ratio", self.ratio, get_args(Ratio))
        check_known("off_policy", self.off_policy, get_args(OffPolicy))
        given = [name for name, default in _OFF_POLICY.items() if getattr(self, name) != default]
        if not self.importance and given:
            need = "needs" if len(given) == 1 else "need"
            raise RequestError(f"{' and '.join(given)} {need} importance=True")
        for name in ("clip_low", "clip_high"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), least=0)
                if self.off_policy in ("truncate", "mask"):
                    raise RequestError(f"{name} is a bound of ppo and cispo: {self.off_policy} has ratio_cap")
        if self.ratio_cap is not None:
            check_number("ratio_cap", self.ratio_cap, above=1)
            if self.off_policy == "cispo":
                raise RequestError("ratio_cap is no bound of cispo, whose ratios are at most 1 + clip_high")
        elif self.off_policy in ("truncate", "mask"):
            raise RequestError(f"off_policy {self.off_policy} needs ratio_cap, a number above 1")
        if self.off_policy == "cispo" and (self.clip_low, self.clip_high) == (None, None):
            raise RequestError("off_policy cispo needs clip_high (its ratios are at most 1 + clip_high), or clip_low")

    @property
    def sign_dependent(self) -> bool:
        """Whether the sign of an advantage decides which tokens have a gradient: PPO's rule, if it has a bound."""
        return self.off_policy == "ppo" and (self.clip_low, self.clip_high, self.ratio_cap) != (None, None, None)

    @classmethod
    def from_text(cls, text: str) -> "Objective":
        """The preset of this name, for settings that are read by name."""
        return objective(text)

    def as_dict(self) -> dict:
        """The fields as a JSON-ready dict; without a KL term its settings are omitted, as in older stores, and so are
        ratio, off_policy and ratio_cap at their defaults."""
        unused = {"kl_beta", "reference"} if not self.kl_beta else set()
        unused |= {name for name in _NEWER if getattr(self, name) == _OFF_POLICY[name]}
        return {name: value for name, value in asdict(self).items() if name not in unused}


_OFF_POLICY = {"ratio": "token", "off_policy": "ppo", "ratio_cap": None, "clip_low": None, "clip_high": None}
"""Settings of importance ratios, with their defaults."""
_NEWER = ("ratio", "off_policy", "ratio_cap")
"""Those that older stores do not have in their fingerprints."""


PRESETS: dict[str, Objective] = {
    "gradalign": Objective("mean", "seq-mean-token-mean"),
    "grpo": Objective("mean_std", "seq-mean-token-mean"),
    "dr_grpo": Objective("mean", "seq-mean-token-sum"),
    "dapo": Objective("mean_std", "token-mean", importance=True, clip_low=0.2, clip_high=0.28),
    "gspo": Objective(
        "mean_std", "seq-mean-token-mean", importance=True, ratio="sequence", clip_low=3e-4, clip_high=4e-4
    ),
    "cispo": Objective("mean_std", "token-mean", importance=True, off_policy="cispo", clip_high=4.0),
}
"""Objectives by name; docs/methods.md has their sources. The last three need the rollouts' log-probabilities."""


def objective(preset: str, **changes: object) -> Objective:
    """The preset with fields replaced; RequestError for a name that is not in PRESETS."""
    check_known("objective", preset, PRESETS)
    return replace(PRESETS[preset], **changes)  # type: ignore[arg-type]


def advantages(rewards_G: np.ndarray, kind: Advantage) -> np.ndarray:
    """Advantages of a group, float64 [G]; all zero if the rewards are equal up to rounding. Also of several, [P, G].

    mean: Dr. GRPO (arXiv 2503.20783). mean_std: GRPO (arXiv 2402.03300), sample deviation (n - 1) plus 1e-6 as in
    verl. rloo: arXiv 2402.14740, the same as mean x G / (G - 1).
    """
    centred_G = rewards_G - rewards_G.mean(axis=-1, keepdims=True)
    centred_G[np.abs(centred_G) <= ROUNDING * np.abs(rewards_G).max(axis=-1, keepdims=True)] = 0.0
    some = differ(rewards_G)
    if not some.all():
        centred_G[~some] = 0.0
    return _scaled(centred_G, rewards_G, kind) if some.any() else centred_G


def _scaled(values_G: np.ndarray, rewards_G: np.ndarray, kind: Advantage) -> np.ndarray:
    """Centred rewards, scaled to advantages of this kind."""
    if kind == "mean_std":
        return values_G / (rewards_G.std(axis=-1, ddof=1, keepdims=True) + 1e-6)
    if kind == "rloo":
        return values_G * (rewards_G.shape[-1] / (rewards_G.shape[-1] - 1))
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


def likelihood_weights(lengths_G: np.ndarray) -> np.ndarray:
    """Token weight of reference solutions, float64 [G]: J is the mean token log-likelihood (LESS, arXiv 2402.04333).

    lengths_G: tokens of each solution. No advantage, no baseline: the solution is right.
    """
    return 1.0 / np.maximum(lengths_G, 1)


def kl_weights(logprobs_N: "Tensor", reference_N: "Tensor", scales_N: "Tensor") -> "Tensor":
    """KL part of the token weights: derivative of -KL with respect to the log-probability, times scales_N.

    logprobs_N, reference_N: log-probabilities of the same tokens under the current and the reference policy.
    KL = exp(ref - lp) - (ref - lp) - 1, with derivative 1 - exp(ref - lp) (GRPO, arXiv 2402.03300, equation 4).
    """
    import torch

    return torch.where(scales_N == 0, 0.0, scales_N * torch.expm1(reference_N - logprobs_N))


def importance_weights(
    logprobs_BN: "Tensor", behaviour_BN: "Tensor", weights_BN: "Tensor", written_BN: "Tensor", objective: Objective
) -> "Tensor":
    """Token weights times the importance ratios, as the objective's rule bounds them; [B, N] in the dtype of weights.

    logprobs_BN, behaviour_BN: log-probabilities of the same tokens under the current and the behaviour policy.
    weights_BN: advantage x aggregation. written_BN: bool, False at padding and at tokens that the policy did not write;
    the ratio of a response is over the others. The result times grad log pi is the gradient of the published surrogate
    (docs/methods.md, off-policy); it is zero where that is flat. Nothing is bounded if `objective.importance` is False.
    """
    import torch  # Here, so that statistics of stored probes need not import it.

    ratio_BN = _ratios(logprobs_BN, behaviour_BN, written_BN, objective.ratio)
    low, high, cap = objective.clip_low, objective.clip_high, objective.ratio_cap
    flat_BN = weights_BN == 0  # so that no infinite ratio meets a zero
    if objective.off_policy == "ppo":
        if high is not None:
            flat_BN |= (weights_BN > 0) & (ratio_BN > 1 + high)
        if low is not None:
            flat_BN |= (weights_BN < 0) & (ratio_BN < 1 - low)
        if cap is not None:
            flat_BN |= (weights_BN < 0) & (ratio_BN > cap)
    elif objective.off_policy == "mask":
        assert cap is not None
        flat_BN |= (ratio_BN > cap) | (ratio_BN < 1 / cap)
    elif objective.off_policy == "cispo":
        ratio_BN = ratio_BN.clamp(None if low is None else 1 - low, None if high is None else 1 + high)
    else:
        ratio_BN = ratio_BN.clamp(max=cap)
    return torch.where(flat_BN, 0.0, weights_BN * ratio_BN)


def _ratios(logprobs_BN: "Tensor", behaviour_BN: "Tensor", written_BN: "Tensor", kind: Ratio) -> "Tensor":
    """Importance ratio of each token, [B, N]; those of a response are equal, unless the kind is `token`."""
    import torch

    logs_BN = torch.where(written_BN, logprobs_BN - behaviour_BN, 0.0)
    if kind != "token":
        logs_B1 = logs_BN.sum(1, keepdim=True)
        if kind == "sequence":
            logs_B1 = logs_B1 / written_BN.sum(1, keepdim=True).clamp(min=1)
        logs_BN = logs_B1.expand_as(logs_BN)
    return logs_BN.exp()
