"""`collect --solutions`: rows of reference solutions, for targets without rollouts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradstore.cli.ranks import load_policy
from gradstore.cli.rollout import template_arguments
from gradstore.cli.show import print_json, progress, say
from gradstore.errors import RequestError, check_number

if TYPE_CHECKING:
    from gradstore import Store

MEANINGFUL = frozenset(
    {"store", "collection", "rollouts", "model", "step", "adapter", "template_kwargs", "every_basis", "token_budget"}
    | {"device", "trust_remote_code", "json", "solutions", "verbose", "quiet"}
)
"""Parameters of `collect` that mean something with --solutions."""


def collect_solutions(store: "Store", benchmark: str, path: Path, given: Mapping[str, Any]) -> None:
    """Add the likelihood gradients of a problem file's solutions to the store, as rows of BENCHMARK.solutions.

    given: the parameters of `collect` that stand on the command line.
    """
    from gradstore import read_problems
    from gradstore.engine.gradients.models import load_tokenizer
    from gradstore.engine.rollouts.solutions import solution_groups, solutions_of
    from gradstore.engine.sketches.bases import bases_in_use, basis_of, sketcher_of
    from gradstore.engine.sketches.collector import collect
    from gradstore.engine.sketches.spec import SketchSpec

    other = sorted(given.keys() - MEANINGFUL)
    if other:
        raise RequestError(f"--{other[0].replace('_', '-')} is for rollouts: leave it out with --solutions")
    name, step = solutions_of(benchmark), given.get("step", 0)
    check_number("step", step, least=0)
    records, trusted = read_problems(path), given.get("trust_remote_code", False)
    tokenizer = load_tokenizer(given["model"], trust_remote_code=trusted)
    groups = solution_groups(records, tokenizer, template_kwargs=template_arguments(given.get("template_kwargs")))
    spec = SketchSpec.of(store.fingerprint)
    if "token_budget" in given:
        spec = replace(spec, token_budget=given["token_budget"])
    policy = load_policy(given["model"], given.get("adapter"), given.get("device"), trust_remote_code=trusted)
    sketcher = sketcher_of(store, policy, spec)
    basis_of(store, sketcher.fingerprint)
    for group in groups:
        sketcher.check(group)
    also = bases_in_use(store, besides=name) if given.get("every_basis") else []
    store.add_problems(name, records)
    with progress(f"{name} step {step}", len(groups)) as advance:
        report = collect(
            store, name, groups, sketcher=sketcher, step=step, measure="never", also=also, progress=advance
        )
    if given.get("json"):
        print_json({**report.describe(), "collection": name})
        return
    say(
        f"{report.collected} solutions collected into {name} at step {step}: {report.live} live, {report.no_signal} "
        f"without signal, {report.failed} failed; {report.skipped} were there already; {report.n_tokens} tokens in "
        f"{report.seconds:.1f} s"
    )
    for problem_id, reason in report.failures:
        say(f"problem {problem_id!r} failed: {reason}")
