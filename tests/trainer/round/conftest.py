"""A world in which rounds can be tested without a model: problems whose gradients are known vectors that drift.

Dimension letters: P problems, D sketch dimensions, G rollouts.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from gradstore import State
from gradstore.engine.gradients.objectives import Objective, objective
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.probing.calibration import Calibration
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.bases import SketcherFiles
from gradstore.engine.sketches.rollout_sketches import RolloutSketches
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.trainer.round.driver import Rounds
from gradstore.trainer.round.settings import RoundSettings

DIM = 12
FINGERPRINT = {"made": "up"}


class Killed(BaseException):
    """The process ends here."""


class World:
    """Pool and benchmark; every problem's pass rate and gradient at every step follow from the seed."""

    def __init__(
        self,
        n: int = 60,
        n_benchmark: int = 6,
        *,
        seed: int = 0,
        life: float = 40.0,
        noise: float = 1.0,
        steps: int = 80,
    ) -> None:
        random = np.random.default_rng(seed)
        self.seed, self.noise = seed, noise
        self.pool = [
            {"id": f"p{i:03d}", "prompt": f"What is {i}?", "source": f"s{i % 3}", "ground_truth": str(i)}
            for i in range(n)
        ]
        self.benchmark = [{"id": f"v{i}", "prompt": f"How much is {i}?"} for i in range(n_benchmark)]
        ids = [record["id"] for record in (*self.pool, *self.benchmark)]
        self.rate_of = dict(zip(ids, random.uniform(0.2, 0.8, len(ids)).tolist(), strict=True))
        kept = np.exp(-1 / life)
        path = [random.normal(size=(len(ids), DIM))]
        for _ in range(steps):
            path.append(kept * path[-1] + np.sqrt(1 - kept**2) * random.normal(size=(len(ids), DIM)))
        common_D = np.ones(DIM) / np.sqrt(DIM)
        path_SPD = np.stack(path)
        path_SPD[:, n:] = common_D * 3 + 0.3 * path_SPD[:, n:]
        self.gradient_of = {name: path_SPD[:, i] for i, name in enumerate(ids)}

    def alignment(self, step: int) -> dict[str, float]:
        """True cosine of every problem of the pool with the benchmark's mean gradient."""
        target_D = np.mean([self.gradient_of[record["id"]][step] for record in self.benchmark], axis=0)
        found = {}
        for record in self.pool:
            own_D = self.gradient_of[record["id"]][step]
            found[record["id"]] = float(own_D @ target_D / np.linalg.norm(own_D) / np.linalg.norm(target_D))
        return found


class FakePolicy:
    """Rollouts are random numbers, sketches the known gradients with noise that depends on the rollouts alone."""

    def __init__(self, world: World, step: int = 0, *, kill_at: int | None = None, seeded: bool = True) -> None:
        """kill_at: die in this call. seeded: False: rollouts depend on problem, step and number alone."""
        self.world, self._step, self._kill_at, self._seeded = world, step, kill_at, seeded
        self.calls = 0
        self.rolled: list[tuple[int, str, int]] = []
        """(step, problem, n) of everything rolled out."""
        self.fitted: list[str] = []
        self._aimed: tuple[int, np.ndarray] | None = None

    @property
    def step(self) -> int:
        return self._step

    def train(self) -> None:
        self._step += 1

    def roll_out(self, problems: Sequence[Mapping[str, Any]], n: int, *, seed: int) -> list[Group]:
        self._called()
        self.rolled += [(self._step, problem["id"], n) for problem in problems]
        return [self._group(problem["id"], n, seed if self._seeded else 0) for problem in problems]

    def _group(self, name: str, n: int, seed: int) -> Group:
        random = np.random.default_rng([self.world.seed, seed, self._step, *name.encode()])
        rewards = (random.random(n) < self.world.rate_of[name]).astype(float)
        responses = [random.integers(0, 1 << 30, 3) for _ in range(n)]
        return Group(name, np.array([1, 2]), responses, rewards)

    def fit(self, spec: SketchSpec, groups: Sequence[Group], benchmark: Sequence[Group] = ()) -> SketcherFiles:
        self._called()
        self.fitted = [group.problem_id for group in (*groups, *benchmark)]
        return SketcherFiles(DIM, FINGERPRINT, {})

    def use(self, fingerprint: dict, attachments: Mapping[str, bytes]) -> None:
        assert fingerprint == FINGERPRINT

    def sketch(self, groups: Sequence[Group]) -> SketchBatch:
        self._called()
        rows_PD = np.zeros((len(groups), DIM), np.float32)
        for row, group in enumerate(groups):
            if group.has_signal:
                rows_PD[row] = self.gradient(group)
        states = [State.LIVE if group.has_signal else State.NO_SIGNAL for group in groups]
        return SketchBatch(
            [group.problem_id for group in groups],
            rows_PD,
            states,
            [""] * len(groups),
            np.array([group.pass_rate for group in groups], np.float32),
            np.array([len(group.responses) for group in groups], np.int32),
            sum(map(len, (response for group in groups for response in group.responses))),
        )

    def gradient(self, group: Group) -> np.ndarray:
        """Of one group with signal, float64 [D]: each rollout brings its own noise, which more rollouts average out."""
        noise_GD = [np.random.default_rng(response.tolist()).normal(size=DIM) for response in group.responses]
        return self.world.gradient_of[group.problem_id][self._step] + self.world.noise * np.mean(noise_GD, axis=0)

    def sketch_rollouts(self, groups: Sequence[Group], objective: Objective | None = None) -> RolloutSketches:
        """A rollout's part is its advantage times its own noise."""
        self._called()
        rows = []
        for group in groups:
            noise_GD = np.array([np.random.default_rng(r.tolist()).normal(size=DIM) for r in group.responses])
            rows.append(((group.rewards - group.rewards.mean())[:, None] * noise_GD).astype(np.float32))
        return RolloutSketches([group.problem_id for group in groups], rows, 3 * sum(map(len, rows)))

    def aim(self, groups: Sequence[Group]) -> SketchBatch:
        batch = self.sketch(groups)
        target_D = np.mean([self.world.gradient_of[group.problem_id][self._step] for group in groups], axis=0)
        self._aimed = self._step, target_D
        return batch

    def probe(self, groups: Sequence[Group], like: Calibration | None = None) -> ProbeBatch:
        """Off by as much as its steps are long, which are a tenth longer than those they begin with."""
        self._called()
        assert self._aimed is not None
        step, target_D = self._aimed
        assert step == self._step
        eps = 0.01 if like is None else 1.1 * like.central
        calibration = Calibration(eps, eps, 0.1, 0.1, 0.0, 0.0, 0.0, np.ones(2), np.full(2, np.nan), 0.0, 1.0)
        derivatives = []
        for group in groups:
            advantages_G = group.rewards - group.rewards.mean()
            if not group.has_signal:
                derivatives.append(np.full(len(advantages_G), np.nan))
                continue
            dot = float(self.world.gradient_of[group.problem_id][self._step] @ target_D)
            noise_G = np.array([np.random.default_rng(r.tolist()).normal() for r in group.responses])
            own_G = advantages_G * dot / np.mean(advantages_G**2) + 4 * self.world.noise * noise_G
            derivatives.append((1 + eps) * own_G)
        return ProbeBatch.of(groups, derivatives, objective("gradalign"), calibration)

    def _called(self) -> None:
        self.calls += 1
        if self.calls == self._kill_at:
            raise Killed


class Training:
    """A training loop of steps and rounds over a store, which may be killed and go on from its last saved state."""

    def __init__(
        self, path: Path, world: World, settings: RoundSettings, *, observe: bool = False, **policy: Any
    ) -> None:
        self.path, self.world, self.settings, self.observe = path, world, settings, observe
        self.policy = FakePolicy(world, **policy)
        self.saved: dict[str, Any] | None = None
        self.saved_step = 0
        self.picks: list[list[str]] = []
        self.logged: list[dict[str, float]] = []

    def rounds(self) -> Rounds:
        return Rounds(
            self.path,
            self.world.pool,
            {"bench": self.world.benchmark},
            self.settings,
            logger=lambda values, step: self.logged.append(dict(values)),
        )

    def run(self) -> list[list[str]]:
        """All rounds; the state is saved after every round, before its steps."""
        driver = self.rounds()
        if self.saved is not None:
            driver.load_state_dict(self.saved)
            self.picks = self.picks[: driver.done]
        while driver.done < self.settings.rounds:
            picks = driver.next(self.policy).ids
            self.picks = [*self.picks[: driver.done - 1], picks]
            self._save(driver)
            self._steps(driver)
        return self.picks

    def resume(self, **policy: Any) -> list[list[str]]:
        """Go on after a kill, from the last saved state."""
        self.policy = FakePolicy(self.world, self.saved_step, **policy)
        if self.saved is not None:
            driver = self.rounds()
            driver.load_state_dict(self.saved)
            self._steps(driver)
        return self.run()

    def _steps(self, driver: Rounds) -> None:
        """The training steps after the round that the saved state is of."""
        picks = self.picks[driver.done - 1]
        for step in range(self.settings.steps):
            if self.observe:
                groups = [self.policy._group(name, 4, 99) for name in picks[step :: self.settings.steps]]
                driver.observe(self.policy, groups)
            self.policy.train()

    def _save(self, driver: Rounds) -> None:
        self.saved, self.saved_step = json.loads(json.dumps(driver.state_dict())), self.policy.step


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: runs that are killed sync thousands of times and never lose power."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with TemporaryDirectory(dir=memory, prefix="gradstore-test-") as folder:
        yield Path(folder)


@pytest.fixture
def world() -> type[World]:
    return World


@pytest.fixture
def fake_policy() -> type[FakePolicy]:
    return FakePolicy


@pytest.fixture
def training() -> type[Training]:
    return Training


@pytest.fixture
def killed() -> type[Killed]:
    return Killed
