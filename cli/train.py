"""`train`: reinforcement learning with a selection each round, by the embedded trainer or by verl."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gradstore.cli.app import command, given
from gradstore.cli.query import Json
from gradstore.cli.rollout import Device, OverlongBuffer, OverlongPenalty, SkipUnreadable, TemplateKwargs, Trust
from gradstore.cli.show import print_json, progress, say
from gradstore.cli.telling import Told
from gradstore.errors import RequestError, needing

BESIDE = ("settings", "backend", "config", "benchmark", "resume", "json", "verbose", "quiet")
"""Parameters of the command that are no fields of RunSettings."""
VERL_TOO = ("settings", "backend", "verbose", "quiet")
"""Parameters that mean something with verl."""


@command(
    needs={"overlong_penalty": "overlong_buffer"},
    panels={
        "The run": "model pool benchmark out config resume backend seed device save_every log trust_remote_code",
        "Responses": "train_rollouts max_new_tokens temperature top_p template_kwargs",
        "Rewards": "reward skip_unreadable overlong_buffer overlong_penalty",
        "Updates": "lr weight_decay clip_grad minibatches objective kl_beta lora_rank",
    },
    example="gradstore train --model MODEL --pool pool.jsonl --benchmark amc=amc.jsonl --out run ratio=0.1",
    context_settings={"ignore_unknown_options": True},
)
def train(
    context: typer.Context,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings of the rounds, NAME=VALUE, by our names or GradAlign's: candidates (chunk_size), selected "
            "or ratio (1/k), train_batch (train_batch_size), steps (iters_per_select), rounds (num_selections), "
            "rollouts (n_samples_train), target_rollouts (n_samples_val), selector (mode), refresh=all or a number of "
            "problems. With --backend verl: overrides of verl's configuration and gradstore.NAME=VALUE."
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="local: transformers on one machine; verl: see docs/verl.md.")] = "local",
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with the settings of the run, such as OUT/run.yaml of an earlier one (docs/training.md). "
            "Options and NAME=VALUE win over the file."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or name of a transformers causal LM.")] = None,
    pool: Annotated[Path | None, typer.Option(help="Problems to train on, JSONL or Parquet.")] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="[NAME=]PATH of the problems to aim at; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run: store, checkpoint, metrics, model.")] = None,
    reward: Annotated[str, typer.Option(help="math, reasoning-gym, auto, judge, [isolated:]module:function.")] = "math",
    train_rollouts: Annotated[int, typer.Option(min=1, help="Responses to each problem of a training step.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 1024,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 1.0,
    overlong_buffer: OverlongBuffer = 0,
    overlong_penalty: OverlongPenalty = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of the sampling distribution.")] = 1.0,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default 1e-6, with LoRA 2e-5.")] = None,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay; 0 is Adam.")] = 0.0,
    clip_grad: Annotated[float, typer.Option(help="Largest norm of a step's gradient.")] = 1.0,
    minibatches: Annotated[
        int,
        typer.Option(min=1, help="Updates a step is dealt to; above 1 by the objective's rule, or PPO's clip."),
    ] = 1,
    objective: Annotated[
        str,
        typer.Option(
            help="Objective of the update: grpo, dr_grpo, gradalign, dapo, gspo or cispo, and changes of its fields: "
            "`dapo,clip_high=0.3,ratio_cap=3`. That of the sketches is the setting spec.objective=..., likewise."
        ),
    ] = "grpo",
    kl_beta: Annotated[
        float,
        typer.Option(
            min=0,
            help="Weight of GRPO's KL term to the model as it is at first; sketches then have the update's objective.",
        ),
    ] = 0.0,
    lora_rank: Annotated[int, typer.Option(min=0, help="Train adapters of this rank; 0: all weights.")] = 0,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: after each round.")] = 0,
    log: Annotated[
        list[str] | None,
        typer.Option(help="Where metrics go too: tensorboard, wandb, mlflow, trackio; may be repeated."),
    ] = None,
    template_kwargs: TemplateKwargs = None,
    skip_unreadable: SkipUnreadable = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, with the settings that it was started with.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Everything drawn at random follows from it.")] = 0,
    device: Device = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Train by GRPO on problems picked anew each round; a killed run goes on with --resume, to the same weights."""
    if backend == "verl":
        with needing("--backend verl", "gradstore[verl]"):
            from gradstore.trainer.verl import main

        _refuse_local_options(context)
        main(settings or [])
        return
    if backend != "local":
        raise RequestError(f"unknown back end {backend!r}, expected local or verl")
    from gradstore.settings import arguments

    rounds = arguments(settings or [], help=" (gradstore train --help)")
    options = {name: value for name, value in given(context).items() if name not in BESIDE}
    if benchmark:
        options["benchmarks"] = {}
        for name, path in map(_benchmark, benchmark):
            if name in options["benchmarks"]:
                raise RequestError(f"--benchmark: {name!r} names two files; give them names, as in NAME=PATH")
            options["benchmarks"][name] = path
    missing = [f"--{name}" for name in ("model", "pool", "out") if name not in options]
    if missing and config is None and not (resume and out):
        raise RequestError(f"gradstore train needs {', '.join(missing)}, or --config with a file that has them")

    from gradstore.engine.gradients.model_folder import is_model_folder
    from gradstore.reading.files import open_regular
    from gradstore.trainer.local.settings import WRITTEN, RunSettings

    if resume and config is None and out is not None and (out / WRITTEN).exists():
        config = out / WRITTEN
    if missing and config is None:
        raise RequestError(f"{out}: holds no run to go on with (no {WRITTEN}); begin one without --resume")
    chosen = RunSettings.of(config, options, rounds)
    is_model_folder(chosen.model)
    for problems in (chosen.pool, *chosen.benchmarks.values()):
        open_regular(problems).close()

    from gradstore.engine.gradients.coverage import Coverage
    from gradstore.trainer.local import run

    with progress("training steps", chosen.rounds.rounds * chosen.rounds.steps) as advance:
        told = Told(chosen.rounds.rounds, chosen.rounds.steps, advance)
        report = run.train(chosen, resume=resume, on_step=told.done, on_values=told.values, say=say)
    if json:
        print_json({**asdict(report), "out": str(report.out)})
        return
    if report.coverage is not None:
        say(Coverage.of(report.coverage).sentence())
    say(
        f"{report.out}: {report.steps} steps in {report.rounds} rounds, mean reward of a step "
        f"{report.first_reward:.3f} at first, {report.last_reward:.3f} at last; model in {report.out / 'model'}, every "
        f"round in {report.out / 'store'}"
    )


def _refuse_local_options(context: typer.Context) -> None:
    """RequestError naming the options that verl would never see."""
    ours = ["--" + name.replace("_", "-") for name in given(context) if name not in VERL_TOO]
    if ours:
        raise RequestError(
            f"{', '.join(ours)}: only for --backend local; with verl say it as an override of verl's configuration, or "
            "as gradstore.NAME=VALUE (docs/verl.md)"
        )


def _benchmark(text: str) -> tuple[str, str]:
    """The name of a benchmark and its file: NAME=PATH, or a path whose stem is the name."""
    name, sign, path = text.partition("=")
    return (name, path) if sign else (Path(text).stem, text)
