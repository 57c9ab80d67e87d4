"""`python -m benchmarks.study run` and `report`: run the study, write its page. `run` skips finished runs."""

import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.study.arms import ARMS
from benchmarks.study.methods import DEFAULT_METHODS, ROLLOUTS
from benchmarks.study.results import alone, append_result, key, numbers, plan, read_results
from benchmarks.study.running import SHORT, StudySettings, run_one
from gradstore.cli.show import say
from gradstore.errors import GradstoreError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

RESULTS = Path("docs/study/results.jsonl")
PAGE = Path("docs/study.md")
SEEDS = "0-4,7-11"
"""Default seeds, without 5 and 6, on which the settings were chosen."""


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="File of results; finished runs in it are not done again.")] = RESULTS,
    arms: Annotated[str, typer.Option(help="Arms, by commas.")] = ",".join(ARMS),
    methods: Annotated[
        str, typer.Option(help="Methods, by commas; `rollouts`: those with the rollout as unit.")
    ] = ",".join(DEFAULT_METHODS),
    seeds: Annotated[str, typer.Option(help="Of each, numbers and ranges by commas.")] = SEEDS,
    short: Annotated[bool, typer.Option("--short", help="A miniature, some minutes long, for tests.")] = False,
) -> None:
    """Do the missing runs; each finished run adds one row."""
    settings = SHORT if short else StudySettings()
    logging.getLogger("gradstore.trainer.round").setLevel(
        logging.ERROR
    )  # no log lines about rounds with too few candidates: the rows have this information
    with alone(out):
        done = {key(row) for row in read_results(out, settings)}
        named = (",".join(ROLLOUTS) if methods == "rollouts" else methods).split(",")
        wanted = plan(arms.split(","), named, numbers(seeds))
        missing = [run for run in wanted if run not in done]
        say(f"{len(wanted) - len(missing)} of {len(wanted)} runs are done")
        started = time.monotonic()
        for number, (arm, method, seed) in enumerate(missing, 1):
            row = run_one(arm, method, seed, settings)
            append_result(out, row)
            left = (time.monotonic() - started) / number * (len(missing) - number)
            say(
                f"{arm} {method} seed {seed}: {row['accuracy'][0]:.3f} -> {row['accuracy'][-1]:.3f}, "
                f"{row['seconds']:.0f} s; {len(missing) - number} left, about {left / 60:.0f} min"
            )


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="File of results.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="Page to write; figures go into its `study` folder.")] = PAGE,
    short: Annotated[bool, typer.Option("--short", help="The results are a miniature's.")] = False,
) -> None:
    """Write the page: tables, figures, and findings."""
    from benchmarks.study.report import write_page

    rows = read_results(results, SHORT if short else StudySettings())
    write_page(rows, page, replace(SHORT) if short else StudySettings())
    say(f"{page}: {len(rows)} runs")


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
