"""`python -m benchmarks.study run` and `report`: run the study, write its page. `run` skips finished runs.

`--bed words --svamp FILE` does both on SmolLM2-135M (words.py); without it, on the demo's model (toy.py).
"""

import logging
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from benchmarks.study.bed import Bed
from benchmarks.study.methods import ROLLOUTS
from benchmarks.study.results import alone, append_result, key, numbers, plan, read_results
from benchmarks.study.running import run_one
from benchmarks.study.toy import TOY
from benchmarks.study.words import words
from gradstore.cli.show import say
from gradstore.errors import GradstoreError, RequestError

INTERVENTIONS = Path("docs/study/interventions.jsonl")
SETS = "dot,cosine,accgreedy"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

BedName = Annotated[Literal["toy", "words"], typer.Option("--bed", help="Model and problems.")]
Svamp = Annotated[Path | None, typer.Option(help="SVAMP.json, for the bed `words`.")]
Models = Annotated[Path, typer.Option(help="Folder of SmolLM2-135M and the cold-started model, made if missing.")]
Short = Annotated[bool, typer.Option("--short", help="A miniature, some minutes long, for tests.")]


def bed_of(name: str, svamp: Path | None, models: Path, short: bool) -> Bed:
    return TOY if name == "toy" else words(svamp, models, say, short=short)


@app.command()
def run(
    out: Annotated[Path | None, typer.Option(help="File of results; finished runs in it are not done again.")] = None,
    arms: Annotated[str | None, typer.Option(help="Arms, by commas; default: all.")] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods, by commas; `rollouts`: the toy's with the rollout as unit.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Of each, numbers and ranges by commas.")] = None,
    bed: BedName = "toy",
    svamp: Svamp = None,
    models: Models = Path(".models"),
    short: Short = False,
) -> None:
    """Do the missing runs; each finished run adds one row."""
    chosen = bed_of(bed, svamp, models, short)
    settings, out = chosen.short if short else chosen.settings, out or chosen.results
    logging.getLogger("gradstore.trainer.round").setLevel(
        logging.ERROR
    )  # no log lines about rounds with too few candidates: the rows have this information
    with alone(out):
        done = {key(row) for row in read_results(out, settings)}
        named = ROLLOUTS if methods == "rollouts" else methods.split(",") if methods else chosen.methods
        wanted = plan(arms.split(",") if arms else chosen.arms, named, numbers(seeds or chosen.seeds))
        missing = [run for run in wanted if run not in done]
        say(f"{len(wanted) - len(missing)} of {len(wanted)} runs are done")
        started = time.monotonic()
        for number, (arm, method, seed) in enumerate(missing, 1):
            row = run_one(chosen, arm, method, seed, settings)
            append_result(out, row)
            left = (time.monotonic() - started) / number * (len(missing) - number)
            say(
                f"{arm} {method} seed {seed}: {row['accuracy'][0]:.3f} -> {row['accuracy'][-1]:.3f}, "
                f"{row['seconds']:.0f} s; {len(missing) - number} left, about {left / 60:.0f} min"
            )


@app.command()
def report(
    results: Annotated[Path | None, typer.Option(help="File of results.")] = None,
    page: Annotated[Path | None, typer.Option(help="Page to write; figures go into its folder.")] = None,
    bed: BedName = "toy",
    svamp: Svamp = None,
    models: Models = Path(".models"),
    short: Short = False,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the page would change.")] = False,
) -> None:
    """Write the page: tables, figures, and findings."""
    from benchmarks.study.report import differing, write_page

    chosen = bed_of(bed, svamp, models, short)
    settings, page = chosen.short if short else chosen.settings, page or chosen.page
    rows = read_results(results or chosen.results, settings)
    if check:
        changed = differing(chosen, rows, page, settings)
        if changed:
            raise RequestError(f"not what the rows say: {', '.join(changed)}; write anew without --check")
        say(f"{page}: as {len(rows)} runs say")
        return
    write_page(chosen, rows, page, settings)
    say(f"{page}: {len(rows)} runs")


@app.command()
def intervene(
    out: Annotated[Path, typer.Option(help="File of measurements; those in it are not done again.")] = INTERVENTIONS,
    sets: Annotated[str, typer.Option(help="Selectors whose first and last problems are trained on.")] = SETS,
    seed: Annotated[int, typer.Option(help="Of the pool and of all draws.")] = 0,
    bed: BedName = "words",
    svamp: Svamp = None,
    models: Models = Path(".models"),
    short: Short = False,
) -> None:
    """Train on groups of problems and measure what the benchmark gains; each measurement adds one row."""
    from benchmarks.study.intervention import SHORT_SIZES, Interventions, Sizes

    chosen = bed_of(bed, svamp, models, short)
    settings, sizes = (chosen.short, SHORT_SIZES) if short else (chosen.settings, Sizes())
    with alone(out):
        Interventions(chosen, settings, sizes, seed, out, read_results(out), say).run(sets.split(","))


@app.command()
def ablations(
    results: Annotated[Path, typer.Argument(help="File of results.")],
    method: Annotated[str, typer.Option(help="The whole method.")] = "budgeted-lcb",
) -> None:
    """Print what is lost without each part of the forecast."""
    from benchmarks.study.ablations import table

    print(table(read_results(results), method))


if __name__ == "__main__":
    try:
        app()
    except GradstoreError as error:
        say(f"study: {error}")
        sys.exit(error.exit_status)
