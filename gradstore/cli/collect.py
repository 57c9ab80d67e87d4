"""`collect`: rollouts into a store, one sketch for each problem."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradstore.cli import app
from gradstore.cli.make import Device, Model
from gradstore.cli.rank import Json, StorePath
from gradstore.cli.show import print_json, progress, say
from gradstore.errors import RequestError

if TYPE_CHECKING:
    from torch import nn

    from engine.rollouts import RolloutSource
    from engine.sketches.sketcher import Sketcher, SketchSpec


@app.command()
def collect(
    store: StorePath,
    collection: Annotated[str, typer.Argument(help="Pool or benchmark the rollouts belong to.")],
    rollouts: Annotated[Path, typer.Argument(help="Rollout file, verl rollout dump or responses_sorted.json.")],
    model: Model,
    step: Annotated[
        int | None,
        typer.Option(help="Policy version of the model, 0 the base model; default: the rollouts' own, or 0."),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter to load on the model.")] = None,
    format: Annotated[str, typer.Option(help="auto, rollouts, verl, verl-validation or gradalign.")] = "auto",
    rollout_step: Annotated[
        int | None, typer.Option(help="Take only the rollouts that state this step (of a verl dump: its file's).")
    ] = None,
    append_eos: Annotated[bool, typer.Option("--append-eos", help="End text responses in the end token.")] = False,
    problems: Annotated[
        Path | None, typer.Option(help="Problem records whose ids and prompts the rollouts are given, by prompt.")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="gradalign (default), grpo or dr_grpo; a store keeps the one it was made with.")
    ] = None,
    advantage: Annotated[str | None, typer.Option(help="mean, mean_std or rloo, instead of the preset's.")] = None,
    aggregation: Annotated[str | None, typer.Option(help="As verl's loss_agg_mode, instead of the preset's.")] = None,
    importance: Annotated[
        bool | None, typer.Option("--importance/--on-policy", help="Weight tokens by pi / behaviour policy.")
    ] = None,
    clip: Annotated[float | None, typer.Option(help="PPO clipping of the importance ratio, both sides.")] = None,
    basis: Annotated[
        str | None, typer.Option(help="fitted (default of a new store: to these rollouts), random or dense.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Width of each side of a layer's projection (new store: 16).")
    ] = None,
    dim: Annotated[int | None, typer.Option(help="Dimensions of a fitted or dense sketch (new store: 1024).")] = None,
    fit_problems: Annotated[int, typer.Option(help="Problems with a signal a new projection is fitted to.")] = 200,
    seed: Annotated[int | None, typer.Option(help="Seed of the projection (new store: 0).")] = None,
    modules: Annotated[list[str] | None, typer.Option(help="Regular expression of layers; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="Row type of a new store: int8, int4, 1bit, fp16 or fp32.")] = "int8",
    token_budget: Annotated[int, typer.Option(help="Tokens of one micro-batch.")] = 4096,
    device: Device = None,
    json: Json = False,
) -> None:
    """Turn rollouts into sketches; started again after an interruption, it goes on where it was.

    Into a store that is there, settings not given are the store's own.
    """
    import gradstore
    from engine.gradients.models import load_model, load_tokenizer
    from engine.gradients.objectives import objective as preset
    from engine.rollouts import read_rollouts
    from engine.sketches.bases import create_store, sketcher_of
    from engine.sketches.collector import collect as run
    from engine.sketches.sketcher import SketchSpec

    if step is not None and step < 0:
        raise RequestError(f"step is {step}, expected 0 (the base model) or more")
    opened = gradstore.open(store, mode="a") if store.exists() else None
    spec = SketchSpec(basis="fitted") if opened is None else SketchSpec.of(opened.fingerprint)
    given = {"rank": rank, "dim": dim, "seed": seed, "basis": basis, "modules": tuple(modules) if modules else None}
    changed = {
        "advantage": advantage,
        "aggregation": aggregation,
        "importance": importance,
        "clip_low": clip,
        "clip_high": clip,
    }
    settings = replace(spec.objective if objective is None else preset(objective), **_given(changed))
    spec = replace(spec, objective=settings, token_budget=token_budget, **_given(given))
    records = None if problems is None else gradstore.read_problems(problems)
    source = read_rollouts(
        rollouts,
        tokenizer=load_tokenizer(model),
        format=format,
        append_eos=append_eos,
        step=rollout_step,
        problems=records,
    )
    policy = load_model(model, adapter, device)
    if opened is None:
        sketcher = _new_sketcher(policy, spec, source, fit_problems)
        opened = create_store(store, sketcher, dtype)
    else:
        sketcher = sketcher_of(opened, policy, spec)
    version = (source.step or 0) if step is None else step
    with progress(f"{collection} step {version}", len(source)) as advance:
        report = run(opened, collection, source, sketcher=sketcher, step=version, progress=advance)
    if report.needs_refit:
        say(
            f"warning: the store's projection ranks these gradients with a correlation of {report.fidelity:.2f} to the "
            "exact ranking: the policy has moved from what it was fitted to; collect into a new store to fit anew"
        )
    if json:
        print_json(report.describe())
        return
    say(
        f"{report.collected} problems collected at step {version}: {report.live} live, {report.no_signal} without "
        f"signal, {report.failed} failed; {report.skipped} were there already; "
        f"{report.n_tokens} tokens in {report.seconds:.1f} s"
    )
    for problem_id, reason in report.failures:
        say(f"problem {problem_id!r} failed: {reason}")


def _new_sketcher(policy: "nn.Module", spec: "SketchSpec", source: "RolloutSource", n_fitted: int) -> "Sketcher":
    """A sketcher for a new store; a fitted projection is fitted to a sample of the rollouts."""
    from engine.sketches.fitting import fit_projection, sample_groups
    from engine.sketches.sketcher import Sketcher

    if spec.basis != "fitted":
        return Sketcher(policy, spec)
    checker = Sketcher(policy, replace(spec, basis="random"))
    groups = sample_groups(source, n_fitted, spec.seed)
    for group in groups:
        checker.check(group)
    with progress("fitting the projection", 5 * len(groups)) as advance:
        projection = fit_projection(policy, groups, spec, advance)
    say(
        f"projection fitted to {len(groups)} problems: {projection.dim} dimensions hold "
        f"{projection.captured:.0%} of their gradients' energy"
    )
    return Sketcher(policy, spec, projection)


def _given(settings: Mapping[str, object]) -> dict:
    """The settings that were given."""
    return {name: value for name, value in settings.items() if value is not None}
