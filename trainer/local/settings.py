"""Settings of a run of the embedded trainer: sampling, update, rounds, files. Nothing here needs torch.

The run's folder keeps them in run.yaml, which `RunSettings.of` reads (docs/training.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from gradstore.engine.gradients.objectives import Objective, objective
from gradstore.errors import RequestError, check_known, check_number
from gradstore.settings import Aliases, build, merge, parse, read_yaml
from gradstore.trainer.loggers import LOGGERS
from gradstore.trainer.round.settings import RoundSettings
from gradstore.trainer.sampling.judge.settings import JudgeSettings, judge_settings, writable
from gradstore.trainer.sampling.overlong import check_overlong
from gradstore.trainer.sampling.rewards import ISOLATED, JUDGES
from gradstore.trainer.sampling.secrecy import without_credentials

WRITTEN = "run.yaml"
"""File of the run's folder with its settings."""
LEARNING_RATE, ADAPTER_LEARNING_RATE = 1e-6, 2e-5
"""Default learning rates, of all weights and of adapters."""
PPO_CLIP = 0.2
"""PPO's default range of the importance ratio, on both sides of 1."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings for sampling responses."""

    max_new_tokens: int = 1024
    """Longest response."""
    temperature: float = 1.0
    """Sampling temperature, above 0: equal responses to a problem have no gradient."""
    top_p: float = 1.0
    """Nucleus of the sampling distribution; 1: all of it."""
    batch_tokens: int | None = None
    """Tokens (prompts and responses) sampled at once; None: as many as memory allows."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template."""
    overlong_buffer: int = 0
    """DAPO's reward shaping: the last tokens before max_new_tokens in which a response is penalised, more and more; 0:
    no shaping."""
    overlong_penalty: float = 1.0
    """The penalty of a response of max_new_tokens."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} is {value}, expected 1 or more")
        check_number("temperature", self.temperature, above=0)
        check_number("top_p", self.top_p, above=0, most=1)
        check_overlong(self.max_new_tokens, self.overlong_buffer, self.overlong_penalty)


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """Settings of the weight update from a step's rollouts."""

    lr: float | None = None
    """Learning rate; None: 1e-6, and 2e-5 for adapters."""
    warmup: int = 0
    """Optimizer steps over which the learning rate rises linearly to `lr`."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as in AdamW; 0: plain Adam."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the gradient's first and second moment."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    clip_grad: float | None = 1.0
    """Maximum gradient norm; None: no clipping."""
    objective: Objective = field(default_factory=lambda: objective("grpo"))
    """How rewards become token weights: a preset's name, fields, or both (`gspo,clip_high=0.001`)."""
    minibatches: int = 1
    """Number of updates per step; the step's problems are split among them. With more than one, later updates are
    off-policy, against the log-probabilities recorded at sampling: by the objective's own rule, or PPO's clipped
    surrogate if it has no importance ratios."""
    clip_low: float = PPO_CLIP
    """See `clip_high`."""
    clip_high: float = PPO_CLIP
    """PPO clips the ratio to [1 - clip_low, 1 + clip_high]; only used if minibatches > 1, for an objective without
    importance ratios. Others have bounds of their own."""
    token_budget: int | None = None
    """Tokens per micro-batch, padding included; None: as many as memory allows (engine/gradients/budget.py)."""

    def __post_init__(self) -> None:
        if self.lr is not None and not 0 <= self.lr < float("inf"):
            raise RequestError(f"lr is {self.lr}, expected a finite number of 0 or more")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise RequestError(f"clip_grad is {self.clip_grad}, expected a number above 0, or None")
        check_number("weight_decay", self.weight_decay, least=0)
        for name in ("minibatches", "token_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} is {value}, expected 1 or more")
        if self.objective.importance and (self.clip_low, self.clip_high) != (PPO_CLIP, PPO_CLIP):
            raise RequestError(
                "clip_low and clip_high of the update are for objectives without importance ratios: give objective."
                "clip_low and objective.clip_high"
            )

    @property
    def rule(self) -> Objective:
        """The objective of the updates, with importance ratios if there are minibatches."""
        if self.minibatches == 1 or self.objective.importance:
            return self.objective
        return replace(self.objective, importance=True, clip_low=self.clip_low, clip_high=self.clip_high)

    def rate(self, *, adapters: bool) -> float:
        """The learning rate, with the default filled in."""
        return self.lr if self.lr is not None else ADAPTER_LEARNING_RATE if adapters else LEARNING_RATE


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
