"""verl's actor worker with sketches and probes, computed in place on the sharded weights.

Weights are not merged, copied or saved, and gradients are not reduced among the ranks. Each rank runs its own problems,
in step with the others. The driver calls these methods with one list of groups per rank
(`gradstore.engine.gradients.ranks`); the results are plain values.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker

from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.gradients.sharding import reshard, total
from gradstore.engine.probing.aimed import AimedProbe
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.probing.calibration import Calibration
from gradstore.engine.probing.probe import Probe
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.bases import SketcherFiles, fit_sketcher, sketcher_from
from gradstore.engine.sketches.from_training_pass import sketched_and_summed
from gradstore.engine.sketches.rollout_sketches import RolloutSketches, sketch_rollouts
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.errors import GradstoreError, RequestError


class SketchingWorker(ActorRolloutRefWorker):
    """One rank of the actor. Every method must be called on all ranks together."""

    _sketcher: Sketcher | None = None
    _aimed: AimedProbe | None = None
    """Probe along the gradient of the validation groups of the last `aim`, on all ranks."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def fit_sketcher(self, spec: SketchSpec, groups: Sequence[Group], benchmark: Sequence[Group]) -> SketcherFiles:
        """Make the sketcher, the same on every rank; a fitted basis is fitted to the groups and the benchmark.

        All ranks get the same groups. Each runs its own share, and the ranks add up what they found.
        """
        with self._live_policy() as model:
            self._sketcher, files = fit_sketcher(model, spec, groups, benchmark)
            return files

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def use_sketcher(self, fingerprint: dict, attachments: Mapping[str, bytes], token_budget: int | None) -> None:
        """Make a store's sketcher; RequestError if the store's rows would not be comparable with this model's."""
        with self._live_policy() as model:
            spec = replace(SketchSpec.of(fingerprint), token_budget=token_budget)
            self._sketcher = sketcher_from(model, fingerprint, attachments, spec)

    @register(dispatch_mode=Dispatch.DP_COMPUTE)
    def sketch_groups(self, groups: Sequence[Group]) -> SketchBatch:
        """Sketch this rank's groups."""
        with self._live_policy():
            return self._made().sketch(groups)

    @register(dispatch_mode=Dispatch.DP_COMPUTE)
    def sketch_rollouts(self, groups: Sequence[Group], objective: Objective | None) -> RolloutSketches:
        """Sketch the single rollouts of this rank's groups."""
        with self._live_policy():
            return sketch_rollouts(self._made(), groups, objective)

    @register(dispatch_mode=Dispatch.DP_COMPUTE)
    def aim(self, groups: Sequence[Group]) -> SketchBatch:
        """Sketch this rank's validation groups; set the probe direction to the gradient of all ranks' groups."""
        self._aimed = None  # free the old direction before making a new one
        with self._live_policy() as model:
            batch, sums = sketched_and_summed(self._made(), groups)
            self._aimed = AimedProbe(groups, sums, int(total(model, [len(groups)])[0]))
            return batch

    @register(dispatch_mode=Dispatch.DP_COMPUTE)
    def probe_groups(self, groups: Sequence[Group], rank: int | None, like: Calibration | None) -> ProbeBatch:
        """Probe this rank's groups along the direction of the last `aim`.

        The first call calibrates the step size on the validation groups, starting from `like`. rank: use a low-rank
        approximation of the direction with this rank, for weights coarser than float32 (`engine.Probe`).
        """
        spec = self._made().spec
        with self._live_policy() as model:
            if self._aimed is None:
                raise RequestError("the worker has no direction to probe along: the round calls `aim` first")
            make = partial(Probe, model, settings=spec.objective, rank=rank, token_budget=spec.token_budget)
            return self._aimed.calibrated(make, like=like).probe(groups)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def forget_direction(self) -> None:
        """Free the probe direction, which is as large as this rank's shard of the weights."""
        self._aimed = None

    def _made(self) -> Sketcher:
        if self._sketcher is None:
            raise RequestError("the worker has no sketcher yet: the round calls fit or use first")
        return self._sketcher

    @contextmanager
    def _live_policy(self) -> Iterator[nn.Module]:
        """The actor's sharded model, on its device; offloaded again afterwards if verl had offloaded it."""
        if self.actor is None:
            raise RequestError(f"worker of role {self.role!r} has no actor to sketch with")
        engine: Any = self.actor.engine
        try:
            with engine.eval_mode():
                reshard(engine.module)
                yield engine.module
                reshard(engine.module)
        except GradstoreError as error:
            # Errors with their own constructors cannot be unpickled by the driver.
            raise (RequestError if isinstance(error, RequestError) else GradstoreError)(str(error)) from None
