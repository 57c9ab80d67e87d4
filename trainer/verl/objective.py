"""The sketches' objective as verl's configuration states it: what verl trains with is what rounds sketch.

A round sketches fresh rollouts, at importance ratio 1. There verl's losses vanilla (PPO), gspo, cispo, sapo, gpg and
dro have one gradient, advantage x grad log pi, so what follows verl is the advantage, the aggregation, the temperature
and the KL term. Off policy (`importance`) the loss's ratios and bounds follow too. What has no counterpart is named in
a note, which the entry logs. docs/verl.md has the table.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gradstore.engine.gradients.objectives import Objective

_AGGREGATIONS = {
    "token-mean": "seq-mean-token-sum",
    "token-sum": "seq-mean-token-sum",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-sum-norm": "seq-mean-token-sum",
    "seq-mean-token-mean": "seq-mean-token-mean",
}
"""loss_agg_mode -> ours. verl averages over the tokens of a batch, of which a problem's share is its sum."""
_GROUP_NORMALISED = ("grpo", "grpo_vectorized")
_RLOO = ("rloo", "rloo_vectorized")
_SAME_AT_RATIO_1 = ("vanilla", "gspo", "cispo", "sapo", "gpg", "dro", "dppo_tv", "dppo_kl")
_K3 = ("low_var_kl", "k3")


def verls_objective(verl: Mapping[str, Any], *, importance: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Fields of the objective that follow verl's configuration, and notes on what has no counterpart.

    verl: the configuration as nested dicts. importance: whether the objective has importance ratios, whose bounds
    follow verl's loss then. A field that verl's configuration does not decide is left out.
    """
    algorithm, actor = verl["algorithm"], verl["actor_rollout_ref"]["actor"]
    found: dict[str, Any] = {}
    notes: list[str] = []
    estimator = algorithm.get("adv_estimator")
    if estimator in _GROUP_NORMALISED:
        found["advantage"] = "mean_std" if algorithm.get("norm_adv_by_std_in_grpo", True) else "mean"
    elif estimator in _RLOO:
        found["advantage"] = "rloo"
    elif estimator is not None:
        notes.append(f"algorithm.adv_estimator={estimator} has no counterpart: sketches take reward - mean reward")
    mode = (actor.get("policy_loss") or {}).get("loss_mode", "vanilla")
    aggregation = "seq-mean-token-mean" if mode == "geo_mean" else actor.get("loss_agg_mode")
    if aggregation in _AGGREGATIONS:
        found["aggregation"] = _AGGREGATIONS[aggregation]
    if mode not in (*_SAME_AT_RATIO_1, "geo_mean"):
        notes.append(f"policy_loss.loss_mode={mode}: sketches are of the plain policy gradient, without its own terms")
    temperature = verl["actor_rollout_ref"]["rollout"].get("temperature")
    if temperature:
        found["temperature"] = float(temperature)
    if importance:
        found |= _ratios(mode, actor, notes)
    if actor.get("use_kl_loss"):
        kind = str(actor.get("kl_loss_type")).removesuffix("+")
        if kind in _K3:
            found["kl_beta"] = float(actor.get("kl_loss_coef", 0.0))
        else:
            notes.append(f"actor.kl_loss_type={kind}: sketches know the KL term of low_var_kl alone")
    if algorithm.get("use_kl_in_reward"):
        notes.append("algorithm.use_kl_in_reward: rounds take the rewards without the KL penalty")
    if actor.get("entropy_coeff"):
        notes.append("actor.entropy_coeff: sketches have no entropy term")
    return found, notes


def has_reference(verl: Mapping[str, Any]) -> bool:
    """Whether the trainer computes a reference policy's log-probabilities in its steps (verl's own condition)."""
    return bool(verl["algorithm"].get("use_kl_in_reward") or verl["actor_rollout_ref"]["actor"].get("use_kl_loss"))


def has_adapters(verl: Mapping[str, Any]) -> bool:
    """Whether the actor trains LoRA adapters: then its reference is the model without them."""
    model = verl["actor_rollout_ref"]["model"]
    rank = (model.get("lora") or {}).get("rank") or model.get("lora_rank") or 0
    return rank > 0 or model.get("lora_adapter_path") is not None


def _ratios(mode: str, actor: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Importance ratios and their bounds, as the loss has them."""
    both = actor.get("clip_ratio")
    low, high = (actor.get(f"clip_ratio_{side}") for side in ("low", "high"))
    wanted = {"clip_low": both if low is None else low, "clip_high": both if high is None else high}
    if mode == "vanilla":
        wanted["ratio_cap"] = actor.get("clip_ratio_c")
    elif mode == "gspo":
        wanted["ratio"] = "sequence"
    elif mode == "cispo":
        wanted["off_policy"] = "cispo"
    else:
        notes.append(f"policy_loss.loss_mode={mode}: off policy, sketches bound ratios as PPO does")
    known = {field.name for field in fields(Objective)}
    return {name: value for name, value in wanted.items() if value is not None and name in known}
