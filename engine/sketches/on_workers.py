"""Sketches made by a pool of Ray workers, each with a replica of the model: for `collect(sketch_each=...)`.

The projections are made or loaded once, in the driver, and travel to each machine once. A worker's model is compared
with the driver's by a digest of its weights, so that a folder of the same name on another machine cannot slip in.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gradstore.engine.cluster.pool import Cost, Pool, Window, named_range
from gradstore.engine.gradients.models import load_model, weights_digest
from gradstore.engine.gradients.optimizer_direction import OptimizerDirection
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.projection import Projection
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """How a worker loads the model and sketches with it; plain values, to be sent."""

    model: str
    spec: SketchSpec
    adapter: str | None = None
    device: str | None = None
    trust_remote_code: bool = False
    direction: Callable[[nn.Module], OptimizerDirection | None] | None = None
    """Makes the optimizer's direction of the rows, if they are not gradients."""

    def __call__(self) -> "_Sketching":
        model = load_model(self.model, self.adapter, self.device, trust_remote_code=self.trust_remote_code)
        return _Sketching(model, self.spec, None if self.direction is None else self.direction(model))


class OnWorkers:
    """Sketches windows on workers; as a context manager it ends them. They start with the first window."""

    def __init__(self, replica: Replica, sketcher: Sketcher, *, workers: int, cpus: int = 1, gpus: int = 0) -> None:
        """sketcher: the driver's, which the workers' rows must be like. The others are `Pool`'s."""
        self._replica, self._sketcher = replica, sketcher
        if sketcher.device.type != "cpu" and sketcher.optimizer is None:
            # on a GPU the default depends on its free memory, and the last bits of a row on the micro-batches
            spec = replace(replica.spec, token_budget=sketcher.gradients.budget.tokens())
            self._replica = replace(replica, spec=spec)
        self._size = {"workers": workers, "cpus": cpus, "gpus": gpus}
        self._pool: Pool | None = None
        self._sent: dict[str, Any] = {}

    def __enter__(self) -> "OnWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()

    @property
    def costs(self) -> list[Cost]:
        """What each worker has done; empty if nothing had to be sketched."""
        return [] if self._pool is None else self._pool.costs

    def __call__(
        self, projections: Sequence[Projection], windows: Iterable[Sequence[Group]]
    ) -> Iterator[list[SketchBatch]]:
        """As `collector.SketchEach`. RequestError if a worker's model has other weights than the driver's."""
        import ray

        remaining = iter(windows)
        first = next(remaining, None)
        if first is None:
            return
        if self._pool is None:
            self._pool = Pool(self._replica, **self._size)
            theirs, ours = self._pool.about(), weights_digest(self._sketcher.model)
            if theirs != ours:
                raise RequestError(
                    f"{self._replica.model}: the workers' model has weights {theirs}, this process's {ours}: give a "
                    "path that is the same model on every machine"
                )
        digests = [projection.digest() for projection in projections]
        for digest, projection in zip(digests, projections, strict=True):
            if digest not in self._sent:
                self._sent[digest] = ray.put(projection)
        sent = [(digest, self._sent[digest]) for digest in digests]

        def named() -> Iterator[Window]:
            yield _window(first, sent)
            for groups in remaining:
                yield _window(groups, sent)

        yield from self._pool.map(named())


class _Sketching:
    """The function of a worker."""

    def __init__(self, model: nn.Module, spec: SketchSpec, optimizer: OptimizerDirection | None) -> None:
        self.about = weights_digest(model)
        self._model, self._spec, self._optimizer = model, spec, optimizer
        self._sketcher: Sketcher | None = None
        self._projections: dict[str, Projection] = {}

    def __call__(self, groups: Sequence[Group], sent: Sequence[tuple[str, Any]]) -> list[SketchBatch]:
        """The groups' sketches in each projection. sent: digest and Ray's reference of each."""
        import ray

        for digest, reference in sent:
            if digest not in self._projections:
                self._projections[digest] = ray.get(reference)
        projections = [self._projections[digest] for digest, _ in sent]
        if self._sketcher is None:
            self._sketcher = Sketcher(self._model, self._spec, projections[-1], self._optimizer)
        return self._sketcher.sketch_in(projections, groups)


def _window(groups: Sequence[Group], sent: Sequence[tuple[str, Any]]) -> Window:
    return Window((list(groups), sent), len(groups), named_range([group.problem_id for group in groups]))
