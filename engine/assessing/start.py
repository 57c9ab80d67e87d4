"""Begin a store: settings, coverage of the gradient, a projection fitted to a sample and measured on the rest of it."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from gradstore import Store, open
from gradstore.engine.assessing.refit import ENOUGH, FirstFit, first_fit, parts
from gradstore.engine.gradients.coverage import Coverage, least_of, measure, seeing_enough
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.optimizer_direction import OptimizerDirection
from gradstore.engine.gradients.sharding import leads, meet
from gradstore.engine.rollouts.group import Group
from gradstore.engine.rollouts.source import RolloutSource
from gradstore.engine.sketches.bases import create_store
from gradstore.engine.sketches.fitting import passed, sample_groups
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.errors import RequestError

log = logging.getLogger(__name__)

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(title, total) -> a progress bar that advances by the number it is called with."""
_COVERAGE_GROUPS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """A new store with the sketcher for its rows."""

    store: Store
    sketcher: Sketcher
    rows: list[SketchBatch]
    """Sketches that the fit made on the way: give them to `collect` as `known`."""
    coverage: Coverage


def default_spec(*, head: bool = False, optimizer: bool = False) -> SketchSpec:
    """The settings of a new store.

    Bases are fitted where the rows are gradients; rows of an optimizer's steps and of head mode have random ones.
    """
    if head:
        return SketchSpec(rank=64, right_rank=128, head_only=True)
    return SketchSpec(basis="dense", rank=64) if optimizer else SketchSpec(basis="fitted")


def start_store(
    path: str | Path,
    model: nn.Module,
    source: RolloutSource,
    spec: SketchSpec | None = None,
    *,
    benchmark: Sequence[Group] = (),
    dtype: str = "int8",
    fit_problems: int = ENOUGH,
    measured: bool = True,
    optimizer: OptimizerDirection | None = None,
    accept_coverage: float | None = None,
    widen: bool = True,
    option: str = "accept_coverage=",
    say: Callable[[str], None] = log.info,
    bar: Bar = lambda title, total: nullcontext(lambda n: None),
) -> Start:
    """Make a store at `path` for sketches of these rollouts by this model.

    spec: default `default_spec()`. benchmark: groups that bases are fitted to too. fit_problems: problems with a signal
    that a projection is fitted to and measured on. measured: hold out a quarter of them and measure how well the
    sketches rank. accept_coverage: least share of the squared gradient that the sketches must see (default 0.95 where
    nobody chose the layers). widen: sketch the input embedding too if too little is seen without it. option: the
    caller's name for `accept_coverage` in the error. say, bar: called with progress messages; makes progress bars.

    Under FSDP2 all ranks call this together with the same arguments; rank 0 makes the store.
    RequestError for groups that the model cannot run, too little coverage, or a fit to an optimizer's steps; nothing
    is made then.
    """
    spec = spec or default_spec(optimizer=optimizer is not None)
    if spec.basis == "fitted" and optimizer is not None:
        raise RequestError(
            "a projection is fitted to gradients, not to an optimizer's steps: use --basis dense or random"
        )
    least, sample = least_of(spec, accept_coverage), sample_groups(source, _COVERAGE_GROUPS, spec.seed)
    if widen:
        asked, (spec, coverage) = spec, seeing_enough(model, spec, sample, least)
        if spec != asked:
            say("the input embedding is sketched too: without it too little of the gradient would be seen")
    else:
        coverage = measure(GradientPass(model, spec), sample)
    coverage.require(least, option)
    say(coverage.sentence())
    if spec.basis == "fitted":
        first = _fitted(model, source, spec, benchmark, fit_problems, measured, bar)
        say(_about(first))
    else:
        first = FirstFit(Sketcher(model, spec, optimizer=optimizer), [], 0)
    if leads(model):
        create_store(Path(path), first.sketcher, dtype, coverage)
    meet(model)
    return Start(open(path, "a" if leads(model) else "r"), first.sketcher, first.rows, coverage)


def _fitted(
    model: nn.Module,
    source: RolloutSource,
    spec: SketchSpec,
    benchmark: Sequence[Group],
    n_sampled: int,
    measured: bool,
    bar: Bar,
) -> FirstFit:
    checker = Sketcher(model, replace(spec, basis="random"))
    sample = sample_groups(source, n_sampled, spec.seed)
    for group in (*sample, *benchmark):
        checker.check(group)
    n_benchmark = sum(group.has_signal for group in benchmark)
    with bar("fitting the projection", passed(len(parts(sample, measured=measured)[1]), n_benchmark)) as advance:
        return first_fit(model, spec, sample, benchmark, measured=measured, progress=advance)


def _about(first: FirstFit) -> str:
    projection = first.sketcher.projection
    ranks = ""
    if projection.fidelity is not None:
        ranks = f", and rank others with a correlation of {projection.fidelity:.3f} to the exact ranking"
    return (
        f"projection fitted to {first.n_fitted} problems: {projection.dim} dimensions hold "
        f"{projection.captured:.0%} of their gradients' energy{ranks}"
    )
