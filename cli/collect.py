"""`collect`: rollouts into a store, one sketch for each problem."""

from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from gradstore.cli import ray as ray_options
from gradstore.cli.app import as_option, command, given, opt
from gradstore.cli.collected import checked, say_collected, warn_of
from gradstore.cli.completion import collections
from gradstore.cli.query import Json, StorePath
from gradstore.cli.ranks import check_divided, leads, load_policy, n_ranks
from gradstore.cli.rollout import Device, Model, ShardOf, TemplateKwargs, Trust, template_arguments
from gradstore.cli.show import print_json, progress, say, warn
from gradstore.cli.solutions import collect_solutions
from gradstore.errors import RequestError, check_known, check_number
from gradstore.undo import undone_on

if TYPE_CHECKING:
    from torch import nn

    from gradstore import Store
    from gradstore.engine.gradients.optimizer_direction import OptimizerDirection
    from gradstore.engine.rollouts import Group
    from gradstore.engine.sketches.spec import SketchBatch, SketchSpec


@command(
    divided=True,
    needs={"formula": "optimizer", "bias_correction": "optimizer"},
    panels={
        "What is read": "format rollout_step shard problems append_eos template_kwargs solutions step",
        "The policy": "model adapter device trust_remote_code token_budget",
        "The objective": "objective advantage aggregation importance clip kl_beta reference",
        "The projection of a new store": "basis rank right_rank dim fit_problems seed modules embeddings head "
        "dtype like accept_coverage",
        "How well it ranks": "measure benchmark_rollouts refit every_basis halves",
        "Adam's step": "optimizer formula bias_correction",
        "Ray workers": "ray workers threads",
    },
    example="gradstore collect store pool pool-rollouts.jsonl --model MODEL",
)
def collect(
    context: typer.Context,
    store: StorePath,
    collection: Annotated[
        str, typer.Argument(help="Pool or benchmark the rollouts belong to.", autocompletion=collections)
    ],
    rollouts: Annotated[Path, typer.Argument(help="Rollout file, verl rollout dump or responses_sorted.json.")],
    model: Model,
    step: Annotated[
        int | None, opt("Policy version of the model, 0 the base model; default: the rollouts' own, or 0.")
    ] = None,
    adapter: Annotated[str | None, opt("PEFT adapter to load on the model.")] = None,
    format: Annotated[
        str,
        opt(
            "auto, rollouts, verl, verl-validation, gradalign or trl (trl:REWARD where several columns may be rewards)."
        ),
    ] = "auto",
    rollout_step: Annotated[
        int | None, opt("Take only the rollouts that state this step (of a verl dump: its file's).")
    ] = None,
    shard: ShardOf = None,
    like: Annotated[
        Path | None,
        opt("Make the new store like this one: its settings and its fitted projection, so that both can be merged."),
    ] = None,
    append_eos: Annotated[bool, opt("End text responses in the end token.", "--append-eos")] = False,
    solutions: Annotated[
        bool,
        opt(
            "The file has problems with reference solutions (extra.solution) instead of rollouts: their likelihood's "
            "gradients become rows of COLLECTION.solutions, in a store that is there.",
            "--solutions",
        ),
    ] = False,
    problems: Annotated[
        Path | None, opt("Problem records whose ids and prompts the rollouts are given, by prompt.")
    ] = None,
    template_kwargs: TemplateKwargs = None,
    objective: Annotated[
        str | None,
        opt(
            "gradalign (default), grpo, dr_grpo, dapo, gspo or cispo, and changes of its fields: "
            "`grpo,importance=true,clip_low=0.2,clip_high=0.28`; NAME=VALUE alone changes the store's own."
        ),
    ] = None,
    advantage: Annotated[str | None, opt("mean, mean_std or rloo, instead of the preset's.")] = None,
    aggregation: Annotated[str | None, opt("As verl's loss_agg_mode, instead of the preset's.")] = None,
    importance: Annotated[
        bool | None, opt("Weight tokens by pi / behaviour policy.", "--importance/--on-policy")
    ] = None,
    clip: Annotated[float | None, opt("clip_low and clip_high of the objective, both.")] = None,
    kl_beta: Annotated[
        float | None, opt("Weight of GRPO's KL term to a reference policy (LearnAlign: 0.04).", min=0)
    ] = None,
    reference: Annotated[
        str | None, opt("Model of the KL term; default: `reference_logprobs` as the rollouts have them.")
    ] = None,
    basis: Annotated[str | None, opt("fitted (default of a new store: to these rollouts), random or dense.")] = None,
    rank: Annotated[int | None, opt("Width of each side of a layer's projection (new store: 16).")] = None,
    dim: Annotated[int | None, opt("Dimensions of a fitted or dense sketch (new store: 1024).")] = None,
    fit_problems: Annotated[
        int, opt("Problems with a signal a new projection is fitted to, a quarter of them held out to measure it.")
    ] = 88,
    seed: Annotated[int | None, opt("Seed of the projection (new store: 0).")] = None,
    modules: Annotated[list[str] | None, opt("Regular expression of layers; may be repeated.")] = None,
    embeddings: Annotated[
        bool | None,
        opt("Sketch the input embedding too (a new store: where too little of the gradient is seen without it)."),
    ] = None,
    dtype: Annotated[str, opt("Row type of a new store: int8, int4, 1bit, fp16 or fp32.")] = "int8",
    head: Annotated[
        bool, opt("The output layer's gradient alone, from the forward pass (new store: 64 x 128).", "--head")
    ] = False,
    right_rank: Annotated[int | None, opt("Width of the input side where it is not --rank; random bases only.")] = None,
    optimizer: Annotated[
        Path | None, opt("Sketch Adam's step: optimizer.pt, a Trainer checkpoint, or a verl checkpoint's folder.")
    ] = None,
    formula: Annotated[str, opt("--optimizer: less (both moments) or precondition (second).")] = "less",
    bias_correction: Annotated[bool, opt("--optimizer: correct its bias.", "--bias-correction")] = False,
    benchmark_rollouts: Annotated[
        Path | None, opt("Rollouts of the benchmark: bases are fitted to it too, and measured against it.")
    ] = None,
    refit: Annotated[
        str, opt("warn: say when the projection no longer ranks well; auto: fit a new basis for these rows.")
    ] = "warn",
    measure: Annotated[
        str,
        opt(
            "How well sketches rank: auto: once, when a projection is fitted, and against --benchmark-rollouts; "
            "always: in this run too; never."
        ),
    ] = "auto",
    every_basis: Annotated[
        bool, opt("Sketch in every basis that rows are in: what a benchmark needs.", "--every-basis")
    ] = False,
    halves: Annotated[
        bool, opt("Keep even and odd rollouts too, for reliabilities (as much work again).", "--halves")
    ] = False,
    token_budget: Annotated[int | None, opt("Tokens of one micro-batch [default: as memory allows].")] = None,
    accept_coverage: Annotated[
        float | None, opt("Least share of the gradient that a new store's sketches must see (0.95).", min=0, max=1)
    ] = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    ray: ray_options.Address = None,
    workers: ray_options.Workers = None,
    threads: ray_options.Threads = None,
    json: Json = False,
) -> None:
    """Turn rollouts into sketches; started again after an interruption, it goes on where it was.

    Into a store that is there, settings not given are the store's own. Under torchrun the model is sharded over the
    ranks and each sketches its own problems; rank 0 writes.
    """
    import gradstore
    from gradstore.attachments import read_coverage
    from gradstore.durable import check_writable
    from gradstore.engine.assessing.mixed_up import mixed_up
    from gradstore.engine.assessing.refit import rows_of_fit
    from gradstore.engine.assessing.same_policy import SamePolicy
    from gradstore.engine.assessing.start import default_spec, start_store
    from gradstore.engine.gradients.logprobs import Reference
    from gradstore.engine.gradients.models import load_model, load_tokenizer, vocabulary_size
    from gradstore.engine.gradients.objectives import Objective
    from gradstore.engine.rollouts import read_rollouts
    from gradstore.engine.sketches.bases import bases_in_use, basis_of, sketcher_of
    from gradstore.engine.sketches.collector import Measure
    from gradstore.engine.sketches.collector import collect as run
    from gradstore.engine.sketches.fitting import sample_groups
    from gradstore.engine.sketches.on_workers import OnWorkers, Replica
    from gradstore.engine.sketches.spec import SketchSpec
    from gradstore.layout import DERIVED, DTYPES, check_name
    from gradstore.likeness import check_like, create_like
    from gradstore.settings import build, parse
    from gradstore.shards import Shard

    spread = ray_options.asked(ray, workers, threads, device)
    check_number("step", step or 0, least=0)
    check_number("seed", seed or 0, least=0)
    check_name(collection)
    if collection.endswith(DERIVED):
        raise RequestError(f"{collection}: names ending in {', '.join(DERIVED)} are the store's own; choose another")
    check_number("--fit-problems", fit_problems, least=4)
    check_known("dtype", dtype, DTYPES)
    check_known("--refit", refit, ("warn", "auto"))
    check_known("--measure", measure, get_args(Measure))
    if refit == "auto" and measure == "never":
        raise RequestError("--refit auto fits anew by what it measures: leave --measure never out")
    if refit == "auto" and benchmark_rollouts is None:
        raise RequestError("--refit auto measures against the benchmark: give --benchmark-rollouts")
    undivided = [
        *(("--solutions", solutions), ("--optimizer", optimizer), ("--reference", reference)),
        *(("--refit auto", refit == "auto"), ("--shard", shard), ("--like", like), ("--ray", ray)),
    ]
    check_divided("collect", *(name for name, own in undivided if own))
    if refit == "auto" and (shard or like):
        raise RequestError("--refit auto fits a projection to this shard alone, which cannot be merged: leave it out")
    part = None if shard is None else Shard.parse(shard)
    opened = gradstore.open(store, mode="a" if leads() else "r") if store.exists() else None
    if opened is None:
        check_writable(store)
    if like is not None and opened is not None:
        check_like(opened, like)
    if solutions:
        if opened is None:
            raise RequestError(f"{store}: no store there; collect rollouts first, which its projection is fitted to")
        collect_solutions(opened, collection, rollouts, given(context))
        return
    kin = opened or (None if like is None else gradstore.open(like))
    spec = default_spec(head=head, optimizer=optimizer is not None)
    if kin is not None:
        spec = SketchSpec.of(kin.fingerprint)
    changed = _given(
        advantage=advantage, aggregation=aggregation, importance=importance,
        clip_low=clip, clip_high=clip, kl_beta=kl_beta,
    )  # fmt: skip
    named = {} if objective is None else parse(SketchSpec, {"objective": objective}, "--")["objective"]
    settings = build(Objective, {**named, **changed}, "--objective", default=spec.objective)
    projected = _given(
        rank=rank, right_rank=right_rank, dim=dim, seed=seed, basis=basis, modules=tuple(modules) if modules else None,
        head_only=head or None, embeddings=embeddings, token_budget=token_budget,
    )  # fmt: skip
    spec = replace(spec, objective=settings, **projected)
    _check_idle(given(context), kin, spec)
    if part is not None and part.index and kin is None and spec.basis == "fitted":
        raise RequestError(
            f"--shard {shard}: a store of its own would have a projection fitted to its own rollouts, and could not be "
            "merged: give --like STORE, the store of shard 0"
        )
    if reference is not None and not settings.kl_beta:
        raise RequestError("--reference is for a KL term: give its weight, --kl-beta 0.04")
    if settings.reference is not None and reference is None:
        raise RequestError(f"the rows of {store} have a KL term: give its model, --reference")
    records = None if problems is None else gradstore.read_problems(problems)
    read = partial(
        read_rollouts,
        tokenizer=load_tokenizer(model, trust_remote_code=trust_remote_code),
        append_eos=append_eos,
        vocabulary=vocabulary_size(model, trust_remote_code=trust_remote_code),
        template_kwargs=template_arguments(template_kwargs),
    )
    source = read(rollouts, format=format, step=rollout_step, problems=records)
    mine = None if part is None else part.places(len(source), f"{rollouts}, --shard {shard}")
    if settings.kl_beta and reference is None and not source.has_reference:
        raise RequestError(f"{rollouts}: has no `reference_logprobs` for the KL term: give its model, --reference")
    policy = load_policy(model, adapter, device, trust_remote_code=trust_remote_code)
    wanted: list[Group] = [] if benchmark_rollouts is None else list(read(benchmark_rollouts).groups())
    if reference is not None:
        log_probabilities = Reference(
            load_model(reference, device=device, trust_remote_code=trust_remote_code),
            temperature=settings.temperature,
            token_budget=spec.token_budget,
        )
        spec = replace(spec, objective=replace(settings, reference=log_probabilities.digest))
        source.change(log_probabilities)
        wanted = [log_probabilities(group) for group in wanted]
    direction = partial(_direction, path=optimizer, formula=formula, bias_correction=bias_correction)
    adam = direction(policy)
    version = (source.step or 0) if step is None else step
    same = SamePolicy(policy) if n_ranks() == 1 else None  # of a sharded model no rank has all weights
    if same is not None and opened is not None and (sentence := same.warning(opened.path, version)) is not None:
        warn(sentence)
    if opened is not None and (sentence := mixed_up(opened, collection, source.problem_ids)) is not None:
        warn(sentence)
    outcome = None
    known: list[SketchBatch] = []
    is_new = opened is None
    if kin is None:
        made = start_store(
            store,
            policy,
            source,
            spec,
            benchmark=wanted,
            dtype=dtype,
            fit_problems=fit_problems,
            measured=measure != "never",
            optimizer=adam,
            accept_coverage=accept_coverage,
            widen=embeddings is None,
            option="--accept-coverage ",
            say=say,
            bar=progress,
        )
        opened, sketcher, known = made.store, made.sketcher, made.rows
    else:
        sketcher = sketcher_of(kin, policy, spec, optimizer=adam)
        basis_of(kin, sketcher.fingerprint)
        if opened is None:
            opened = create_like(store, kin.path)
        elif like is None and spec.basis == "fitted" and not any(map(opened.steps, opened.collections)):
            # begun, and ended before the rows of the fit were published
            known = rows_of_fit(sketcher, sample_groups(source, fit_problems, spec.seed), measured=measure != "never")
        if wanted and spec.basis == "fitted" and measure != "never":
            sketcher, outcome = checked(opened, sketcher, source, fit_problems, wanted, version, refit == "auto")
    if mine is not None:  # After the fit, which is to all problems.
        source.keep(mine)
    also = bases_in_use(opened, besides=collection) if every_basis else []
    undo = undone_on(RequestError, opened) if is_new and leads() else nullcontext()
    with undo, ExitStack() as stack:
        on_workers = None
        if spread is not None:
            size = stack.enter_context(spread.connected())
            replica = Replica(
                model=model,
                spec=sketcher.spec,
                adapter=adapter,
                device=device,
                trust_remote_code=trust_remote_code,
                direction=direction,
            )
            on_workers = stack.enter_context(OnWorkers(replica, sketcher, **asdict(size)))
        with progress(f"{collection} step {version}", len(source)) as advance:
            report = run(
                opened,
                collection,
                source,
                sketcher=sketcher,
                step=version,
                measure="never" if wanted else cast("Measure", measure),
                known=known,
                also=also,
                sketch_each=on_workers,
                progress=advance,
            )
        if same is not None:
            same.keep(opened.path, version)
        if halves:
            from gradstore.engine.assessing.stored_halves import collect_halves

            collect_halves(opened, collection, source, sketcher=sketcher, step=version, sketch_each=on_workers)
    costs = [] if on_workers is None else on_workers.costs
    warn_of(report)
    if json:
        refitted = None if outcome is None else outcome.describe()
        found = {**report.describe(), "refit": refitted, "coverage": read_coverage(opened.path)}
        print_json(found if spread is None else {**found, "workers": ray_options.described(costs)})
        return
    say_collected(report, version)
    ray_options.say_costs(costs)


def _direction(
    policy: "nn.Module", path: Path | None, formula: str, bias_correction: bool
) -> "OptimizerDirection | None":
    from gradstore.engine.gradients.optimizer_direction import AdamState, Formula, OptimizerDirection

    if path is None:
        return None
    state = AdamState.of_file(path, policy)
    return OptimizerDirection(state, cast("Formula", formula), bias_correction=bias_correction)


def _check_idle(given: dict, kin: "Store | None", spec: "SketchSpec") -> None:
    """RequestError for options that change nothing with this projection, or contradict the store that is there."""
    if "dtype" in given and kin is not None and kin.dtype != given["dtype"]:
        raise RequestError(f"--dtype {given['dtype']}: the rows of {kin.path} are {kin.dtype}; leave it out")
    unfitted = None if spec.basis == "fitted" else f"a {spec.basis} basis is fitted to nothing"
    idle = {
        "dim": "a random basis has the dimensions of its cores: give --rank" if spec.basis == "random" else None,
        "fit_problems": unfitted,
        "benchmark_rollouts": unfitted,
    }
    for name in given.keys() & idle.keys():
        if idle[name] is not None:
            raise RequestError(f"{as_option(name)}: {idle[name]}; leave it out")


def _given(**settings: object) -> dict:
    """The settings that were given."""
    return {name: value for name, value in settings.items() if value is not None}
