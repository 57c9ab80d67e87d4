"""What a trainer lends the round: its live policy, asked to roll out, to sketch and to probe.

One implementation stands beside each trainer. Everything that crosses this line is a plain value, so that the policy
may live in another process, or be sharded over several. Calls that take a seed give the same answer again for the same
policy and arguments; a resumed run depends on it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.probing.calibration import Calibration
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.bases import SketcherFiles as SketcherFiles
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec


class Policy(Protocol):
    """The policy being trained, as it is now."""

    @property
    def step(self) -> int:
        """Training steps done; 0 for the base model."""
        ...

    def roll_out(self, problems: Sequence[Mapping[str, Any]], n: int, *, seed: int) -> list[Group]:
        """n scored rollouts of each problem, in the problems' order.

        problems: canonical records (docs/format.md, Problems). A group's problem_id is its record's id. A problem's
        rollouts may depend on the others of the call.
        """
        ...

    def fit(self, spec: SketchSpec, groups: Sequence[Group], benchmark: Sequence[Group] = ()) -> SketcherFiles:
        """Make the run's sketcher and use it from now on.

        A fitted basis is fitted to the groups that have a signal, and to the benchmark's, whose mean gradient has a
        dimension of its own; other bases need none. Returns what a store of its
        rows is made from, with what the sketches see of the gradient by the first groups: engine/sketches/bases.py,
        `files_of(sketcher, coverage)`; `gradstore.engine.gradients.coverage.measure`.
        """
        ...

    def use(self, fingerprint: dict, attachments: Mapping[str, bytes]) -> None:
        """Use the sketcher of a store that is there: `gradstore.engine.sketches.bases.sketcher_from`.

        FingerprintError where this policy's rows would not be comparable with the store's.
        """
        ...

    def sketch(self, groups: Sequence[Group]) -> SketchBatch:
        """Sketches of the groups, in their order, by the sketcher of `fit` or `use`."""
        ...

    def aim(self, groups: Sequence[Group]) -> SketchBatch:
        """Sketches of validation groups, as by `sketch`; probes go along their mean gradient until the next call."""
        ...

    def probe(self, groups: Sequence[Group], like: Calibration | None = None) -> ProbeBatch:
        """Each rollout's derivative along the gradient that `aim` was last given at this step, in the groups' order.

        The objective is the sketcher's. like: how the probe was calibrated at an earlier step, where to begin. Called
        several times a round; answers do not depend on the calls before.
        """
        ...
