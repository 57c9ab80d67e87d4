"""The policy of a running GRPOTrainer for selection rounds; implements `gradstore.trainer.round.policy.Policy`.

It lives on process 0. Rollouts are TRL's own (transformers, vLLM, tools, a rollout function), paid by its own reward
functions. Each process works on a share of the problems (rank.py); what they return is put back in order here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.gradients.ranks import deal, gather
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.probing.calibration import Calibration
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.bases import SketcherFiles
from gradstore.engine.sketches.rollout_sketches import RolloutSketches
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.trainer.trl.lockstep import Lockstep
from gradstore.trainer.trl.rollouts import groups_of


class TrlPolicy:
    """The policy being trained, on all processes; call its methods inside `Lockstep.lead`."""

    def __init__(self, trainer: Any, ranks: Lockstep) -> None:
        self._trainer, self._ranks = trainer, ranks
        self._aimed = False

    @property
    def step(self) -> int:
        return int(self._trainer.state.global_step)

    def roll_out(self, problems: Sequence[Mapping[str, Any]], n: int, *, seed: int) -> list[Group]:
        """Sample and score n rollouts per problem.

        TRL's processes must sample equally many: if the problems cannot be shared out evenly, some are sampled twice
        and the second time is thrown away.
        """
        if not problems:
            return []
        ids, world = [problem["id"] for problem in problems], self._ranks.world
        even = [*ids, *ids[:1] * (-len(ids) % world)]
        found = self._ranks.call("roll_out", [even[rank::world] for rank in range(world)], n, seed)
        extra = -len(ids) % world
        for rank in range(world - extra, world):
            del found[rank][-n:]
        group_of = {group.problem_id: group for own in found for group in groups_of(own)}
        return [group_of[name] for name in ids]

    def fit(self, spec: SketchSpec, groups: Sequence[Group], benchmark: Sequence[Group] = ()) -> SketcherFiles:
        files: SketcherFiles = self._ranks.call("fit", spec, list(groups), list(benchmark))[0]
        return files

    def use(self, fingerprint: dict, attachments: Mapping[str, bytes]) -> None:
        self._ranks.call("use", fingerprint, dict(attachments))

    def sketch(self, groups: Sequence[Group]) -> SketchBatch:
        return self._shared("sketch", groups)

    def sketch_rollouts(self, groups: Sequence[Group], objective: Objective | None = None) -> RolloutSketches:
        return self._shared("sketch_rollouts", groups, objective)

    def aim(self, groups: Sequence[Group]) -> SketchBatch:
        self._aimed = True
        return self._shared("aim", groups)

    def probe(self, groups: Sequence[Group], like: Calibration | None = None) -> ProbeBatch:
        return self._shared("probe", groups, like)

    def end_round(self) -> None:
        """Free the probe direction, if there is one."""
        if self._aimed:
            self._ranks.call("forget_direction")
            self._aimed = False

    def _shared(self, method: str, groups: Sequence[Group], *options: Any) -> Any:
        """Results of a method for the groups, each computed by one process, in the groups' order."""
        shares = deal(groups, self._ranks.world)
        parts = [[groups[i] for i in share] for share in shares]
        return gather(self._ranks.call(method, parts, *options), shares)
