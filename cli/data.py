"""`data`: problem files from public data sets and reasoning-gym, mixed, cleaned, spoiled on purpose."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstore.cli.app import check_alone, command, opt
from gradstore.cli.query import Json, Overwrite
from gradstore.cli.rollout import row_range
from gradstore.cli.show import print_json, print_table, say
from gradstore.errors import RequestError
from gradstore.wording import first_words

if TYPE_CHECKING:
    from gradstore.trainer.data.columns import Columns
    from gradstore.trainer.data.corruption import Corruption
    from gradstore.trainer.data.pool import Part


@command(
    panels={
        "How much of what": "count range size seed exclude",
        "A file or data set of one's own": "prompt truth truth_after id source template",
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
            "--prompt and --truth FILE or hub:USER/NAME[/CONFIG][@SPLIT][:COUNT]. A COUNT of 0.9 is a share of --size."
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
    prompt: Annotated[str | None, opt("Column of the question, in a file or data set of one's own.")] = None,
    truth: Annotated[str | None, opt("Column of the ground truth.")] = None,
    truth_after: Annotated[str | None, opt("Take what follows this text in --truth, such as '####'.")] = None,
    id: Annotated[str | None, opt("Column of a stable id [default: a hash of the question].", "--id")] = None,
    source: Annotated[str | None, opt("Column of the source [default: the name of the file or data set].")] = None,
    template: Annotated[str | None, opt("The prompt with {COLUMN} for the text of a column.")] = None,
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
    from gradstore.trainer.data.files import check_out, write_problems
    from gradstore.trainer.data.pool import Options, build

    check_out(out, form, overwrite)
    parts = _with_ranges(_parts(sources or [], count, size), range or [])
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
        columns=_columns(prompt, truth, truth_after, id, source, template),
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
        say(f"{part.name}: {part.taken} problems of {part.rows} rows{f'; {why}' if why else ''}")
    if options.columns:
        first = pool.records[0]
        text = first["prompt"] if isinstance(first["prompt"], str) else first["prompt"][-1]["content"]
        say(
            f"the first, {first['id']}: {first_words(text, 200)!r}, ground truth {first_words(first['ground_truth'])!r}"
        )
    say(f"{out}: {len(pool.records)} problems")


def _columns(
    prompt: str | None,
    truth: str | None,
    truth_after: str | None,
    id: str | None,
    source: str | None,
    template: str | None,
) -> "Columns | None":
    from gradstore.trainer.data.columns import Columns

    if prompt is None and truth is None:
        if any((truth_after, id, source, template)):
            raise RequestError(
                "--truth-after, --id, --source and --template go with --prompt COLUMN and --truth COLUMN"
            )
        return None
    if prompt is None or truth is None:
        raise RequestError("a file or data set of one's own needs --prompt COLUMN and --truth COLUMN")
    return Columns(prompt, truth, truth_after, id, source, template)


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


def _parts(sources: Sequence[str], count: int | None, size: int | None) -> "list[Part]":
    from gradstore.trainer.data.loading import SUFFIXES
    from gradstore.trainer.data.pool import Part

    parts = []
    for text in sources:
        name, colon, number = text.rpartition(":")
        if not colon or not number or not (number[0].isdigit() or number[0] in ".-"):
            name, number = text, ""
        wanted = count
        if number:
            try:
                value = float(number) if "." in number else int(number)
            except ValueError:
                raise RequestError(f"{text}: the count is {number!r}, expected a whole number or a share") from None
            if isinstance(value, float):
                if size is None or not 0 < value <= 1:
                    raise RequestError(f"{text}: a share needs --size and lies between 0 and 1")
                value = round(value * size)
            wanted = value
        whole, at, split = name.rpartition("@")
        named_split = bool(at) and not name.endswith(SUFFIXES)
        parts.append(Part(whole, wanted, split) if named_split else Part(name, wanted))
    return parts


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
