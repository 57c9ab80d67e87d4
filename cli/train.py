"""`train`: reinforcement learning with a selection each round, by the embedded trainer or by verl."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from gradstore.cli.app import command
from gradstore.cli.query import Json
from gradstore.cli.rollout import Device, SkipUnreadable, TemplateKwargs, template_arguments
from gradstore.cli.show import print_json, progress, say
from gradstore.errors import RequestError

LEARNING_RATE, LORA_LEARNING_RATE = 1e-6, 2e-5


@command(context_settings={"ignore_unknown_options": True})
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
    model: Annotated[str | None, typer.Option(help="Folder or name of a transformers causal LM.")] = None,
    pool: Annotated[Path | None, typer.Option(help="Problems to train on, JSONL or Parquet.")] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="[NAME=]PATH of the problems to aim at; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run: store, checkpoint, metrics, model.")] = None,
    reward: Annotated[str, typer.Option(help="math, reasoning-gym, auto, judge or module:function.")] = "math",
    train_rollouts: Annotated[int, typer.Option(min=1, help="Responses to each problem of a training step.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 1024,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 1.0,
    lr: Annotated[
        float | None, typer.Option(help=f"Learning rate; default {LEARNING_RATE}, with LoRA {LORA_LEARNING_RATE}.")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay; 0 is Adam.")] = 0.0,
    clip_grad: Annotated[float, typer.Option(help="Largest norm of a step's gradient.")] = 1.0,
    minibatches: Annotated[int, typer.Option(min=1, help="Updates a step is dealt to; above 1 with PPO's clip.")] = 1,
    objective: Annotated[str, typer.Option(help="Preset of the update: grpo, dr_grpo, gradalign.")] = "grpo",
    kl_beta: Annotated[
        float,
        typer.Option(
            min=0,
            help="Weight of GRPO's KL term to the model as it is at first; sketches then have the update's objective.",
        ),
    ] = 0.0,
    lora_rank: Annotated[int, typer.Option(min=0, help="Train adapters of this rank; 0: all weights.")] = 0,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: after each round.")] = 0,
    template_kwargs: TemplateKwargs = None,
    skip_unreadable: SkipUnreadable = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    seed: Annotated[int, typer.Option(help="Everything drawn at random follows from it.")] = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Train by GRPO on problems picked anew each round; a killed run goes on with --resume, to the same weights."""
    given = settings or []
    if backend == "verl":
        from gradstore.trainer.verl import main

        _refuse_local_options(context)
        main(given)
        return
    if backend != "local":
        raise RequestError(f"unknown back end {backend!r}, expected local or verl")
    named = _named(given)
    missing = [name for name, value in {"--model": model, "--pool": pool, "--out": out}.items() if value is None]
    if missing:
        raise RequestError(f"gradstore train needs {', '.join(missing)}")
    assert model is not None
    assert pool is not None
    assert out is not None

    import gradstore
    from gradstore.attachments import read_coverage
    from gradstore.engine import Reference
    from gradstore.engine import objective as preset
    from gradstore.engine.gradients.coverage import Coverage
    from gradstore.engine.gradients.models import load_model, load_tokenizer
    from gradstore.trainer.local.grpo import Learner, UpdateSettings
    from gradstore.trainer.local.lora import with_adapters
    from gradstore.trainer.local.policy import LocalPolicy, Sampling
    from gradstore.trainer.local.training import Training
    from gradstore.trainer.round.driver import Rounds
    from gradstore.trainer.round.settings import RoundSettings
    from gradstore.trainer.sampling.readable import readable
    from gradstore.trainer.sampling.rewards import load_reward

    rounds = RoundSettings.from_names({"seed": seed, **named})
    scored_by, arguments = load_reward(reward), template_arguments(template_kwargs) or {}

    def read(path: Path) -> list[dict]:
        placed = gradstore.problems.placed_problems(path)
        names = {record["id"]: where for where, record in placed}
        kept, left_out = readable([record for _, record in placed], scored_by, skip=skip_unreadable, names=names)
        for line in left_out:
            say(f"left out: {line}")
        return kept

    records = read(pool)
    benchmarks = {name: read(path) for name, path in map(_benchmark, benchmark or [])}
    rate = lr if lr is not None else LORA_LEARNING_RATE if lora_rank else LEARNING_RATE
    tokenizer, reference, rule = load_tokenizer(model), None, preset(objective)
    if kl_beta:
        frozen = load_model(model, device=device, dtype="float32").requires_grad_(False)
        reference = Reference(frozen, temperature=rule.temperature)
        rule = replace(rule, kl_beta=kl_beta, reference=reference.digest)
        rounds = replace(rounds, spec=replace(rounds.spec, objective=rule))
    update = UpdateSettings(
        lr=rate,
        weight_decay=weight_decay,
        clip_grad=clip_grad,
        objective=rule,
        minibatches=minibatches,
    )
    # Weights in float32: in half precision small updates are lost, and a probe would measure rounding.
    network: Any = load_model(model, device=device, dtype="float32")
    network = with_adapters(network, lora_rank, seed) if lora_rank else network.requires_grad_(True)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, template_kwargs=arguments)
    policy = LocalPolicy(network, tokenizer, scored_by, sampling, reference=reference)

    def tell(values: Any, step: int) -> None:
        training.metrics.add("selection", step, values)

    chooser = Rounds(out / "store", records, benchmarks, rounds, logger=tell)
    training = Training(
        policy,
        Learner(network, update),
        chooser,
        records,
        rounds,
        out,
        rollouts=train_rollouts,
        save_every=save_every,
        resume=resume,
    )
    if policy.step:
        say(f"{out}: going on after step {policy.step}")
    total = rounds.rounds * rounds.steps
    with progress("training steps", total) as advance:
        advance(policy.step)
        training.run(lambda step: advance(1))
    network.save_pretrained(out / "model")
    policy.tokenizer.save_pretrained(out / "model")
    seen = read_coverage(out / "store")
    facts = {"out": str(out), "steps": policy.step, "rounds": chooser.done, **_rewards(out / "metrics.jsonl")}
    facts["coverage"] = seen
    if json:
        print_json(facts)
        return
    if seen is not None:
        say(Coverage.of(seen).sentence())
    say(
        f"{out}: {facts['steps']} steps in {facts['rounds']} rounds, mean reward of a step {facts['first_reward']:.3f} "
        f"at first, {facts['last_reward']:.3f} at last; model in {out / 'model'}, every round in {out / 'store'}"
    )


def _refuse_local_options(context: typer.Context) -> None:
    """RequestError naming the options that verl would never see."""
    given = [name for name in context.params if _is_given(context, name)]
    ours = ["--" + name.replace("_", "-") for name in given if name not in ("settings", "backend")]
    if ours:
        raise RequestError(
            f"{', '.join(ours)}: only for --backend local; with verl say it as an override of verl's configuration, or "
            "as gradstore.NAME=VALUE (docs/verl.md)"
        )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _named(settings: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE arguments; RequestError for anything else, or a name given twice."""
    found: dict[str, str] = {}
    for text in settings:
        name, sign, value = text.partition("=")
        if not sign or not name or name.startswith("-"):
            raise RequestError(f"{text!r} is no option and no setting, expected NAME=VALUE (gradstore train --help)")
        if name in found:
            raise RequestError(f"setting {name!r} is given twice")
        found[name] = value
    return found


def _benchmark(text: str) -> tuple[str, Path]:
    """The name of a benchmark and its file: NAME=PATH, or a path whose stem is the name."""
    name, sign, path = text.partition("=")
    return (name, Path(path)) if sign else (Path(text).stem, Path(text))


def _rewards(metrics: Path) -> dict[str, float]:
    """Mean rewards of the first and the last step of a run."""
    from json import loads

    rows = [row for row in map(loads, metrics.read_text(encoding="utf-8").splitlines()) if row["kind"] == "step"]
    return {"first_reward": rows[0]["reward"], "last_reward": rows[-1]["reward"]}
