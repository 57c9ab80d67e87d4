"""Interface between a round and a trainer: the live policy rolls out, sketches and probes.

Each trainer has its own implementation. All arguments and results are plain values, so the policy may run in another
process or be sharded over several. Calls with a seed are deterministic: the same policy and arguments give the same
result. Resuming a run depends on this.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.probing.calibration import Calibration
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.bases import SketcherFiles as SketcherFiles
from gradstore.engine.sketches.rollout_sketches import RolloutSketches
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec


class Policy(Protocol):
    """The policy being trained, with its current weights."""

    @property
    def step(self) -> int:
        """Training steps done; 0 for the base model."""
        ...

    def roll_out(self, problems: Sequence[Mapping[str, Any]], n: int, *, seed: int) -> list[Group]:
        """Sample and score n rollouts per problem; one group per problem, in the problems' order.

        problems: canonical records (docs/format.md, Problems). A group's problem_id is its record's id. A problem's
        rollouts may depend on the other problems of the call.
        """
        ...

    def fit(self, spec: SketchSpec, groups: Sequence[Group], benchmark: Sequence[Group] = ()) -> SketcherFiles:
        """Make the run's sketcher and use it from now on.

        A fitted basis is fitted to the groups with a signal and to the benchmark's groups, whose mean gradient gets a
        dimension of its own. Other bases need no groups. Returns the files from which a store is created, including the
        coverage (share of the gradient that the sketches see) measured on the first groups: `fit_sketcher` in
        engine/sketches/bases.py makes both.
        """
        ...

    def use(self, fingerprint: dict, attachments: Mapping[str, bytes]) -> None:
        """Use the sketcher of an existing store: `gradstore.engine.sketches.bases.sketcher_from`.

        FingerprintError if this policy's rows would not be comparable with the store's.
        """
        ...

    def sketch(self, groups: Sequence[Group]) -> SketchBatch:
        """Sketch the groups with the sketcher of `fit` or `use`; one row per group, in their order."""
        ...

    def sketch_rollouts(self, groups: Sequence[Group], objective: Objective | None = None) -> RolloutSketches:
        """Sketch each rollout of the groups for itself, in their order; needed for `rollout_rule` alone.

        objective: that of the update, which weighs the rollouts; None: the sketcher's.
        """
        ...

    def aim(self, groups: Sequence[Group]) -> SketchBatch:
        """Sketch validation groups, like `sketch`, and set the probe direction to their mean gradient."""
        ...

    def probe(self, groups: Sequence[Group], like: Calibration | None = None) -> ProbeBatch:
        """Derivative of each rollout along the direction of the last `aim` at this step, in the groups' order.

        The objective is the sketcher's. like: calibration of the probe at an earlier step, as the starting point. A
        round calls this several times; results do not depend on earlier calls.
        """
        ...


@runtime_checkable
class ReadsSolutions(Protocol):
    """A policy that benchmarks of solutions can be measured with; a round refuses them for any other."""

    def solutions(self, problems: Sequence[Mapping[str, Any]]) -> list[Group]:
        """The problems' reference solutions, one group each (engine/rollouts/solutions.py), in the problems' order."""
        ...
