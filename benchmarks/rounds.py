"""Cost of a round's own work (plan, select, store) for growing pools, with a nearly free policy instead of a model.

    python -m benchmarks.rounds [--candidates 20000] [--dim 1024] [--rounds 3] [--budget 0.05]

Rewards of rollouts are random. A sketch is the problem's direction plus noise, and a probe is its dot with the
benchmark's mean plus noise, computed with arrays. So the seconds of `plan`, `select` and `store` are those of a run
with a model. Before the first round the store gets a row of every candidate, of 4 rollouts. Each round measures its
budget with 8 rollouts, picks a twentieth of the candidates, and stores the training rollouts of the picks.

"Own" are a round's seconds without the policy's stages (`rollouts`, `sketch`, `probe`); "processor" is the processor
time of all threads, without the policy's; "memory" is the most anonymous memory in the round, in GB.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import wraps
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import numpy as np
import typer

import gradstore
from gradstore import State
from gradstore.cli.show import print_table, say
from gradstore.engine.gradients.objectives import objective
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.probing.calibration import Calibration
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.bases import SketcherFiles, create_from
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.trainer.round.driver import Rounds
from gradstore.trainer.round.settings import RoundSettings

RESPONSE = np.array([1])
OF_THE_POLICY = ("fit", "probe", "rollouts", "sketch")
STAGES = ("target", "plan", "probe", "rollouts", "sketch", "store", "select")


def counted(method: Any) -> Any:
    """Add a method's processor time to the policy's own."""

    @wraps(method)
    def timed(self: "CheapPolicy", *given: Any, **named: Any) -> Any:
        before, started = self.seconds, time.process_time()
        found = method(self, *given, **named)
        self.seconds = before + time.process_time() - started  # also where one method calls another
        return found

    return timed


class CheapPolicy:
    """A policy with low-rank random gradients plus noise; a problem has the same gradient at every step."""

    def __init__(self, dim: int) -> None:
        self.step, self.dim = 0, dim
        self.seconds = 0.0
        """Processor time of its own work."""
        self._base_RD = np.random.default_rng(0).standard_normal((16, dim), dtype=np.float32)
        self._target_D = np.zeros(dim, np.float32)

    @counted
    def roll_out(self, problems: Sequence[Mapping[str, Any]], n: int, *, seed: int) -> list[Group]:
        rewards_PG = np.random.default_rng([seed, self.step]).integers(0, 2, (len(problems), n)).astype(float)
        return [Group(p["id"], RESPONSE, [RESPONSE] * n, own) for p, own in zip(problems, rewards_PG, strict=True)]

    def fit(self, spec: SketchSpec, groups: Sequence[Group], benchmark: Sequence[Group] = ()) -> SketcherFiles:
        return SketcherFiles(self.dim, {"made": "up"}, {})

    def use(self, fingerprint: dict, attachments: Mapping[str, bytes]) -> None:
        pass

    @counted
    def sketch(self, groups: Sequence[Group]) -> SketchBatch:
        live_P = np.array([group.has_signal for group in groups])
        return SketchBatch(
            [group.problem_id for group in groups],
            np.where(live_P[:, None], self._gradients(groups), 0),
            [State.LIVE if live else State.NO_SIGNAL for live in live_P],
            [""] * len(groups),
            np.array([group.pass_rate for group in groups], np.float32),
            np.array([len(group.responses) for group in groups], np.int32),
            0,
        )

    @counted
    def aim(self, groups: Sequence[Group]) -> SketchBatch:
        self._target_D = self._gradients(groups).mean(axis=0)
        return self.sketch(groups)

    @counted
    def probe(self, groups: Sequence[Group], like: Calibration | None = None) -> ProbeBatch:
        dots_P = self._gradients(groups) @ self._target_D
        random = np.random.default_rng(self.step)
        derivatives = [
            4 * dot * (group.rewards - group.rewards.mean()) + random.standard_normal(len(group.rewards))
            for group, dot in zip(groups, dots_P.tolist(), strict=True)
        ]
        return ProbeBatch.of(groups, derivatives, objective("gradalign"))

    def _gradients(self, groups: Sequence[Group]) -> np.ndarray:
        """Gradients of the problems: shares of common directions, derived from the problem's number, plus noise."""
        numbers_P = np.array([int(group.problem_id[1:]) for group in groups])
        shares_PR = np.cos(numbers_P[:, None] * np.arange(1, 17) * 0.7).astype(np.float32)
        random = np.random.default_rng([self.step, len(groups)])
        return shares_PR @ self._base_RD + random.standard_normal((len(groups), self.dim), dtype=np.float32)


def main(
    candidates: Annotated[int, typer.Option(help="Problems of the pool, all of them candidates.")] = 20_000,
    dim: Annotated[int, typer.Option(help="Dimensions of a sketch.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 3,
    budget: Annotated[float, typer.Option(help="Share of the candidates measured anew in a round.")] = 0.05,
) -> None:
    """Print seconds of each round's stages, and the process's peak memory."""
    picked, measured = candidates // 20, round(budget * candidates)
    settings = RoundSettings(
        selector="lcb",
        refresh=measured,
        selected=picked,
        train_batch=max(1, picked // 10),
        steps=10,
        rounds=rounds,
        rollouts=8,
        target_rollouts=8,
        window=512,
        spec=SketchSpec(basis="dense", dim=dim),
    )
    pool = [{"id": f"p{i:07d}", "prompt": "?"} for i in range(candidates)]
    benchmark = [{"id": f"v{i:07d}", "prompt": "?"} for i in range(43)]
    with tempfile.TemporaryDirectory(prefix="gradstore-rounds-") as folder:
        policy, path = CheapPolicy(dim), Path(folder) / "store"
        first_look(path, policy, pool)
        chooser, rows = Rounds(path, pool, {"benchmark": benchmark}, settings), []
        memory = Memory()
        for number in range(rounds):
            memory.reset()
            wall, processor = time.monotonic(), time.process_time() - policy.seconds
            ids = chooser.next(policy).ids
            wall, processor = time.monotonic() - wall, time.process_time() - policy.seconds - processor
            costs = gradstore.open(path).rounds("pool")[number].about["costs"]
            own = wall - sum(costs.get(name, 0.0) for name in OF_THE_POLICY)
            shown = [*(costs.get(name, 0.0) for name in STAGES), wall - sum(costs.values()), own, wall, processor]
            rows.append([str(number), *(f"{seconds:.2f}" for seconds in shown), f"{memory.most:.2f}"])
            say("  ".join(rows[-1]))
            for _ in range(settings.steps):
                batch = [{"id": name} for name in ids[: settings.train_batch]]
                chooser.observe(policy, policy.roll_out(batch, 8, seed=1))
                policy.step += 1
    title = f"{candidates} candidates x {dim}, {measured} measured in a round, {picked} picked: seconds, GB"
    columns = [*STAGES, "the rest", "own", "wall", "processor", "memory"]
    print_table(title, ["round", *columns], rows, right=columns)


def first_look(path: Path, policy: CheapPolicy, pool: Sequence[Mapping[str, Any]]) -> None:
    """Make the store, with a row of every problem by 4 rollouts."""
    store = create_from(path, policy.fit(SketchSpec(dim=policy.dim), []), "int8")
    store.add_problems("pool", map(dict, pool))
    with store.writer("pool", step=0) as writer:
        for start in range(0, len(pool), 8192):
            batch = policy.sketch(policy.roll_out(pool[start : start + 8192], 4, seed=start))
            writer.append(**batch.rows(range(len(batch.ids))))


class Memory(Thread):
    """Watches the process's anonymous memory, without mapped files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0.0
        """GB; the largest since the last `reset`."""
        self.start()

    def run(self) -> None:
        while True:
            self.most = max(self.most, self._now())
            time.sleep(0.1)

    def reset(self) -> None:
        self.most = self._now()

    @staticmethod
    def _now() -> float:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e6


if __name__ == "__main__":
    typer.run(main)
