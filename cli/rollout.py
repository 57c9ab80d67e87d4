"""`rollout`, and options that other commands have too."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstore.cli import own
from gradstore.cli import ray as ray_options
from gradstore.cli.app import command, opt
from gradstore.cli.query import Json
from gradstore.cli.ranks import n_ranks
from gradstore.cli.show import print_json, progress, say, warn
from gradstore.cli.threads import suit_threads
from gradstore.engine.gradients.model_folder import is_model_folder
from gradstore.errors import RequestError
from gradstore.wording import counted

if TYPE_CHECKING:
    from gradstore import Store
    from gradstore.engine.rollouts import RolloutSource
    from gradstore.trainer.data.columns import Columns


def _model(value: str) -> str:
    if n_ranks() == 1:  # else all ranks would say it
        is_model_folder(value)  # what is not there is said before the libraries of models are imported
    return value


Model = Annotated[str, opt("Folder or name of a transformers causal LM.", callback=_model)]
Trust = Annotated[
    bool, opt("Run Python code that the model's folder brings (never asked for otherwise).", "--trust-remote-code")
]
Device = Annotated[str | None, opt("cpu, cuda, cuda:1 ...; default: a GPU where there is one.")]


TemplateKwargs = Annotated[
    str | None, opt("Arguments of the chat template as JSON: '{\"enable_thinking\": false}'.", "--template-kwargs")
]
OverlongBuffer = Annotated[
    int, opt("DAPO's shaping: penalise responses in the last so many tokens before --max-new-tokens.", min=0)
]
OverlongPenalty = Annotated[float, opt("--overlong-buffer: the penalty of a response of --max-new-tokens.")]
ShardOf = Annotated[
    str | None,
    opt("I/N: only shard I (from 0) of N that divide the file's problems; `merge` unites their stores.", "--shard"),
]
SkipUnreadable = Annotated[
    bool, opt("Leave problems out whose ground truth the reward cannot read.", "--skip-unreadable")
]


@command(
    needs={"overlong_penalty": "overlong_buffer"},
    panels={
        "What is sampled": "n range shard seed step max_new_tokens temperature top_p as_chat template_kwargs",
        own.PANEL: own.NAMES,
        "How it is rewarded": "reward skip_unreadable overlong_buffer overlong_penalty",
        "By what": "model backend batch_tokens device trust_remote_code",
        "A server": "server policy_version server_api served_model concurrency server_timeout",
        "vLLM": "tensor_parallel_size pipeline_parallel_size gpu_memory_utilization max_model_len",
        "Ray workers": "ray workers threads",
        "What is written": "out",
    },
    example="gradstore rollout pool.jsonl --model MODEL --reward math -n 16 --out pool-rollouts.jsonl",
)
def rollout(
    problems: Annotated[
        Path,
        typer.Argument(
            help="Problem records, flat or verl's (JSON Lines, CSV, Parquet), or with --prompt and --truth what `data` "
            "takes: FILE or hub:USER/NAME[/CONFIG][:SPLIT][:COUNT]."
        ),
    ],
    model: Model,
    out: Annotated[Path, opt("Rollout file to write, .jsonl or .parquet.")],
    reward: Annotated[
        str, opt("math, reasoning-gym, judge, auto, or [isolated:]module:function as verl's compute_score.")
    ],
    n: Annotated[int, opt("Rollouts per problem.", "-n")] = 16,
    range: Annotated[str | None, opt("A:B: only problems A to B - 1 of the file, counted from 0.", "--range")] = None,
    shard: ShardOf = None,
    prompt: own.Prompt = None,
    truth: own.Truth = None,
    truth_after: own.TruthAfter = None,
    id: own.Id = None,
    source: own.Source = None,
    template: own.Template = None,
    backend: Annotated[
        str | None, opt("transformers, vllm or server [default: transformers, or server with --server].")
    ] = None,
    server: Annotated[
        str | None,
        opt("URL of a running server with the weights of --policy-version; its key is in $GRADSTORE_SERVER_KEY."),
    ] = None,
    policy_version: Annotated[
        str | None, opt("server: name of the weights that it holds; kept with the rollouts.")
    ] = None,
    server_api: Annotated[str | None, opt("server: vllm or sglang [default: vllm].")] = None,
    served_model: Annotated[str | None, opt("server: its name of the model, where it serves several.")] = None,
    concurrency: Annotated[int | None, opt("server: problems asked for at once [default: 64].")] = None,
    server_timeout: Annotated[
        float | None, opt("server: seconds for all responses of a problem [default: 600].")
    ] = None,
    max_new_tokens: Annotated[int, opt("Longest response.")] = 1024,
    temperature: Annotated[float, opt("Sampling temperature.")] = 1.0,
    top_p: Annotated[float, opt("Nucleus of the sampling distribution.")] = 1.0,
    overlong_buffer: OverlongBuffer = 0,
    overlong_penalty: OverlongPenalty = 1.0,
    seed: Annotated[int, opt("Same seed, same rollouts.")] = 0,
    step: Annotated[int | None, opt("Policy version of the model, written in every row.")] = None,
    template_kwargs: TemplateKwargs = None,
    as_chat: Annotated[
        bool | None,
        opt(
            "Sample plain-text prompts as one user message through the model's chat template, or as they stand.",
            "--as-chat/--as-text",
        ),
    ] = None,
    skip_unreadable: SkipUnreadable = False,
    batch_tokens: Annotated[
        int | None, opt("transformers: tokens sampled at once [default: what memory allows].")
    ] = None,
    tensor_parallel_size: Annotated[int | None, opt("vllm: GPUs that share the model [default: 1].")] = None,
    pipeline_parallel_size: Annotated[int | None, opt("vllm: stages the layers are divided into [default: 1].")] = None,
    gpu_memory_utilization: Annotated[
        float | None, opt("vllm: share of a GPU's memory to take [default: vLLM's].")
    ] = None,
    max_model_len: Annotated[
        int | None, opt("vllm: longest prompt and response together [default: the model's].")
    ] = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    ray: ray_options.Address = None,
    workers: ray_options.Workers = None,
    threads: ray_options.Threads = None,
    json: Json = False,
) -> None:
    """Sample and reward rollouts; started again after an interruption, it goes on where it was."""
    from dataclasses import asdict

    from gradstore.outputs import check_output
    from gradstore.problems import as_message, placed_problems
    from gradstore.shards import WHOLE, Shard
    from gradstore.trainer.sampling.backends import Backend, load_backend
    from gradstore.trainer.sampling.on_workers import OnWorkers, Replica
    from gradstore.trainer.sampling.readable import readable
    from gradstore.trainer.sampling.rewards import load_reward
    from gradstore.trainer.sampling.rollout import CHUNK, check_settings
    from gradstore.trainer.sampling.rollout import rollout as run

    backend = backend or ("transformers" if server is None else "server")
    options = _backend_options(
        backend,
        transformers={"device": device, "batch_tokens": batch_tokens},
        vllm={
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": max_model_len,
        },
        server={
            "server": server,
            "policy_version": policy_version,
            "server_api": server_api,
            "served_model": served_model,
            "concurrency": concurrency,
            "server_timeout": server_timeout,
        },
    )
    if backend == "server" and not (server and policy_version):
        raise RequestError("a server is named by --server URL, and the weights that it holds by --policy-version NAME")
    spread = ray_options.asked(ray, workers, threads, device)
    if backend == "server" and spread is not None:
        raise RequestError("--ray is for models of its own; a server has its own, and --concurrency asks it for more")
    arguments = template_arguments(template_kwargs)
    sampling: dict[str, Any] = {"n": n, "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    check_settings(**sampling, out=out, step=step, seed=seed)
    check_output(out, [problems])
    columns = own.columns(prompt, truth, truth_after, id, source, template)
    placed = placed_problems(problems) if columns is None else _placed(str(problems), columns)
    if range is not None:
        first, last = row_range(range, f"--range {range}")
        if last > len(placed):
            raise RequestError(f"--range {range}: {problems} has {len(placed)} problems")
        placed = placed[first:last]
    part = WHOLE if shard is None else Shard.parse(shard)
    chunk = part.block(len(placed)) if shard else CHUNK
    if shard is not None:
        placed = [placed[place] for place in part.places(len(placed), f"{problems}, --shard {shard}")]
    names = {record["id"]: where for where, record in placed}
    scored_by = load_reward(reward)
    if as_chat is not None and all(not isinstance(record["prompt"], str) for _, record in placed):
        raise RequestError(
            f"--as-chat and --as-text are for plain-text prompts; those of {problems} are chat messages: leave it out"
        )
    if as_chat:
        placed = [(where, {**record, "prompt": as_message(record["prompt"])}) for where, record in placed]
    records, left_out = readable([record for _, record in placed], scored_by, skip=skip_unreadable, names=names)
    for line in left_out:
        say(f"left out: {line}")
    if n == 1 or not temperature:
        alike = "one rollout of each problem" if n == 1 else "rollouts at temperature 0 are all the same"
        warn(f"{alike}: good for measuring accuracy; without differing rewards no problem will have a gradient")
    gpus = (tensor_parallel_size or 1) * (pipeline_parallel_size or 1)
    options |= {"trust_remote_code": trust_remote_code}
    with ExitStack() as stack:
        sampled_by: Backend
        if spread is None:
            sampled_by = load_backend(backend, model, **options)
            if backend == "transformers":
                suit_threads(sampled_by.model)  # type: ignore[attr-defined]
        else:
            size = stack.enter_context(spread.connected(gpus))
            replica = Replica(backend=backend, model=model, options=options)
            sampled_by = stack.enter_context(OnWorkers(replica, **asdict(size)))
        n_plain = sum(isinstance(record["prompt"], str) for record in records)
        if as_chat is None and n_plain and getattr(sampled_by.tokenizer, "chat_template", None):
            warn(
                f"{n_plain} of {len(records)} prompts are plain text and are sampled as they stand, though {model} has "
                "a chat template; `select` writes them for training as chat messages, which are other tokens: give "
                "--as-chat (as one user message) or --as-text (as they stand)"
            )
        with progress("rollouts", len(records)) as advance:
            report = run(
                records,
                sampled_by,
                scored_by,
                out,
                seed=seed,
                chunk=chunk,
                shard=part,
                step=step,
                template_kwargs=arguments,
                overlong_buffer=overlong_buffer,
                overlong_penalty=overlong_penalty,
                names=names,
                progress=advance,
                **sampling,
            )
        costs = sampled_by.costs if isinstance(sampled_by, OnWorkers) else None
    if report.stopped:
        warn(
            f"{report.stopped} of {report.rollouts} responses were not graded and score 0; extra.reward_stopped of "
            f"their rows says why. The first: {report.first_stopped}"
        )
    if not report.with_signal and n > 1 and temperature:
        warn(f"no problem has rewards that differ: none of {report.path} has a gradient")
    if json:
        done = {**asdict(report), "path": str(report.path), "left_out": left_out}
        print_json(done if costs is None else {**done, "workers": ray_options.described(costs)})
        return
    say(
        f"{report.path}: {counted(report.rollouts, 'rollout')} of {counted(report.problems, 'problem')}, "
        f"mean reward {report.mean_reward:.3f}, {report.with_signal} with differing rewards, "
        f"{counted(report.tokens, 'token')}; {report.kept_problems} problems were there"
    )
    ray_options.say_costs(costs or [])


def _placed(problems: str, columns: "Columns") -> list[tuple[str, dict[str, Any]]]:
    """(where, record) of the problems that these columns of a file or data set hold."""
    from gradstore.trainer.data.pool import Options, build

    records = build(own.parts([problems]), Options(columns=columns)).records
    own.say_first(records)
    return [(problems, record) for record in records]


def check_rollouts_of(store: "Store", collection: str, source: "RolloutSource", path: Path) -> None:
    """RequestError for rollouts of problems that the collection has no rows of."""
    others = set(source.problem_ids) - set(store.view(collection).ids.tolist())
    if others:
        raise RequestError(
            f"{path}: problem {min(others)!r} has no row in {collection}; give the rollouts that it was collected from"
        )


def row_range(text: str, where: str) -> tuple[int, int]:
    """First and last + 1 of a range A:B; RequestError, beginning with `where`, for another text."""
    first, _, last = text.partition(":")
    if not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit() and int(first) < int(last)):
        raise RequestError(f"{where}: expected A:B with 0 <= A < B, whole numbers, as in 0:5000")
    return int(first), int(last)


def template_arguments(text: str | None) -> dict[str, Any] | None:
    """The arguments that --template-kwargs holds; RequestError for what is no JSON object."""
    if text is None:
        return None
    from gradstore.keepable import parsed

    try:
        arguments = parsed(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(
            f"--template-kwargs is {text!r}, expected a JSON object such as '{{\"enable_thinking\": false}}'"
        )
    return arguments


def _backend_options(backend: str, **options: dict[str, Any]) -> dict[str, Any]:
    """The options given for this back end; RequestError for one that is given and is another back end's."""
    for other, known in options.items():
        given = ["--" + name.replace("_", "-") for name, value in known.items() if value is not None]
        if other != backend and given:
            raise RequestError(f"{', '.join(given)}: only for --backend {other}, not for {backend}")
    return {name: value for name, value in options.get(backend, {}).items() if value is not None}
