"""`data`: problem files from public data sets and reasoning-gym, mixed, cleaned, spoiled on purpose."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstore.cli import own
from gradstore.cli.app import check_alone, command, opt
from gradstore.cli.query import Json, Overwrite
from gradstore.cli.rollout import row_range
from gradstore.cli.show import print_json, print_table, say, warn
from gradstore.errors import RequestError
from gradstore.wording import counted

if TYPE_CHECKING:
    from gradstore.trainer.data.corruption import Corruption
    from gradstore.trainer.data.pool import Part


@command(
    panels={
        "How much of what": "count range size seed exclude",
        own.PANEL: own.NAMES,
        "Data sets known by name": "known local config solutions instruction corrupt",
        "What is written": "out form overwrite",
    },
    example="gradstore data own.csv --prompt question --truth answer --out pool.jsonl",
)
def data(
    context: typer.Context,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="NAME[@SPLIT][:COUNT] of a data set, reasoning-gym:TASK:COUNT, FILE[:COUNT] of problems, or with "
            "--prompt and --truth FILE or hub:USER/NAME[/CONFIG][:SPLIT][:COUNT]. A COUNT of 0.9 is a share of --size."
        ),
    ] = None,
    out: Annotated[Path, opt("Problem file to write, .jsonl or .parquet.")] = Path("problems.parquet"),
    count: Annotated[int | None, opt("Problems of each source that states no count.")] = None,
    range: Annotated[
        list[str] | None,
        opt("[NAME=]A:B: only problems A to B - 1 of a source, in its own order, counted from 0.", "--range"),
    ] = None,
    size: Annotated[int | None, opt("Problems altogether, where counts are shares.")] = None,
    seed: Annotated[int, opt("Same seed, same problems.")] = 0,
    local: Annotated[
        list[str] | None, opt("[NAME=]PATH: local parquet or jsonl files of a data set, instead of the hub.", "--from")
    ] = None,
    config: Annotated[list[str] | None, opt("[TASK.]SETTING=VALUE of a reasoning-gym task; may be repeated.")] = None,
    exclude: Annotated[list[Path] | None, opt("Problem file whose prompts are held out; may be repeated.")] = None,
    corrupt: Annotated[
        list[str] | None, opt("wrong_truth=SHARE or coin_flip=SHARE, of every source, or KIND@SOURCE=SHARE.")
    ] = None,
    instruction: Annotated[
        str | None, opt("What follows every question, instead of the usual text; '' for nothing.")
    ] = None,
    solutions: Annotated[
        bool, opt("Keep reference solutions (of gsm8k, math, metamath), for targets without rollouts.", "--solutions")
    ] = False,
    prompt: own.Prompt = None,
    truth: own.Truth = None,
    truth_after: own.TruthAfter = None,
    id: own.Id = None,
    source: own.Source = None,
    template: own.Template = None,
    form: Annotated[str, opt("verl or flat: the fields of the records.")] = "verl",
    overwrite: Overwrite = False,
    known: Annotated[bool, opt("List the data sets known by name, and end.", "--list")] = False,
    json: Json = False,
) -> None:
    """Prepare a pool or a benchmark: problems of one or several sources, without duplicates."""
    if known:
        check_alone(context, "--list", "known", "json")
        _list(json)
        return
    from gradstore.outputs import check_output
    from gradstore.trainer.data.files import check_out, write_problems
    from gradstore.trainer.data.pool import Options, build

    check_out(out, form, overwrite)
    check_output(out, [*(sources or []), *(exclude or [])])
    parts = _with_ranges(own.parts(sources or [], count, size), range or [])
    if size is not None and not any(re.search(r":\d*\.\d*$", text) for text in sources or []):
        raise RequestError(
            f"--size {size}: is for counts that are shares, as in gsm8k:0.9; give a count, --count {size}"
        )
    options = Options(
        seed=seed,
        local=_local(local or [], parts),
        config=_config(config or [], parts),
        exclude=exclude or [],
        corruptions=[_corruption(text) for text in corrupt or []],
        solutions=solutions,
        instruction=instruction,
        columns=own.columns(prompt, truth, truth_after, id, source, template),
    )
    pool = build(parts, options)
    report = {"path": str(out), "form": form, **pool.describe()}
    asked = {
        "sources": sources,
        "count": count,
        "size": size,
        **({"range": range} if range else {}),
        "seed": seed,
        "from": local,
        "config": config,
        "exclude": [str(path) for path in exclude or []],
        "corrupt": corrupt,
        "instruction": instruction,
        **({"solutions": True} if solutions else {}),
        **({"columns": asdict(options.columns)} if options.columns else {}),
    }
    write_problems(out, pool.records, {"asked": asked, **report}, form, overwrite)
    if json:
        print_json(report)
        return
    for note in pool.notes:
        say(note)
    for part in pool.parts:
        left = {"duplicates": part.duplicates, "held out": part.excluded, "left out": part.not_kept, **part.unusable}
        why = ", ".join(f"{n} {reason}" for reason, n in left.items() if n)
        say(f"{part.name}: {counted(part.taken, 'problem')} of {counted(part.rows, 'row')}{f'; {why}' if why else ''}")
        if part.contradicting:
            warn(
                f"{part.name}: {part.contradicting} of the duplicates have another ground truth than the first of "
                "their question, which is kept"
            )
        if part.shared_ids and id is not None:
            warn(f"{part.name}: {part.shared_ids} values of {id!r} are not unique: a hash of the question follows them")
    if options.columns:
        own.say_first(pool.records)
    say(f"{out}: {counted(len(pool.records), 'problem')}")


def _list(json: bool) -> None:
    from gradstore.trainer.data.catalogue import ALIASES, DATA_SETS, TOGETHER

    if json:
        rows = [
            {"name": d.name, "hub": d.hub, "configs": list(d.configs), "split": d.split, "columns": list(d.columns),
             "reward": d.reward}
            for d in DATA_SETS.values()
        ]  # fmt: skip
        together = {name: list(parts) for name, parts in TOGETHER.items()}
        print_json({"data_sets": rows, "together": together, "aliases": ALIASES})
        return
    rows_shown = [[d.name, d.split, d.reward, d.hub, ", ".join(d.columns)] for d in DATA_SETS.values()]
    rows_shown += [[name, "", "", " and ".join(parts), ""] for name, parts in TOGETHER.items()]
    rows_shown += [[name, "", "", f"another name of {own}", ""] for name, own in ALIASES.items()]
    print_table("Data sets", ["name", "split", "reward", "hub", "columns"], sorted(rows_shown), spare=["split"])


def _with_ranges(parts: "list[Part]", texts: Sequence[str]) -> "list[Part]":
    from dataclasses import replace

    parts = list(parts)
    for text in texts:
        name, _, span = text.rpartition("=")
        places = [place for place, part in enumerate(parts) if name in ("", part.name, part.label)]
        if len(places) != 1:
            raise RequestError(f"--range {text}: expected NAME=A:B with the name of one source that is asked for")
        parts[places[0]] = replace(parts[places[0]], rows=row_range(span, f"--range {text}"))
    return parts


def _local(texts: Sequence[str], parts: "Sequence[Part]") -> dict[str, Path]:
    found = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            if len(parts) != 1:
                raise RequestError(f"--from {text}: several data sets are asked for; say which, as in --from NAME=PATH")
            name, path = parts[0].name, text
        found[name] = Path(path)
    return found


def _config(texts: Sequence[str], parts: "Sequence[Part]") -> dict[str, dict[str, Any]]:
    import json

    tasks = [part.name.partition(":")[2] for part in parts if part.name.startswith("reasoning-gym:")]
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise RequestError(f"--config {text}: expected SETTING=VALUE, as in min_terms=2")
        task, dot, setting = name.rpartition(".")
        if not dot:
            if len(tasks) != 1:
                raise RequestError(
                    f"--config {text}: {len(tasks)} reasoning-gym tasks are asked for; say which, as in TASK.{text}"
                )
            task = tasks[0]
        try:
            found.setdefault(task, {})[setting] = json.loads(value)
        except (ValueError, RecursionError):
            found.setdefault(task, {})[setting] = value
    return found


def _corruption(text: str) -> "Corruption":
    from gradstore.trainer.data.corruption import Corruption

    name, _, share = text.partition("=")
    kind, at, source = name.partition("@")
    try:
        return Corruption(kind, float(share), source if at else None)
    except ValueError:
        raise RequestError(f"--corrupt {text}: expected KIND=SHARE, as in wrong_truth=0.5") from None
