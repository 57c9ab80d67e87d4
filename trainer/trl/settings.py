"""Settings of selection inside TRL: `selection=` of the trainer, checked against TRL's own configuration.

The rounds' settings (docs/rounds.md) stand beside those of the integration, by our names or GradAlign's. A step of a
round is one generation batch of TRL, which by default is one optimizer step.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from gradstore.errors import RequestError
from gradstore.settings import build, parse
from gradstore.trainer.loggers import Log
from gradstore.trainer.round.settings import RoundSettings

WHERE = "selection: "
_COARSE_PROBE_RANK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TrlSettings:
    """Settings of the integration, and of the rounds."""

    store: Path
    """Folder of the store; the first round creates it, later ones add to it. Processes need not share it: process 0
    alone reads and writes it."""
    rounds: RoundSettings
    """Settings of the selection rounds."""
    benchmarks: Mapping[str, Any]
    """Benchmark name -> data set with the columns of the training set; default: `eval_dataset` as `validation`."""
    pool: str = "pool"
    """Name of the store's collection for the training set."""
    id_column: str = "id"
    """Column with a problem's id; a row without one is named by its number."""
    probe_rank: int | None = None
    """Rank of the low-rank branch that probes move along; None: 64, or the weights themselves if they are float32."""
    logger: Log | None = None
    """Receives each round's scalars; TRL's own logs have them anyway, as `gradstore/...`."""
    export: Path | None = None
    """Folder for rollout files of the rollouts made for selection."""
    max_steps: int | None = None
    """Optimizer steps that the rounds make, where TRL was given none; not a setting."""

    @classmethod
    def of(cls, given: Mapping[str, Any], args: Any, n_pool: int, validation: Any = None) -> "TrlSettings":
        """Settings from names and values, and from TRL's configuration.

        args: a GRPOConfig. n_pool: rows of the training set. validation: TRL's `eval_dataset`. RequestError for a
        setting that is missing, unknown, or contradicts TRL's.
        """
        own = [field.name for field in fields(cls) if field.name not in ("rounds", "max_steps")]
        options = {name: value for name, value in given.items() if name in own and value is not None}
        asked = {name: value for name, value in given.items() if name not in own}
        batch = args.generation_batch_size // args.num_generations
        usual = {"train_batch": batch, "rollouts": args.num_generations, "seed": args.seed}
        parsed = {**usual, **parse(RoundSettings, asked, WHERE, also=own)}
        if parsed["train_batch"] != batch:
            raise RequestError(
                f"{WHERE}train_batch (train_batch_size) is {parsed['train_batch']}, TRL generates for {batch} problems "
                "at a time (generation_batch_size / num_generations): leave the former out, or make them equal"
            )
        settings = build(RoundSettings, parsed, WHERE)
        if "rounds" not in parsed or args.max_steps > 0:
            settings = replace(settings, rounds=_rounds(settings, "rounds" in parsed, args, n_pool))
        else:
            every = args.steps_per_generation * args.num_iterations
            options["max_steps"] = settings.rounds * settings.steps * every // args.gradient_accumulation_steps
        _check_objective(settings)
        if "benchmarks" not in options:
            options["benchmarks"] = (
                {} if validation is None else validation if isinstance(validation, dict) else {"validation": validation}
            )
        if "store" not in options:
            raise RequestError(f"{WHERE}store is missing: the folder that keeps sketches and rounds")
        for name in ("store", "export"):
            if options.get(name) is not None:
                options[name] = Path(options[name]).expanduser().absolute()
        return cls(rounds=settings, **options)

    def probe_rank_for(self, dtype: torch.dtype) -> int | None:
        """The rank of probes of a model with weights of this dtype."""
        return self.probe_rank or (None if dtype == torch.float32 else _COARSE_PROBE_RANK)


def generations_of(args: Any, n_pool: int) -> int:
    """Generation batches of the whole run, as TRL counts them."""
    every = args.steps_per_generation * args.num_iterations
    if args.max_steps > 0:
        return math.ceil(args.max_steps * args.gradient_accumulation_steps / every)
    batch = args.generation_batch_size // args.num_generations
    return math.ceil(args.num_train_epochs * (n_pool // batch))


def _rounds(settings: RoundSettings, given: bool, args: Any, n_pool: int) -> int:
    """Number of rounds: as set, or as many as TRL's training needs."""
    wanted = max(1, math.ceil(generations_of(args, n_pool) / settings.steps))
    if given and wanted > settings.rounds:
        raise RequestError(
            f"{WHERE}rounds {settings.rounds} (num_selections) x steps {settings.steps} (iters_per_select) are too few "
            f"for max_steps {args.max_steps}, which takes {wanted} rounds: leave one of them out"
        )
    return settings.rounds if given else wanted


def _check_objective(settings: RoundSettings) -> None:
    rule = settings.spec.objective
    if rule.importance or rule.kl_beta:
        name = "importance" if rule.importance else "kl_beta"
        raise RequestError(
            f"{WHERE}spec.objective.{name}: rounds in TRL have no log-probabilities of the sampling or a reference "
            "policy; leave it out, or keep rollouts (`export`) and sketch them with `gradstore collect`"
        )
