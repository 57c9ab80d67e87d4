"""gradstore's settings of a verl run: the `gradstore` node of verl's configuration.

Give them like verl's own, as overrides: `gradstore.store=...`, or `+gradstore.store=...` with your own entry module.
The node holds the settings of the rounds and of the integration; GradAlign's names are accepted. The batch size and the
number of rollouts default to verl's own settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gradstore.errors import RequestError
from gradstore.settings import build, parse
from gradstore.trainer.round.settings import RoundSettings

NODE = "gradstore"
_COARSE_PROBE_RANK = 64


@dataclass(frozen=True, slots=True)
class VerlSettings:
    """Settings of the integration; everything else is in verl's configuration."""

    store: Path
    """Folder of the store; the first round creates it, later ones add to it."""
    rounds: RoundSettings
    """Settings of the selection rounds."""
    benchmarks: Mapping[str, list[str]]
    """Benchmark name -> files in verl's form; default: data.val_files as `validation`."""
    pool: str = "pool"
    """Name of the store's collection for data.train_files."""
    seeded: bool = True
    """Whether every rollout gets its own seed; an exact resume needs this."""
    logprobs: bool = False
    """Whether the rollout engine's log-probabilities are the policy's at temperature 1; from verl's settings."""
    probe_rank: int | None = None
    """Rank of the low-rank branch that probes move along; None: move the weights themselves (float32 only)."""

    @classmethod
    def of(cls, config: Any) -> "VerlSettings":
        """Read and check the settings from verl's configuration (an OmegaConf node or a dict of dicts).

        RequestError for a setting that is missing, unknown, or contradicts verl's.
        """
        verl = _plain(config)
        given = {name: value for name, value in verl.get(NODE, {}).items() if value is not None}
        if "store" not in given:
            raise RequestError(f"{NODE}.store is missing: the folder that keeps sketches and rounds")
        _refuse_old_names(verl)
        _check_verl(verl)
        own = [field.name for field in fields(cls) if field.name not in ("rounds", "logprobs")]
        options: dict[str, Any] = {name: given.pop(name) for name in list(given) if name in own}
        rollout, batch = verl["actor_rollout_ref"]["rollout"], int(verl["data"]["train_batch_size"])
        parsed = {"train_batch": batch, "rollouts": rollout["n"], **parse(RoundSettings, given, f"{NODE}.", also=own)}
        if parsed["train_batch"] != batch:
            raise RequestError(
                f"{NODE}.train_batch (train_batch_size) is {parsed['train_batch']}, data.train_batch_size is {batch}: "
                "leave the former out, or make them equal"
            )
        rounds = build(RoundSettings, parsed, f"{NODE}.")
        if rounds.selected is not None:
            rounds.n_selected(rounds.candidates or rounds.selected)
        total, planned = verl["trainer"]["total_training_steps"], rounds.rounds * rounds.steps
        if total is not None and total > planned:
            raise RequestError(
                f"trainer.total_training_steps is {total}, {NODE}.rounds {rounds.rounds} (num_selections) x steps "
                f"{rounds.steps} (iters_per_select) are {planned}: leave the former out, or raise these"
            )
        _check_queue(verl, rounds)
        options["logprobs"] = _exact_logprobs(rollout)
        if rounds.spec.objective.importance and not options["logprobs"]:
            raise RequestError(
                f"{NODE}.spec.objective.importance needs the rollouts' log-probabilities at temperature 1: set "
                "actor_rollout_ref.rollout.temperature=1, top_p=1, top_k=-1 and calculate_log_probs=True"
            )
        if rounds.spec.objective.kl_beta:
            raise RequestError(
                f"{NODE}.spec.objective.kl_beta: rounds in verl have no reference policy's log-probabilities; leave it "
                "out, keep rollouts and sketch them with `gradstore collect --reference`, or train with --backend local"
            )
        options["benchmarks"] = options.get("benchmarks") or {"validation": verl["data"]["val_files"]}
        found = build(cls, {**parse(cls, options, f"{NODE}."), "rounds": rounds}, f"{NODE}.")
        found = replace(found, store=found.store.expanduser().absolute())
        if rollout["name"] == "sglang" and found.seeded:
            raise RequestError(f"SGLang takes no seed for a request: set {NODE}.seeded=false (docs/verl.md, Resume)")
        if "probe_rank" not in options and _coarse(verl["actor_rollout_ref"]["actor"]["fsdp_config"]):
            found = replace(found, probe_rank=_COARSE_PROBE_RANK)
        return found


def _plain(config: Any) -> dict[str, Any]:
    """The configuration as nested dicts, with interpolations resolved."""
    if isinstance(config, dict):
        return config
    from omegaconf import OmegaConf

    found: Any = OmegaConf.to_container(config, resolve=True)
    return found


def _refuse_old_names(config: Any, place: str = "") -> None:
    """RequestError for a module's old name, from before it moved into gradstore."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            _refuse_old_names(value, f"{place}.{name}" if place else str(name))
    elif isinstance(config, str):
        module = config.removeprefix("pkg://")
        for old, new in _MOVED.items():
            if module == old or module.startswith(f"{old}."):
                named = config.replace(old, new, 1)
                raise RequestError(f"{place} is {config}, a name that gradstore no longer has: write {named}")


_MOVED = {"trainer.verl_reward": "gradstore.trainer.verl.reward", "trainer.verl": "gradstore.trainer.verl"}
"""Old module name -> new name."""


def _check_verl(verl: Mapping[str, Any]) -> None:
    """RequestError for a verl configuration in which rounds or sketches cannot work."""
    actor, data, trainer = verl["actor_rollout_ref"]["actor"], verl["data"], verl["trainer"]
    mode = trainer.get("v1", {}).get("trainer_mode", "sync")
    if not trainer.get("use_v1", True) or mode != "sync":
        raise RequestError(
            f"trainer.v1.trainer_mode is {mode!r} (use_v1 {trainer.get('use_v1')}): rounds need the synchronous "
            "trainer, trainer.use_v1=True trainer.v1.trainer_mode=sync"
        )
    if data["dataloader_num_workers"] != 0:
        raise RequestError(
            f"data.dataloader_num_workers is {data['dataloader_num_workers']}: workers draw problems before a round "
            "has picked them; set data.dataloader_num_workers=0"
        )
    if (verl["algorithm"].get("filter_groups") or {}).get("enable"):
        raise RequestError(
            "algorithm.filter_groups draws more problems than a round picked: leave it off, "
            f"and use {NODE}.selector=dynamic for DAPO's filtering"
        )
    if (trainer.get("v1", {}).get("sampler") or {}).get("sync_refill_failed_groups"):
        raise RequestError(
            "trainer.v1.sampler.sync_refill_failed_groups draws more problems than a round picked: leave it off"
        )
    if actor["strategy"] != "fsdp2":
        raise RequestError(
            f"actor_rollout_ref.actor.strategy is {actor['strategy']!r}: sketches read a policy sharded by FSDP2; "
            "set actor_rollout_ref.actor.strategy=fsdp2"
        )
    if verl["actor_rollout_ref"]["model"].get("use_fused_kernels"):
        raise RequestError(
            "actor_rollout_ref.model.use_fused_kernels leaves the model without logits, which sketches need: "
            "set actor_rollout_ref.model.use_fused_kernels=False"
        )
    if actor["fsdp_config"].get("offload_policy"):
        raise RequestError(
            "actor.fsdp_config.offload_policy keeps the weights off the device that computes: "
            "use actor_rollout_ref.actor.fsdp_config.param_offload=True instead"
        )


def _check_queue(verl: Mapping[str, Any], rounds: RoundSettings) -> None:
    """RequestError if the rollouts of one window do not fit in verl's queue."""
    backend = verl.get("transfer_queue", {}).get("backend", {})
    if backend.get("storage_backend") != "SimpleStorage":
        return
    room = int(backend["SimpleStorage"]["total_storage_size"])
    wanted = rounds.window * max(rounds.rollouts, rounds.target_rollouts)
    if wanted > room:
        raise RequestError(
            f"{NODE}.window is {rounds.window} problems, {wanted} rollouts at once; verl's queue holds {room} "
            f"(transfer_queue.backend.SimpleStorage.total_storage_size): lower the one or raise the other"
        )


def _exact_logprobs(rollout: Mapping[str, Any]) -> bool:
    """Whether recorded log-probabilities are the policy's own: temperature 1, no top-p or top-k."""
    return bool(
        rollout.get("calculate_log_probs")
        and rollout.get("temperature") == 1
        and rollout.get("top_p", 1) == 1
        and rollout.get("top_k", -1) in (-1, 0)
    )


def _coarse(fsdp: Mapping[str, Any]) -> bool:
    """Whether the actor computes in less than float32; verl's default is bfloat16."""
    mixed = fsdp.get("mixed_precision") or {}
    return str(mixed.get("param_dtype") or "bf16").removeprefix("torch.") not in ("fp32", "float32", "float")
