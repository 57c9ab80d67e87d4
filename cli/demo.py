"""`demo`: the whole road, on a small model that comes along or on a real one."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from gradstore.cli.app import command, opt
from gradstore.cli.query import Json
from gradstore.cli.show import duration, print_json, print_line, print_table, progress, say, started_as
from gradstore.cli.telling import Told
from gradstore.errors import RequestError
from gradstore.wording import size

if TYPE_CHECKING:
    from gradstore.demo.course import CourseSettings
    from gradstore.demo.run import DemoSettings
    from gradstore.engine.planning.plan import Stage


@command(example="gradstore demo")
def demo(
    out: Annotated[
        Path | None, opt("Folder for the store and the selections [default: gradstore-demo, or gradstore-demo-real].")
    ] = None,
    seeds: Annotated[int | None, opt("Seeds to repeat the comparison over [default: 3, with --real 1].", min=1)] = None,
    real: Annotated[bool, opt("On SmolLM2-135M-Instruct, downloaded once, after a cold start.", "--real")] = False,
    quick: Annotated[bool, opt("--real in a quarter of the time: too short to compare selectors.", "--quick")] = False,
    model: Annotated[
        Path | None, opt("--real: the model's folder, made where it is not there [default: base in --out].")
    ] = None,
    json: Json = False,
) -> None:
    """The main job on a small model and 2,000 problems: roll out, collect, query, select, report.

    Started again after an interruption, it goes on where it was.
    """
    from gradstore.cli.query import query
    from gradstore.demo.course import ROLLOUTS, SHOWN
    from gradstore.demo.run import BETTER, DemoSettings, TimeLeft, best_of, conclusion, run_demo, summary
    from gradstore.outputs import check_output_folder

    settings, course = DemoSettings(), SHOWN
    facts: dict[str, Any] = {}
    folder = out or Path("gradstore-demo-real" if real else "gradstore-demo")
    check_output_folder(folder)
    n_seeds = seeds or (1 if real else 3)
    if real:
        settings, course, facts["foreseen"] = _prepare(folder, model, quick, n_seeds)
    elif quick or model is not None:
        raise RequestError("--quick and --model are for --real")
    left = TimeLeft(n_seeds)
    results = []
    for seed in range(n_seeds):
        called = "one seed" if n_seeds == 1 else f"seed {seed + 1} of {n_seeds}"
        results.append(run_demo(folder / f"seed-{seed}", seed, settings, say, bar=_bar, called=called, left=left))
    facts |= summary(results)
    page, told = _shown(folder, course)
    if json:
        print_json({**facts, "report": None if page is None else str(page)})
        if page is None:
            say(told)
        return
    store = folder / "seed-0" / "store"
    print_line("")
    query(store, against=["benchmark"], top=5)
    columns = ["target family, high", "broken rewards, low", "wrong truth, low", "coin flip, low"]
    best = best_of(facts["shares"])
    print_table(
        f"\nWhat each selector chose: {settings.n_selected} of {settings.n_pool} problems, "
        + ("percent" if n_seeds == 1 else f"percent, mean ± standard deviation over {n_seeds} seeds"),
        ["selector", *columns],
        [
            [
                name,
                *(
                    f"{100 * shares[kind][0]:.1f}"
                    + f" ± {100 * shares[kind][1]:.1f}" * (n_seeds > 1)
                    + (" *" if best[kind] == name else "  ")
                    for kind in BETTER
                ),
            ]
            for name, shares in facts["shares"].items()
        ],
        right=columns,
    )
    print_line("high, low: the direction that is good; *: the best of the selectors")
    print_line(conclusion(facts["shares"]))
    print_table(
        "\nSeconds of each stage" + ("" if n_seeds == 1 else ", mean over seeds"),
        ["stage", "seconds"],
        [[stage, f"{seconds:.2f}"] for stage, seconds in facts["seconds"].items()],
        right=["seconds"],
    )
    states = ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in facts["states"].items())
    print_line(
        f"\n{facts['bytes_per_problem']:.0f} bytes per problem ({facts['dim']} dimensions as int8); pool: {states}"
    )
    print_line(f"ask again: {started_as()} query {store} --against benchmark --top 20 --layers 3")
    rollouts = folder / "run" / ROLLOUTS
    print_line(f"look around: {started_as()} serve {folder / 'run' / 'store'} --rollouts {rollouts}")
    print_line(told)


def _bar(title: str, total: int | None, of: str = "problem") -> AbstractContextManager[Callable[..., None]]:
    """A bar in a terminal, else a line every 20 s."""
    from gradstore.demo.run import counted

    return progress(title, total) if sys.stderr.isatty() else nullcontext(counted(title, total, say, of))


def _prepare(
    folder: Path, model: Path | None, quick: bool, seeds: int
) -> "tuple[DemoSettings, CourseSettings, list[dict]]":
    """Says what the real demo will take, makes the model, and returns the settings and what was said."""
    from gradstore.demo.real import FULL, QUICK, foreseen, prepared

    settings = QUICK if quick else FULL
    base = model or folder / "base"
    stages, download = foreseen(folder, base, settings, seeds)
    _say_beforehand(stages, download)
    folder.mkdir(parents=True, exist_ok=True)
    return *settings.of(prepared(folder, base, settings, say)), [asdict(stage) for stage in stages]


def _say_beforehand(stages: "list[Stage]", download: int) -> None:
    most = max(stage.memory_bytes for stage in stages)
    say(
        f"on this machine, as busy as it is now, about {duration(sum(stage.seconds for stage in stages))}, up to "
        f"{size(most)} of memory, {size(sum(stage.disk_bytes for stage in stages))} of disk"
        + (f", and a download of {size(download)}" if download else "")
    )
    for stage in stages:
        say(f"  {stage.name}: {duration(stage.seconds)}")


def _shown(out: Path, settings: "CourseSettings") -> tuple[Path | None, str]:
    """Train the demo's model for a few rounds and write the report of it, or say what that needs and how to make it."""
    from gradstore.analysis.report import check_installed, write_report
    from gradstore.demo.course import ROLLOUTS, run_course
    from gradstore.engine.gradients.models import load_tokenizer

    folder, page = out / "run", out / "report.html"
    with _bar("training run", settings.n_rounds * settings.n_updates, "step") as advance:
        told = Told(settings.n_rounds, settings.n_updates, advance)
        store = run_course(folder, settings, told.done, told.values)
    try:
        check_installed()
    except RequestError as error:
        rollouts = folder / ROLLOUTS
        return None, f"{error}; then: {started_as()} report {folder / 'store'} --rollouts {rollouts} --out {page}"
    write_report(store, page, rollouts=[folder / ROLLOUTS], tokenizer=load_tokenizer(settings.subject.model))
    return page, f"the report of a short training run: {page}"
