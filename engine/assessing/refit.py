"""The projection a store begins with, and another one when that no longer ranks as the gradients do.

The policy moves, and with it where its gradients have their energy. How much that costs is measured, not guessed: the
rank correlation of sketched with exact cosines against the benchmark, on half of a sample of problems. Where it has
fallen, a projection is fitted to the other half and to the benchmark, measured on the same problems, and kept if it is
better. Rows that are there stay in their basis and are ranked by targets in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain

from torch import nn

from gradstore import Store
from gradstore.engine.gradients.sharding import of_all_ranks
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.bases import add_basis
from gradstore.engine.sketches.exact_ranking import REFIT_LOSS, ExactRanking, Rows, needs_refit
from gradstore.engine.sketches.fitting import fit as fit_to
from gradstore.engine.sketches.fitting import rows_again
from gradstore.engine.sketches.sketcher import Sketcher, sketch_together
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.errors import RequestError

ENOUGH = 88
"""Problems with a signal from which some can be spared for measuring."""
HELD_OUT = 4
"""Of so many problems one is held out."""


@dataclass(frozen=True, slots=True)
class Refit:
    """What was measured, and what was done."""

    fidelity: float | None
    """Of the projection in use; None where too few problems have a signal to tell."""
    when_fitted: float | None
    """Of the same when it was fitted, where that is known."""
    needed: bool
    """Whether it has fallen far enough to fit anew."""
    anew: float | None = None
    """Of a projection fitted now, on the same problems; None where none was."""
    basis: int | None = None
    """Number of the new basis; None where the old one stays."""

    def describe(self) -> dict:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True, slots=True, eq=False)
class FirstFit:
    """What a new store's sketcher was fitted to, and the sketches that were made on the way."""

    sketcher: Sketcher
    rows: list[SketchBatch]
    """Of problems of the sample, those fitted to and those held out: `collect` takes them as they are."""
    n_fitted: int
    """Problems fitted to, the benchmark's among them."""


def first_fit(
    model: nn.Module,
    spec: SketchSpec,
    sample: Sequence[Group],
    benchmark: Sequence[Group] = (),
    *,
    measured: bool = True,
    progress: Callable[[int], None] | None = None,
) -> FirstFit:
    """A sketcher fitted to the sample and the benchmark.

    sample: problems with a signal. measured: leave a quarter of them out, where they are `ENOUGH`, to measure how well
    the projection ranks, which it is stored with. Under FSDP2 all ranks call this with the same groups, and all get
    all rows.
    """
    held_out, fitted_to = parts(sample, measured=measured)
    wanted = [group for group in benchmark if group.has_signal]
    found = fit_to(model, fitted_to, spec, progress, wanted)
    sketcher = Sketcher(model, spec, found.projection)
    rows, of_benchmark = (list(chain(*of_all_ranks(model, own))) for own in (found.rows, found.benchmark))
    n_fitted = len(fitted_to) + len(wanted)
    ranking = ExactRanking.of(model, spec, held_out, wanted, len(held_out))
    if ranking is None:
        return FirstFit(sketcher, rows, n_fitted)
    others = [sketch_together(sketcher, held_out)]
    fidelity = ranking.fidelity(Rows(others), Rows(of_benchmark if wanted else others))
    sketcher = Sketcher(model, spec, replace(found.projection, fidelity=fidelity))
    return FirstFit(sketcher, [*rows, *others], n_fitted)


def rows_of_fit(sketcher: Sketcher, sample: Sequence[Group], *, measured: bool = True) -> list[SketchBatch]:
    """`FirstFit.rows` once more, for a store whose rows were lost between its first fit and their publication.

    Arguments as of that `first_fit`; then the bits are the same. Under FSDP2 as `first_fit`.
    """
    held_out, fitted_to = parts(sample, measured=measured)
    rows = list(chain(*of_all_ranks(sketcher.model, rows_again(sketcher, fitted_to))))
    return [*rows, sketch_together(sketcher, held_out)] if ExactRanking.measures(held_out) else rows


def parts(sample: Sequence[Group], *, measured: bool = True) -> tuple[list[Group], list[Group]]:
    """The problems of a first fit that are held out, and those that it is fitted to."""
    if not measured or len(sample) < ENOUGH:
        return [], list(sample)
    return list(sample[::HELD_OUT]), [group for place, group in enumerate(sample) if place % HELD_OUT]


def refit(
    store: Store,
    sketcher: Sketcher,
    sample: Sequence[Group],
    benchmark: Sequence[Group],
    *,
    step: int,
    fit: bool = True,
    progress: Callable[[int], None] | None = None,
) -> tuple[Sketcher, Refit]:
    """The sketcher for the rows to come: the one given, or one with a projection fitted now and added to the store.

    sample: problems of the pool, a hundred or more with a signal. benchmark: groups whose mean gradient is the target.
    step: of the policy. fit False: measure only. Cost: a plain pass over half of the sample and the benchmark, and,
    where a projection is fitted, the passes of a fit over the rest and the benchmark. RequestError for a store whose
    projection is not fitted.
    """
    if sketcher.projection.kind != "fitted":
        raise RequestError(f"the store's projection is {sketcher.projection.kind}, which nothing is fitted to")
    live = [group for group in sample if group.has_signal]
    to_fit, held_out = live[::2], live[1::2]
    when_fitted = sketcher.projection.fidelity
    ranking = ExactRanking.of(sketcher.model, sketcher.spec, held_out, benchmark, len(held_out))
    before = None if ranking is None else ranking.fidelity_of(sketcher)
    needed = needs_refit(before, when_fitted)
    if not (needed and fit) or ranking is None or before is None:
        return sketcher, Refit(before, when_fitted, needed)
    projection = fit_to(sketcher.model, to_fit, sketcher.spec, progress, benchmark).projection
    newer = Sketcher(sketcher.model, sketcher.spec, projection, sketcher.optimizer)
    after = ranking.fidelity_of(newer)
    if after is None or after < before + REFIT_LOSS:
        return sketcher, Refit(before, when_fitted, needed, after)
    newer = Sketcher(sketcher.model, sketcher.spec, replace(projection, fidelity=after), sketcher.optimizer)
    about = {"step": step, "fidelity": after, "fidelity_of_the_one_before": before}
    return newer, Refit(before, when_fitted, needed, after, add_basis(store, newer, about))
