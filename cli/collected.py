"""What `collect` says: of the projection that the store has, and of the rows that it made."""

from typing import TYPE_CHECKING

from gradstore.cli.show import say, warn
from gradstore.wording import counted

if TYPE_CHECKING:
    from gradstore import Store
    from gradstore.engine.assessing.refit import Refit
    from gradstore.engine.rollouts import Group, RolloutSource
    from gradstore.engine.sketches.collector import CollectReport
    from gradstore.engine.sketches.sketcher import Sketcher


def warn_of(report: "CollectReport") -> None:
    """Warn of a projection that the policy has left, of problems without a gradient, and of small samples."""
    if report.needs_refit:
        warn(
            f"the store's projection ranks these gradients with a correlation of {report.fidelity:.2f} to the "
            "exact ranking: the policy has moved from what it was fitted to; collect with --refit auto and "
            "--benchmark-rollouts for a new basis"
        )
    if report.no_signal and not report.live:
        warn(
            f"none of these {report.no_signal} problems has a gradient: the rollouts of each are all rewarded alike; "
            "sample more of them, or problems that the policy sometimes solves"
        )
    if report.sizes.warning is not None:
        warn(report.sizes.warning)


def say_collected(report: "CollectReport", step: int) -> None:
    """How many problems are live, without signal, and failed, and why."""
    if len(report.bases) > 1:
        say(f"in bases {', '.join(map(str, report.bases))}")
    say(
        f"{counted(report.collected, 'problem')} collected at step {step}: {report.live} live, "
        f"{report.no_signal} without signal, {report.failed} failed; {report.skipped} were there already; "
        f"{report.n_tokens} tokens in {report.seconds:.1f} s"
    )
    for problem_id, reason in report.failures:
        say(f"problem {problem_id!r} failed: {reason}")


def checked(
    store: "Store",
    sketcher: "Sketcher",
    source: "RolloutSource",
    n_sampled: int,
    wanted: "list[Group]",
    step: int,
    fit: bool,
) -> "tuple[Sketcher, Refit]":
    """The sketcher that is to make the rows, after measuring the one that the store has, said aloud."""
    from gradstore.engine.assessing.refit import refit
    from gradstore.engine.sketches.fitting import sample_groups

    sample = sample_groups(source, n_sampled, sketcher.spec.seed)
    for group in (*sample, *wanted):
        sketcher.check(group)
    sketcher, found = refit(store, sketcher, sample, wanted, step=step, fit=fit)
    was = "" if found.when_fitted is None else f", {found.when_fitted:.3f} when it was fitted"
    if found.fidelity is None:
        say("too few problems with a signal to measure how well the store's projection ranks them")
    elif not found.needed:
        say(f"the store's projection ranks with a correlation of {found.fidelity:.3f} to the exact ranking{was}")
    elif found.basis is not None:
        say(
            f"basis {found.basis} fitted: it ranks with {found.anew:.3f}, the one before with {found.fidelity:.3f}{was}"
        )
    elif found.anew is not None:
        warn(f"the store's projection ranks with {found.fidelity:.3f}{was}, one fitted now no better: kept")
    else:
        warn(f"the store's projection ranks with {found.fidelity:.3f}{was}: --refit auto fits a new basis")
    return sketcher, found
