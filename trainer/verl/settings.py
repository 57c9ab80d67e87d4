"""gradstore's settings of a verl run: the `gradstore` node of verl's configuration.

Give them like verl's own, as overrides: `gradstore.store=...`, or `+gradstore.store=...` with your own entry module.
The node holds the settings of the rounds and of the integration; GradAlign's names are accepted. The batch size, the
number of rollouts and the objective default to verl's own settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.selecting.mixture import parts_of
from gradstore.errors import RequestError
from gradstore.settings import build, parse
from gradstore.trainer.round.settings import RoundSettings
from gradstore.trainer.verl.objective import has_adapters, has_reference, verls_objective

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
    export: Path | None = None
    """Folder for files of the rollouts that rounds make; None: they are not kept."""
    asynchronous: bool = False
    """Whether verl generates ahead of training (trainer_mode=colocate_async); from verl's settings."""
    notes: tuple[str, ...] = ()
    """What of verl's objective the sketches leave out, one line each; from verl's settings."""

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
        own = [field.name for field in fields(cls) if field.name not in _DERIVED]
        options: dict[str, Any] = {name: given.pop(name) for name in list(given) if name in own}
        rollout, batch = verl["actor_rollout_ref"]["rollout"], int(verl["data"]["train_batch_size"])
        parsed = {"train_batch": batch, "rollouts": rollout["n"], **parse(RoundSettings, given, f"{NODE}.", also=own)}
        if parsed["train_batch"] != batch:
            raise RequestError(
                f"{NODE}.train_batch (train_batch_size) is {parsed['train_batch']}, data.train_batch_size is {batch}: "
                "leave the former out, or make them equal"
            )
        options["notes"] = _follow(verl, parsed)
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
        options["asynchronous"] = _check_mode(verl, rounds)
        options["logprobs"] = _exact_logprobs(rollout)
        if rounds.spec.objective.importance and not options["logprobs"]:
            raise RequestError(
                f"{NODE}.spec.objective.importance needs the rollouts' log-probabilities at temperature 1: set "
                "actor_rollout_ref.rollout.temperature=1, top_p=1, top_k=-1 and calculate_log_probs=True"
            )
        _check_reference(verl, rounds.spec.objective)
        options["benchmarks"] = options.get("benchmarks") or {"validation": verl["data"]["val_files"]}
        found = build(cls, {**parse(cls, options, f"{NODE}."), "rounds": rounds}, f"{NODE}.")
        found = replace(found, store=found.store.expanduser().absolute())
        if found.export is not None:
            found = replace(found, export=found.export.expanduser().absolute())
        if rollout["name"] == "sglang" and found.seeded:
            raise RequestError(f"SGLang takes no seed for a request: set {NODE}.seeded=false (docs/verl.md, Resume)")
        if "probe_rank" not in options and _coarse(verl["actor_rollout_ref"]["actor"]["fsdp_config"]):
            found = replace(found, probe_rank=_COARSE_PROBE_RANK)
        return found


_DERIVED = ("rounds", "logprobs", "asynchronous", "notes")
"""Fields that do not stand in the node under their names."""


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
    strategy = actor["strategy"]
    if "fsdp_config" not in actor:  # model_engine has set another back end, whatever the strategy
        strategy = next((name for name in ("megatron", "veomni", "torchtitan") if name in actor), "unknown")
    if strategy == "megatron":
        raise RequestError(
            "actor_rollout_ref.actor.strategy is 'megatron', whose shards rounds cannot sketch: set model_engine=dp "
            "actor_rollout_ref.actor.strategy=fsdp2; or train without rounds, merge a checkpoint (python -m "
            "verl.model_merger merge --backend megatron --local_dir CHECKPOINT/actor --target_dir FOLDER) and run "
            "`gradstore collect --model FOLDER`"
        )
    if strategy != "fsdp2":
        raise RequestError(
            f"actor_rollout_ref.actor.strategy is {strategy!r}: sketches read a policy sharded by FSDP2; "
            "set model_engine=dp actor_rollout_ref.actor.strategy=fsdp2"
        )
    mode = trainer.get("v1", {}).get("trainer_mode", "sync")
    if not trainer.get("use_v1", True):
        raise RequestError("trainer.use_v1 is False: rounds need verl's v1 trainers, set trainer.use_v1=True")
    if mode == "separate_async":
        raise RequestError(
            "trainer.v1.trainer_mode is 'separate_async', with which no round was ever run: set "
            "trainer.v1.trainer_mode=colocate_async (it generates ahead of training, too) or sync (docs/verl.md)"
        )
    if mode not in _MODES:
        raise RequestError(f"trainer.v1.trainer_mode is {mode!r}: rounds know {' and '.join(_MODES)}")
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


_MODES = ("sync", "colocate_async")


def _check_mode(verl: Mapping[str, Any], rounds: RoundSettings) -> bool:
    """Whether verl generates ahead of training; RequestError if then no round can come at a step of its own."""
    v1 = verl["trainer"].get("v1", {})
    if v1.get("trainer_mode", "sync") == "sync":
        return False
    ahead = v1.get("colocate_async", {}).get("num_warmup_batches", 0)
    if ahead >= rounds.steps:
        raise RequestError(
            f"trainer.v1.colocate_async.num_warmup_batches is {ahead}, {NODE}.steps (iters_per_select) {rounds.steps}: "
            "two rounds would meet one policy; raise steps above it, or lower num_warmup_batches"
        )
    if v1.get("colocate_async", {}).get("parameter_sync_step", 1) != 1:
        raise RequestError("trainer.v1.colocate_async.parameter_sync_step: rounds need 1, so that weights are in step")
    return True


def _follow(verl: Mapping[str, Any], parsed: dict[str, Any]) -> tuple[str, ...]:
    """Give the parsed settings verl's objective, where they have no preset; fields given by name win. Returns notes."""
    spec = parsed.setdefault("spec", {})
    own = spec.get("objective") or {}
    if isinstance(own, Objective) or {field.name for field in fields(Objective)} <= own.keys():  # a preset
        return ()
    theirs, notes = verls_objective(verl, importance=bool(own.get("importance")))
    if theirs.get("kl_beta") and "kl_beta" not in own and _probes(parsed.get("selector")):
        del theirs["kl_beta"]
        notes.append("actor.use_kl_loss: probes, and with them the sketches, leave the KL term out")
    spec["objective"] = {**theirs, **own}
    return tuple(notes)


def _probes(selector: str | None) -> bool:
    return selector is not None and any(part.selector.needs_probes for part in parts_of(selector))


def _check_reference(verl: Mapping[str, Any], objective: Objective) -> None:
    """RequestError for a KL term without a reference policy, or at another temperature than the reference's."""
    if not objective.kl_beta:
        return
    if not (has_reference(verl) or has_adapters(verl)):
        raise RequestError(
            f"{NODE}.spec.objective.kl_beta needs a reference policy, and verl starts none: set "
            "actor_rollout_ref.actor.use_kl_loss=True (kl_loss_coef=0 trains without the term), or train LoRA adapters"
        )
    sampled = verl["actor_rollout_ref"]["rollout"].get("temperature", 1.0)
    if objective.temperature != sampled:
        raise RequestError(
            f"{NODE}.spec.objective: kl_beta at temperature {objective.temperature}, but verl's reference works at "
            f"actor_rollout_ref.rollout.temperature={sampled}: make them equal"
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
