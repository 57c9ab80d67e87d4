"""A whole run of the embedded trainer: its settings, and `train`, from problem files to a trained model.

    rounds = RoundSettings(candidates=640, ratio=1 / 20, train_batch=32, rounds=20)
    settings = RunSettings(model="Qwen/Qwen2.5-0.5B", pool=Path("pool.parquet"), out=Path("run"),
                           benchmarks={"amc": Path("amc22.parquet")}, lora_rank=16, rounds=rounds)
    report = train(settings)

The run's folder has its settings in run.yaml, which `RunSettings.of` reads. docs/training.md explains the folder.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from gradstore.attachments import read_coverage
from gradstore.engine.gradients.logprobs import Reference
from gradstore.engine.gradients.models import load_model, load_tokenizer
from gradstore.errors import RequestError, check_known
from gradstore.outputs import check_output_folder
from gradstore.problems import placed_problems
from gradstore.settings import Aliases, build, differences, merge, parse, read_yaml, write_yaml
from gradstore.trainer.local.grpo import Learner, UpdateSettings
from gradstore.trainer.local.lora import with_adapters
from gradstore.trainer.local.policy import LocalPolicy, Sampling
from gradstore.trainer.local.training import Training
from gradstore.trainer.loggers import LOGGERS, Logger
from gradstore.trainer.round.driver import Rounds
from gradstore.trainer.round.settings import RoundSettings
from gradstore.trainer.sampling.judge import JudgeSettings, judge_settings
from gradstore.trainer.sampling.judge.settings import writable
from gradstore.trainer.sampling.readable import readable
from gradstore.trainer.sampling.reward import Reward
from gradstore.trainer.sampling.rewards import ISOLATED, JUDGES, load_reward
from gradstore.trainer.sampling.secrecy import without_credentials

WRITTEN = "run.yaml"
"""File of the run's folder with its settings."""

_JUDGE_FREE = ("base_url", "key_variable", "concurrency", "timeout", "retries", "max_bytes", "cache")
_FREE = {
    *("out", "device", "save_every", "log", "sampling.batch_tokens", "update.token_budget"),
    *("rounds.window", "rounds.observe", "rounds.accept_coverage"),
    "rounds.draw",  # older files do not have it; the rounds check it against their store
    *(f"judge.{name}" for name in _JUDGE_FREE),
}
"""Settings that may change when a run is resumed; `rounds.rounds` may grow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Settings of a whole run on one machine. RequestError for settings that conflict."""

    ALIASES: ClassVar[Aliases] = {
        "seed": "rounds.seed",
        **{name: f"sampling.{name}" for name in ("max_new_tokens", "temperature", "top_p", "template_kwargs")},
        **{name: f"sampling.{name}" for name in ("overlong_buffer", "overlong_penalty")},
        **{name: f"update.{name}" for name in ("lr", "weight_decay", "clip_grad", "minibatches", "objective")},
    }
    """Short names, those of the options of `gradstore train`."""

    model: str
    """Folder or name of a transformers causal LM."""
    pool: Path
    """File of the problems to train on, JSONL or Parquet."""
    benchmarks: Mapping[str, Path] = field(default_factory=dict)
    """Benchmark name -> file of its problems."""
    out: Path
    """Folder of the run: store, checkpoint, metrics, model, settings."""
    reward: str = "math"
    """math, reasoning-gym, auto, judge, or module:function."""
    judge: JudgeSettings | None = None
    """The judge, for the rewards judge and auto; None: the one that the environment names."""
    train_rollouts: int = 16
    """Rollouts per problem of a training step."""
    sampling: Sampling = field(default_factory=Sampling)
    """How responses are sampled, in rounds and in training steps."""
    update: UpdateSettings = field(default_factory=UpdateSettings)
    """How a step changes the weights."""
    kl_beta: float = 0.0
    """Weight of GRPO's KL term to the model before the first step; sketches then have the update's objective too."""
    lora_rank: int = 0
    """Train adapters of this rank; 0: all weights."""
    save_every: int = 0
    """Steps between checkpoints; 0: after each round."""
    log: tuple[str, ...] | None = None
    """Loggers besides metrics.jsonl: tensorboard, wandb, mlflow, trackio; None: TensorBoard where it is installed."""
    skip_unreadable: bool = False
    """Leave out problems whose ground truth the reward cannot read; False: refuse them."""
    device: str | None = None
    """cpu, cuda, cuda:1 and so on; None: a GPU where there is one."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings."""
    rounds: RoundSettings
    """Settings of the selection rounds; their seed is the seed of the run."""

    def __post_init__(self) -> None:
        for name, least in {"train_rollouts": 1, "kl_beta": 0, "lora_rank": 0, "save_every": 0}.items():
            if not getattr(self, name) >= least:
                raise RequestError(f"{name} is {getattr(self, name)}, expected {least} or more")
        for name in self.log or ():
            check_known("logger", name, LOGGERS)
        if self.update.objective.kl_beta:
            raise RequestError("update.objective.kl_beta: give the run's kl_beta, which makes the reference too")
        if self.judge is not None and self.reward not in (*JUDGES, "auto"):
            reward = without_credentials(self.reward)
            raise RequestError(f"judge: its settings are for reward judge or auto, reward is {reward!r}")

    @classmethod
    def of(
        cls, file: Path | None, options: Mapping[str, Any] | None = None, rounds: Mapping[str, Any] | None = None
    ) -> "RunSettings":
        """Settings from a YAML file and, over it, from options and settings of the rounds by name.

        RequestError for a broken file, and for whatever `gradstore.settings.read` refuses.
        """
        high = parse(cls, options or {}, "gradstore train: ")
        high = merge(cls, high, {"rounds": parse(RoundSettings, rounds or {}, "round settings: ")})
        if file is None:
            return build(cls, high, "gradstore train: ")
        low = parse(cls, read_yaml(file), f"{file}: ")
        if {"selected", "ratio"} & high["rounds"].keys():  # the one given replaces the file's, whichever that is
            low["rounds"] = {**low.get("rounds", {}), "selected": None, "ratio": None}
        if high.get("reward", "judge") not in ("judge", "auto"):
            low.pop("judge", None)
        return build(cls, merge(cls, low, high), f"{file}{' with options over it' if options or rounds else ''}: ")

    def filled(self) -> "RunSettings":
        """The settings with absolute paths, learning rate and judge filled in, so that they hold anywhere."""
        isolated = ISOLATED if self.reward.startswith(ISOLATED) else ""
        kind, _, about = self.reward.removeprefix(isolated).partition(":")
        reward, judge = self.reward, self.judge
        if kind in JUDGES:
            reward, judge = "judge", judge or judge_settings(about)
        elif kind.endswith(".py"):
            reward = f"{isolated}{Path(kind).absolute()}:{about}"
        if judge is not None:
            judge = replace(judge, base_url=writable(judge.base_url))  # without credentials
        return replace(
            self,
            model=str(Path(self.model).absolute()) if Path(self.model).exists() else self.model,
            pool=Path(self.pool).absolute(),
            benchmarks={name: Path(path).absolute() for name, path in self.benchmarks.items()},
            out=Path(self.out).absolute(),
            reward=reward,
            judge=judge,
            update=replace(self.update, lr=self.update.rate(adapters=self.lora_rank > 0)),
        )


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run did; its store is `out`/store and its model `out`/model."""

    out: Path
    """Folder of the run."""
    steps: int
    rounds: int
    first_reward: float
    """Mean reward of the first step."""
    last_reward: float
    """Mean reward of the last step."""
    coverage: dict[str, Any] | None
    """Share of the gradient that the store's sketches contain, and what they leave out (`Coverage.of`)."""


def train(
    settings: RunSettings,
    *,
    resume: bool = False,
    on_step: Callable[[int], None] | None = None,
    on_values: Callable[[int, Mapping[str, float]], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
    loggers: Sequence[Logger] = (),
) -> RunReport:
    """Train with a selection before each round, and write the trained model.

    resume: go on with the run in `settings.out`; with the same settings it ends with the weights and picks of an
    undisturbed run. on_step: called with the number of steps done. on_values: called with
    the round and the metrics of each step. say: called with lines of commentary.
    loggers: receive the metrics, in addition to those that the settings name; they are closed at the end.

    RequestError for invalid settings or problems, for a folder that holds a run if `resume` is False, and for other
    settings than those of a run that was begun in the folder.
    """
    check_output_folder(Path(settings.out))
    written, filled = Path(settings.out) / WRITTEN, settings.filled()
    if written.exists():
        _check_same(written, filled)
    scored_by = load_reward(settings.reward, settings.judge)
    records = _read(settings.pool, scored_by, settings.skip_unreadable, say)
    benchmarks = {
        name: _read(path, scored_by, settings.skip_unreadable, say) for name, path in settings.benchmarks.items()
    }
    rounds, rule, reference = settings.rounds, filled.update.objective, None
    trusted = settings.trust_remote_code
    tokenizer = load_tokenizer(settings.model, trust_remote_code=trusted)
    if settings.kl_beta:
        frozen = load_model(settings.model, device=settings.device, dtype="float32", trust_remote_code=trusted)
        reference = Reference(frozen.requires_grad_(False), temperature=rule.temperature)
        rule = replace(rule, kl_beta=settings.kl_beta, reference=reference.digest)
        rounds = replace(rounds, spec=replace(rounds.spec, objective=rule))
    # Weights in float32: in half precision small updates are lost, and a probe would measure rounding.
    network: Any = load_model(settings.model, device=settings.device, dtype="float32", trust_remote_code=trusted)
    rank = settings.lora_rank
    network = with_adapters(network, rank, rounds.seed) if rank else network.requires_grad_(True)
    policy = LocalPolicy(network, tokenizer, scored_by, settings.sampling, reference=reference)
    for problems in (records, *benchmarks.values()):
        policy.prompts(problems)  # before anything is written
    out = Path(settings.out)

    def keep(values: Mapping[str, float], step: int) -> None:
        training.metrics.add("selection", step, values)

    chooser = Rounds(
        out / "store",
        records,
        benchmarks,
        rounds,
        logger=keep,
    )
    training = Training(
        policy,
        Learner(network, replace(filled.update, objective=rule)),
        chooser,
        records,
        rounds,
        out,
        rollouts=settings.train_rollouts,
        save_every=settings.save_every,
        resume=resume,
        log=settings.log,
        loggers=loggers,
    )
    write_yaml(written, filled)
    if policy.step:
        say(f"{out}: going on after step {policy.step}")
    training.run(on_step, on_values)
    network.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    first, last = _rewards(out / "metrics.jsonl")
    return RunReport(out, policy.step, chooser.done, first, last, read_coverage(out / "store"))


def _check_same(written: Path, settings: RunSettings) -> None:
    """RequestError if a run that was begun has other settings than those that were written, where it matters."""
    for name, (old, new) in differences(RunSettings.of(written), settings).items():
        if name == "rounds.rounds" and new < old:
            raise RequestError(f"{written}: rounds.rounds is {old}, now {new}: a resumed run may have more, not fewer")
        if name not in _FREE | {"rounds.rounds"}:
            raise RequestError(
                f"{written}: {name} is {old!r}, now {new!r}: a run keeps its settings; choose another folder"
            )


def _read(path: Path, reward: Reward, skip: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The problems of a file that the reward can grade; says which are left out."""
    placed = placed_problems(path)
    names = {record["id"]: where for where, record in placed}
    kept, left_out = readable([record for _, record in placed], reward, skip=skip, names=names)
    for line in left_out:
        say(f"left out: {line}")
    return kept


def _rewards(metrics: Path) -> tuple[float, float]:
    """Mean rewards of the first and the last step of a run."""
    rows = [row for row in map(json.loads, metrics.read_text(encoding="utf-8").splitlines()) if row["kind"] == "step"]
    return rows[0]["reward"], rows[-1]["reward"]
