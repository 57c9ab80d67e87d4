"""`rollout`, `collect`, `demo`: the commands that run a model; and those a later release brings."""

from pathlib import Path
from typing import Annotated

import typer

from gradstore.cli import app
from gradstore.cli.rank import Json, StorePath
from gradstore.cli.show import print_json, print_table, progress, say
from gradstore.errors import RequestError

Model = Annotated[str, typer.Option(help="Folder or name of a transformers causal LM.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU where there is one.")]


@app.command()
def rollout(
    problems: Annotated[Path, typer.Argument(help="Problem records, JSONL or Parquet, flat or verl's.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="Rollout file to write, .jsonl or .parquet.")],
    reward: Annotated[str, typer.Option(help="math, reasoning-gym, or module:function as verl's compute_score.")],
    n: Annotated[int, typer.Option("-n", help="Rollouts per problem.")] = 16,
    backend: Annotated[str, typer.Option(help="transformers or vllm.")] = "transformers",
    max_new_tokens: Annotated[int, typer.Option(help="Longest response.")] = 1024,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of the sampling distribution.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same rollouts.")] = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Sample and reward rollouts; started again after an interruption, it goes on where it was."""
    from dataclasses import asdict

    import gradstore
    from trainer.backends import load_backend
    from trainer.rewards import load_reward
    from trainer.rollout import rollout as run

    records = gradstore.read_problems(problems)
    scored_by = load_reward(reward)
    options = {"device": device} if backend == "transformers" else {}
    report = run(
        records,
        load_backend(backend, model, **options),
        scored_by,
        out,
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    if json:
        print_json({**asdict(report), "path": str(report.path)})
        return
    say(
        f"{report.path}: {report.rollouts} rollouts of {report.problems} problems, "
        f"mean reward {report.mean_reward:.3f}, {report.with_signal} with differing rewards, "
        f"{report.tokens} tokens; {report.kept_problems} problems were there"
    )


@app.command()
def collect(
    store: StorePath,
    collection: Annotated[str, typer.Argument(help="Pool or benchmark the rollouts belong to.")],
    rollouts: Annotated[Path, typer.Argument(help="Rollout file, verl rollout dump or responses_sorted.json.")],
    model: Model,
    step: Annotated[int, typer.Option(help="Policy version of the model; 0 is the base model.")] = 0,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter to load on the model.")] = None,
    format: Annotated[str, typer.Option(help="auto, jsonl, parquet, verl or gradalign.")] = "auto",
    objective: Annotated[
        str | None, typer.Option(help="gradalign (default), grpo or dr_grpo; a store keeps the one it was made with.")
    ] = None,
    advantage: Annotated[str | None, typer.Option(help="mean, mean_std or rloo, instead of the preset's.")] = None,
    aggregation: Annotated[str | None, typer.Option(help="As verl's loss_agg_mode, instead of the preset's.")] = None,
    importance: Annotated[
        bool | None, typer.Option("--importance/--on-policy", help="Weight tokens by pi / behaviour policy.")
    ] = None,
    clip: Annotated[float | None, typer.Option(help="PPO clipping of the importance ratio, both sides.")] = None,
    rank: Annotated[
        int | None, typer.Option(help="Width of each side of a layer's projection (new store: 16).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the projection (new store: 0).")] = None,
    modules: Annotated[list[str] | None, typer.Option(help="Regular expression of layers; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="Row type of a new store: int8, int4, fp16 or fp32.")] = "int8",
    token_budget: Annotated[int, typer.Option(help="Tokens of one micro-batch.")] = 4096,
    device: Device = None,
    json: Json = False,
) -> None:
    """Turn rollouts into sketches; started again after an interruption, it goes on where it was.

    Into a store that is there, settings not given are the store's own.
    """
    from dataclasses import replace

    import gradstore
    from engine.collector import collect as run
    from engine.models import load_model, load_tokenizer
    from engine.objectives import objective as preset
    from engine.rollouts import read_rollouts
    from engine.sketcher import Sketcher, SketchSpec

    if step < 0:
        raise RequestError(f"step is {step}, expected 0 (the base model) or more")
    opened = gradstore.open(store, mode="a") if store.exists() else None
    spec = SketchSpec() if opened is None else SketchSpec.of(opened.fingerprint)
    changes = {
        "advantage": advantage,
        "aggregation": aggregation,
        "importance": importance,
        "clip_low": clip,
        "clip_high": clip,
    }
    settings = replace(
        spec.objective if objective is None else preset(objective),
        **{name: value for name, value in changes.items() if value is not None},  # type: ignore[arg-type]
    )
    spec = replace(
        spec,
        rank=spec.rank if rank is None else rank,
        seed=spec.seed if seed is None else seed,
        objective=settings,
        modules=tuple(modules) if modules else spec.modules,
        token_budget=token_budget,
    )
    source = read_rollouts(rollouts, tokenizer=load_tokenizer(model), format=format)
    sketcher = Sketcher(load_model(model, adapter, device), spec)
    if opened is None:
        opened = gradstore.create(store, dim=sketcher.dim, fingerprint=sketcher.fingerprint, dtype=dtype)
    with progress(f"{collection} step {step}", len(source)) as advance:
        report = run(opened, collection, source, sketcher=sketcher, step=step, progress=advance)
    if json:
        print_json(report.describe())
        return
    say(
        f"{report.collected} problems collected: {report.live} live, {report.no_signal} without signal, "
        f"{report.failed} failed; {report.skipped} were there already; "
        f"{report.n_tokens} tokens in {report.seconds:.1f} s"
    )
    for problem_id, reason in report.failures:
        say(f"problem {problem_id!r} failed: {reason}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the store and the selections.")] = Path("gradstore-demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds to repeat the comparison over.")] = 3,
    json: Json = False,
) -> None:
    """The main job on a small model and 2,000 problems: roll out, collect, query, select."""
    from gradstore.cli.rank import query
    from trainer.demo.run import DemoSettings, run_demo, summary

    settings = DemoSettings()
    results = [run_demo(out / f"seed-{seed}", seed, settings, say) for seed in range(seeds)]
    facts = summary(results)
    if json:
        print_json(facts)
        return
    store = out / "seed-0" / "store"
    query(store, against="benchmark", top=5)
    columns = ["target family", "broken rewards", "wrong truth", "coin flip"]
    print_table(
        f"\nWhat each selector chose: {settings.n_selected} of {settings.n_pool} problems, "
        f"percent, mean ± standard deviation over {seeds} seeds",
        ["selector", *columns],
        [
            [name, *(f"{100 * mean:.1f} ± {100 * spread:.1f}" for mean, spread in shares.values())]
            for name, shares in facts["shares"].items()
        ],
        right=columns,
    )
    print_table(
        "\nSeconds of each stage, mean over seeds",
        ["stage", "seconds"],
        [[stage, f"{seconds:.2f}"] for stage, seconds in facts["seconds"].items()],
        right=["seconds"],
    )
    states = ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in facts["states"].items())
    print(f"\n{facts['bytes_per_problem']:.0f} bytes per problem ({facts['dim']} dimensions as int8); pool: {states}")
    print(f"ask again: gradstore query {store} --against benchmark --top 20 --layers 3")


def _later(name: str, release: str, brings: str) -> None:
    @app.command(
        name, help=f"{brings}. Comes with release {release}.", context_settings={"ignore_unknown_options": True}
    )
    def command(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
        raise RequestError(f"`gradstore {name}` comes with release {release}: {brings.lower()}")


_later("train", "0.4", "Train with a selection each round, embedded or with verl")
_later("report", "0.5", "A page of what a store holds and how alignment drifted")
_later("serve", "0.5", "A local explorer of a store in the browser")
