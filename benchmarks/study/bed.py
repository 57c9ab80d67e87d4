"""A bed of the study: a model, pools of problems with known defects, a reward, and settings.

Two beds: the demo's model (toy.py, thousands of runs in hours) and SmolLM2-135M (words.py, a run in ten minutes).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradstore.demo import tasks
from gradstore.errors import RequestError
from gradstore.trainer.sampling.reward import Reward

EASY, UNSOLVABLE = "easy", "unsolvable"
NO_ANSWER = "no answer"
"""Ground truth that no response equals."""


@dataclass(frozen=True, slots=True)
class Arm:
    """Composition of a pool."""

    title: str
    target_share: float
    """Share of the target source in the pool; the other sources have equal parts of the rest."""
    kinds: Mapping[str, float]
    """Share of each kind within every source (`of_target`: only within the target); the rest is clean."""
    of_target: bool = False
    others_are_bad: bool = False
    """Whether a problem of another source counts as a bad pick."""


@dataclass(frozen=True, slots=True)
class Problems:
    """Canonical records of one arm at one seed."""

    pool: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    """The benchmark used for selection."""
    test: list[dict[str, Any]]
    """Held-out problems on which accuracy is measured; their ground truths are right."""


@dataclass(frozen=True, slots=True)
class StudySettings:
    """Settings shared by all runs of a study; methods change only their round settings. Defaults: the toy's."""

    pool: int = 320
    """Problems of the pool, all of them candidates in every round."""
    validation: int = 32
    """Problems of the benchmark used for selection."""
    test: int = 400
    """Held-out problems on which accuracy is measured."""
    selected: int = 16
    """Problems picked per round: a twentieth of the pool, as in the published runs of GradAlign."""
    rounds: int = 8
    steps: int = 4
    """GRPO steps per round."""
    train_batch: int = 16
    """Problems per step."""
    rollouts: int = 16
    """Rollouts per problem, in selection, on the benchmark and in training."""
    first_look: int = 4
    """Rollouts per pool problem in the first round of a budgeted refresh."""
    budget: int = 44
    """Problems that a budgeted refresh rolls out again per round."""
    budget_target: int = 8
    """Rollouts per benchmark problem with a budgeted refresh: half as many, to spend more on candidates."""
    lr: float = 3e-5
    objective: str = "grpo"
    """Objective preset for training; gradients for selection use `gradalign`."""
    rank: int = 8
    dim: int = 512
    window: int = 32
    """Problems rolled out and sketched at once; the projection is fitted to the first windows."""
    fit_problems: int = 32

    @property
    def budgeted(self) -> dict[str, int]:
        """Round settings of a budgeted refresh."""
        return {"refresh": self.budget, "first_look": self.first_look, "target_rollouts": self.budget_target}


@dataclass(frozen=True)
class Bed:
    """A model, its problems, and the settings of their study."""

    name: str
    arms: Mapping[str, Arm]
    target: str
    """Source of the benchmark's problems."""
    make: Callable[[Arm, int, int, int, int], Problems]
    """(arm, seed, number of pool, validation and test problems) -> problems, the same for every method."""
    load: Callable[[], tuple[Any, Any]]
    """(model in float32, tokenizer)."""
    reward: Reward
    settings: StudySettings
    short: StudySettings
    """A miniature for tests: it runs every path of the study, but its results mean nothing."""
    methods: tuple[str, ...]
    """Methods of a whole study, in running order."""
    totals: tuple[int, ...]
    """Rollouts, for selection and training together, at which methods are compared."""
    compared_at: int
    """The one of them at which differences between methods are told."""
    shown: tuple[str, ...]
    """Methods shown in the curves."""
    results: Path
    page: Path
    head: str
    """First part of the page, above the table of arms."""
    seeds: str
    max_new_tokens: int = 8
    accept_coverage: float = 0.7
    """Share of the gradient that sketches must see: a check alone, as some first windows show less than others."""
    token_budget: int | None = None
    """Tokens per micro-batch; None: as many as memory allows."""
    batch_tokens: int | None = None
    """Tokens sampled at once; None: as many as memory allows."""

    def problems(self, arm: str, seed: int, settings: StudySettings) -> Problems:
        """An arm's problems, the same for every method. RequestError for an unknown arm."""
        if arm not in self.arms:
            raise RequestError(f"arm {arm!r} is not one of {', '.join(self.arms)}")
        return self.make(self.arms[arm], seed, settings.pool, settings.validation, settings.test)

    def is_useful(self, record: Mapping[str, Any]) -> bool:
        """Whether an oracle would pick the problem: of the target source, learnable, right reward."""
        return record["source"] == self.target and record["tags"] == [tasks.CLEAN]

    def is_bad(self, arm: str, record: Mapping[str, Any]) -> bool:
        """Whether the problem is one that the arm put into the pool to be avoided."""
        off_topic = self.arms[arm].others_are_bad and record["source"] != self.target
        return record["tags"] != [tasks.CLEAN] or off_topic


def kinds(count: int, shares: Mapping[str, float]) -> list[str]:
    """A kind for each of `count` problems, exact numbers of each; the rest is clean."""
    each = [kind for kind, share in shares.items() for _ in range(round(count * share))]
    return each + [tasks.CLEAN] * (count - len(each))
