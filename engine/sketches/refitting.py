"""When a store's projection no longer ranks as the gradients do: fit another, and keep it as a further basis.

The policy moves, and with it where its gradients have their energy. How much that costs is measured, not guessed: the
rank correlation of sketched with exact cosines against the benchmark, on half of a sample of problems. Where it has
fallen, a projection is fitted to the other half and to the benchmark, measured on the same problems, and kept if it is
better. Rows that are there stay in their basis and are ranked by targets in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from engine.rollouts.group import Group
from engine.sketches.bases import add_basis
from engine.sketches.collector import REFIT_LOSS, needs_refit
from engine.sketches.faithfulness import rank_fidelities
from engine.sketches.fitting import fit_projection
from engine.sketches.sketcher import Sketcher
from gradstore import Store
from gradstore.errors import RequestError


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


def measured_projection(sketcher: Sketcher, held_out: Sequence[Group], benchmark: Sequence[Group] = ()) -> Sketcher:
    """The sketcher with its projection's fidelity on problems it was not fitted to, which it is stored with."""
    found = rank_fidelities(sketcher, [sketcher.projection], held_out, len(held_out), benchmark)[0]
    return Sketcher(sketcher.model, sketcher.spec, replace(sketcher.projection, fidelity=found), sketcher.optimizer)


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
    where a projection is fitted, another and the passes of a fit over the rest. RequestError for a store whose
    projection is not fitted.
    """
    if sketcher.projection.kind != "fitted":
        raise RequestError(f"the store's projection is {sketcher.projection.kind}, which nothing is fitted to")
    live = [group for group in sample if group.has_signal]
    to_fit, held_out = live[::2], live[1::2]
    when_fitted = sketcher.projection.fidelity
    (before,) = rank_fidelities(sketcher, [sketcher.projection], held_out, len(held_out), benchmark)
    needed = needs_refit(before, when_fitted)
    if not (needed and fit) or before is None:
        return sketcher, Refit(before, when_fitted, needed)
    projection = fit_projection(sketcher.model, to_fit, sketcher.spec, progress, benchmark)
    (after,) = rank_fidelities(sketcher, [projection], held_out, len(held_out), benchmark)
    if after is None or after < before + REFIT_LOSS:
        return sketcher, Refit(before, when_fitted, needed, after)
    projection = replace(projection, fidelity=after)
    newer = Sketcher(sketcher.model, sketcher.spec, projection, sketcher.optimizer)
    about = {"step": step, "fidelity": after, "fidelity_of_the_one_before": before}
    return newer, Refit(before, when_fitted, needed, after, add_basis(store, newer, about))
