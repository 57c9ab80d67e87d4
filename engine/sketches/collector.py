"""Sketch a stream of groups into a store, resumable at any moment.

Windows of groups are cut over the whole stream. So a resumed run forms the same micro-batches, and the same bits, as an
uninterrupted one. A window is appended whole and published whole; problems that already have a row at the step are
skipped.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Literal

from torch import nn

from gradstore import State, Store, Writer
from gradstore.attachments import keep_coverage, read_coverage
from gradstore.engine.gradients.coverage import least_of
from gradstore.engine.gradients.coverage import measure as measured_coverage
from gradstore.engine.gradients.ranks import each_its_share
from gradstore.engine.gradients.sharding import leads, meet
from gradstore.engine.rollouts.group import Group
from gradstore.engine.rollouts.source import RolloutSource
from gradstore.engine.searching.targets import Kind, kind_of
from gradstore.engine.sketches.bases import basis_of, load_projection
from gradstore.engine.sketches.effective_sizes import EffectiveSizes
from gradstore.engine.sketches.exact_ranking import ExactRanking, Rows, needs_refit
from gradstore.engine.sketches.projection import Projection
from gradstore.engine.sketches.sketcher import Sketcher, sketch_together
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.errors import RequestError, check_number
from gradstore.layout import SOLUTIONS

Measure = Literal["auto", "always", "never"]
"""When a run measures the fidelity of its sketches. auto: if the store is new and its projection was not measured when
fitted."""

SketchEach = Callable[[Sequence[Projection], Iterable[Sequence[Group]]], Iterator[list[SketchBatch]]]
"""(projections, windows of groups) -> for each window, in order, its sketches in every projection. It may take windows
ahead of the results."""

_PUBLISH_SECONDS = 5.0
"""Seconds of work that an interruption can lose, besides the current window."""


@dataclass(slots=True)
class CollectReport:
    """Result of one `collect` run."""

    live: int = 0
    no_signal: int = 0
    failed: int = 0
    skipped: int = 0
    """Problems that already had a row at the step."""
    n_tokens: int = 0
    seconds: float = 0.0
    fidelity: float | None = None
    """Rank correlation of sketched with exact cosines on the first problems of this run, for a fitted projection;
    None if not measured."""
    fidelity_when_fitted: float | None = None
    """The same on held-out problems when the projection was fitted, if known."""
    bases: list[int] = field(default_factory=list)
    """Bases of the store that contain the rows."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Id of each failed problem, and the reason."""
    sizes: EffectiveSizes = field(default_factory=EffectiveSizes)
    """Effective sample sizes of the rows' rollouts."""

    @property
    def collected(self) -> int:
        """Number of rows appended."""
        return self.live + self.no_signal + self.failed

    def add(self, batch: SketchBatch, places: Sequence[int]) -> None:
        """Count the appended rows of a batch."""
        states = [batch.states[place] for place in places]
        self.live += states.count(State.LIVE)
        self.no_signal += states.count(State.NO_SIGNAL)
        self.failed += states.count(State.FAILED)
        self.sizes.add(batch)
        self.failures += [(batch.ids[place], batch.reasons[place]) for place in places if batch.reasons[place]]

    @property
    def needs_refit(self) -> bool:
        """Whether the projection should be fitted anew: the policy has moved, and sketches no longer rank as gradients
        do."""
        return needs_refit(self.fidelity, self.fidelity_when_fitted)

    def describe(self) -> dict:
        """The report as a JSON-ready dict."""
        own = {name: value for name, value in asdict(self).items() if name != "sizes"}
        return {"collected": self.collected, "needs_refit": self.needs_refit, **own, "ess": self.sizes.describe()}


def collect(
    store: Store,
    collection: str,
    groups: RolloutSource | Iterable[Group],
    *,
    model: nn.Module | None = None,
    step: int,
    spec: SketchSpec | None = None,
    sketcher: Sketcher | None = None,
    benchmark: Sequence[Group] = (),
    measure: Measure = "auto",
    known: Sequence[SketchBatch] = (),
    accept_coverage: float | None = None,
    also: Sequence[int] = (),
    sketch_each: SketchEach | None = None,
    progress: Callable[[int], None] | None = None,
) -> CollectReport:
    """Sketch every group with the model and append the rows at `step`.

    groups: a rollout source, whose problems are added to the collection; or groups of problems already in it, in the
    same order in every resumed run. A source is checked to its end before the first group is computed; other groups
    are checked window by window. progress: called with the number of problems just done.
    benchmark: groups whose mean gradient is the target for measuring the fidelity of a fitted projection; default:
    other groups. measure: when to measure it, on the first window with enough problems. known: sketches that this
    sketcher already made of the same rollouts (`FirstFit.rows`); they are appended first and published at once, except
    for problems missing in the source. also: further bases of the store to sketch in, from the same pass; a benchmark
    needs them to rank rows of older bases (`bases_in_use`). Known sketches do not include these.
    accept_coverage: share of the gradient that a new store's sketches must see (docs/methods.md, coverage); measured on
    the first window with a signal, and kept. None: 0.95, or 0 if the spec chooses layers.
    sketch_each: makes the sketches instead of the sketcher, for instance on workers (on_workers.py); the sketcher still
    measures coverage and fidelity.
    A model sharded by FSDP2: all ranks call this with the same arguments, and can read the store; each sketches its
    share of every window, rank 0 writes. All get the same report.
    FingerprintError if the store holds rows made in another way. RequestError for too little coverage or bad rollouts;
    everything published so far is kept.
    """
    check_number("step (0: the base model)", step, least=0)
    groups = groups if isinstance(groups, RolloutSource) else _of_kind(groups, kind_of(collection))
    if isinstance(groups, RolloutSource) and kind_of(collection) == "solutions":
        raise RequestError(f"collection {collection!r} is for solutions: collect rollouts under another name")
    if sketcher is None:
        if model is None:
            raise RequestError("collect needs a model or a sketcher")
        sketcher = Sketcher(model, spec)
    basis = check_fingerprint(store, sketcher)
    numbers = [*sorted(set(also) - {basis}), basis]  # the sketcher's own basis last: its row is the newest of the step
    projections = [sketcher.projection if b == basis else load_projection(store, b) for b in numbers]
    done = set.intersection(*(_rows_at(store, collection, step, b) for b in numbers))
    ids: set[str] = set()
    unknown = read_coverage(store.path) is None and not any(store.view(name).live.any() for name in store.collections)
    n_tokens = 16 * sketcher.gradients.budget.tokens()
    unmeasured = sketcher.projection.fidelity is None and not any(store.steps(name) for name in store.collections)
    writes = leads(sketcher.model)
    meet(sketcher.model)  # rank 0 writes when all have read
    if isinstance(groups, RolloutSource):
        ids = set(groups.problem_ids)
        missing = [problem_id for problem_id in groups.problem_ids if problem_id not in done]
        for group in groups.groups(missing):  # finds a fault in the last group before anything is computed or stored
            sketcher.check(group)
        if unknown:  # before anything is stored
            first = (window for window in windows(groups.groups(), n_tokens) if any(g.has_signal for g in window))
            for window in islice(first, 1):
                _cover(store, sketcher, window, accept_coverage)
                unknown = False
        if writes:
            store.add_problems(collection, groups.records())
        if not missing:
            return CollectReport(skipped=len(groups), bases=numbers)
        groups = groups.groups()
    report, started = CollectReport(bases=numbers), time.monotonic()
    report.fidelity_when_fitted = sketcher.projection.fidelity
    published = started
    measures = sketcher.projection.kind == "fitted" and (measure == "always" or (measure == "auto" and unmeasured))
    with store.writer(collection, step=step) if writes else nullcontext() as writer:
        taken: set[str] = set()
        ahead: deque[tuple[list[Group], list[Group]]] = deque()  # windows not yet counted, and their groups to sketch

        def to_sketch() -> Iterator[list[Group]]:
            nonlocal unknown, taken
            for number, window in enumerate(windows(groups, n_tokens)):
                if unknown and any(group.has_signal for group in window):
                    _cover(store, sketcher, window, accept_coverage)
                    unknown = False
                if number == 0 and len(numbers) == 1:
                    taken = _append_known(writer, known, ids - done, report)
                ahead.append((window, [group for group in window if group.problem_id not in done | taken]))
                if ahead[-1][1]:
                    yield ahead[-1][1]

        def count_next() -> list[Group]:
            window, todo = ahead.popleft()
            report.skipped += sum(group.problem_id in done for group in window)
            if progress:
                progress(len(window))
            return todo

        for batches in (sketch_each or _here(sketcher))(projections, to_sketch()):
            while not ahead[0][1]:
                count_next()
            todo = ahead[0][1]
            if measures and report.fidelity is None:
                report.fidelity = _fidelity(sketcher, todo, batches[-1], benchmark)
            for in_basis, batch in zip(numbers, batches, strict=True):
                if writer:
                    writer.append(**batch.rows(), basis=in_basis)
            report.add(batches[-1], range(len(todo)))
            report.n_tokens += batches[-1].n_tokens
            if writer and time.monotonic() - published > _PUBLISH_SECONDS:
                writer.publish()
                published = time.monotonic()
            count_next()
        while ahead:
            count_next()
    report.seconds = time.monotonic() - started
    return report


def _here(sketcher: Sketcher) -> SketchEach:
    """Sketch window after window in this process, or with the other ranks of a sharded model."""
    return lambda projections, wanted: (_sketched(sketcher, projections, window) for window in wanted)


def _of_kind(groups: Iterable[Group], kind: Kind) -> Iterator[Group]:
    """The groups; RequestError for one whose kind is not the collection's, so that no target mixes the two unseen."""
    for group in groups:
        if group.solution != (kind == "solutions"):
            own = "a solution" if group.solution else "rollouts"
            raise RequestError(
                f"problem {group.problem_id!r}: has {own}, but the collection is for {kind}; rows of solutions are in "
                f"collections named BENCHMARK{SOLUTIONS}, and those alone"
            )
        yield group


def check_fingerprint(store: Store, sketcher: Sketcher) -> int:
    """Number of the store's basis for the sketcher's rows; FingerprintError, naming each field with both values, if it
    does not make rows like the store's."""
    return basis_of(store, sketcher.fingerprint)


def _cover(store: Store, sketcher: Sketcher, groups: Sequence[Group], accepted: float | None) -> None:
    """Measure the coverage of a new store's sketches and keep it; RequestError if it is too small."""
    coverage = measured_coverage(sketcher.gradients, groups)
    coverage.require(least_of(sketcher.spec, accepted))
    if leads(sketcher.model):
        keep_coverage(store.path, coverage.to_bytes())


def _sketched(sketcher: Sketcher, projections: Sequence[Projection], groups: Sequence[Group]) -> list[SketchBatch]:
    """`sketch_in`; of a sharded model each rank sketches its share, and all get all of it."""
    return each_its_share(sketcher.model, groups, partial(sketcher.sketch_in, projections))


def windows(groups: Iterable[Group], n_tokens: int, n_problems: int = 256) -> Iterator[list[Group]]:
    """Windows of consecutive groups: about n_tokens padded tokens or n_problems, whichever is reached first."""
    window: list[Group] = []
    held = 0
    for group in groups:
        window.append(group)
        held += group.n_tokens * len(group.responses)
        if held >= n_tokens or len(window) >= n_problems:
            yield window
            window, held = [], 0
    if window:
        yield window


def _append_known(
    writer: Writer | None, known: Sequence[SketchBatch], wanted: set[str], report: CollectReport
) -> set[str]:
    """Append and publish the known rows of the wanted problems; returns their ids."""
    taken: set[str] = set()
    for batch in known:
        places = [place for place, problem_id in enumerate(batch.ids) if problem_id in wanted]
        if places:
            if writer:
                writer.append(**batch.rows(places))
            report.add(batch, places)
            taken |= {batch.ids[place] for place in places}
    if taken and writer:
        writer.publish()
    return taken


def _fidelity(
    sketcher: Sketcher, groups: Sequence[Group], batch: SketchBatch, benchmark: Sequence[Group]
) -> float | None:
    """Fidelity of the batch's sketches on at most 64 of the groups; None for too few groups."""
    ranking = ExactRanking.of(sketcher.model, sketcher.spec, groups, benchmark)
    if ranking is None:
        return None
    rows = Rows([batch])
    against_benchmark = any(group.has_signal for group in benchmark)
    return ranking.fidelity(rows, Rows([sketch_together(sketcher, ranking.others)]) if against_benchmark else rows)


def _rows_at(store: Store, collection: str, step: int, basis: int) -> set[str]:
    """Ids of the problems that have a row in this basis at exactly this step."""
    if collection not in store.collections:
        return set()
    view = store.view(collection, step, basis=basis)
    return set(view.ids[view.steps == step])
