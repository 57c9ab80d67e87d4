"""A whole run of the embedded trainer: its settings, and `train`, from problem files to a trained model.

    rounds = RoundSettings(candidates=640, ratio=1 / 20, train_batch=32, rounds=20)
    settings = RunSettings(model="Qwen/Qwen2.5-0.5B", pool=Path("pool.parquet"), out=Path("run"),
                           benchmarks={"amc": Path("amc22.parquet")}, lora_rank=16, rounds=rounds)
    report = train(settings)

The run's folder has its settings in run.yaml, which `RunSettings.of` reads. docs/training.md explains the folder.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradstore.attachments import read_coverage
from gradstore.engine.gradients.logprobs import Reference
from gradstore.engine.gradients.models import load_model, load_tokenizer
from gradstore.errors import RequestError
from gradstore.outputs import check_output_folder
from gradstore.problems import placed_problems
from gradstore.settings import differences, write_yaml
from gradstore.trainer.local.grpo import Learner
from gradstore.trainer.local.lora import with_adapters
from gradstore.trainer.local.policy import LocalPolicy
from gradstore.trainer.local.settings import WRITTEN, RunSettings
from gradstore.trainer.local.training import Training
from gradstore.trainer.loggers import Logger
from gradstore.trainer.round.driver import Rounds
from gradstore.trainer.sampling.readable import readable
from gradstore.trainer.sampling.reward import Reward
from gradstore.trainer.sampling.rewards import load_reward

_JUDGE_FREE = ("base_url", "key_variable", "concurrency", "timeout", "retries", "max_bytes", "cache")
_FREE = {
    *("out", "device", "save_every", "log", "sampling.batch_tokens", "update.token_budget"),
    *("rounds.window", "rounds.observe", "rounds.accept_coverage"),
    "rounds.draw",  # older files do not have it; the rounds check it against their store
    *(f"judge.{name}" for name in _JUDGE_FREE),
}
"""Settings that may change when a run is resumed; `rounds.rounds` may grow."""


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
