"""The toy bed: the demo's model, a Qwen2 of 0.53 million parameters, and pools where random picks teach little.

All arms have the target family and the four other families of the demo (demo/tasks.py), whose slips need other
corrections. On the demo's model, training on `basic_arithmetic` makes the target family worse, and training on
`products` makes it slightly better. An arm defines the pool's composition:

- `wrong_truths`: half target family; in every family half of the ground truths are wrong, so the slip is rewarded.
- `coin_flips`: half target family; in every family 80 % of the problems have coin-flip rewards.
- `imbalance`: all rewards right, 10 % target family.
- `low_utility`: 12.5 % useful; a quarter is trivially easy (its prompts make the policy always right), a quarter never
  gives a reward, the rest are other families.

A problem's only tag names its kind; only the oracle and the evaluation use it.
"""

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.study.bed import EASY, NO_ANSWER, UNSOLVABLE, Arm, Bed, Problems, StudySettings, kinds
from gradstore.demo import tasks
from gradstore.demo.course import TOKEN_BUDGET
from gradstore.demo.run import MODEL
from gradstore.engine.gradients.models import load_model, load_tokenizer
from gradstore.trainer.sampling.reward import Reward

ARMS: dict[str, Arm] = {
    "wrong_truths": Arm("half of the ground truths wrong", 0.5, {tasks.WRONG_TRUTH: 0.5}),
    "coin_flips": Arm("80 % of the problems pay by coin flip", 0.5, {tasks.COIN_FLIP: 0.8}),
    "imbalance": Arm("target family 10 % of the pool", 0.1, {}, others_are_bad=True),
    "low_utility": Arm(
        "12.5 % useful, the rest easy, unsolvable or off topic",
        0.625,
        {EASY: 0.4, UNSOLVABLE: 0.4},
        of_target=True,
        others_are_bad=True,
    ),
}


def problems(about: Arm, seed: int, pool: int, validation: int, test: int) -> Problems:
    """Make an arm's problems with the given counts."""
    records: list[dict[str, Any]] = []
    others = [name for name in tasks.FAMILIES if name != tasks.TARGET_FAMILY]
    for name in tasks.FAMILIES:
        mine = about.target_share if name == tasks.TARGET_FAMILY else (1 - about.target_share) / len(others)
        shares = about.kinds if name == tasks.TARGET_FAMILY or not about.of_target else {}
        records += _family(name, round(pool * mine), shares, seed)
    Random(f"study order {seed}").shuffle(records)
    held_out = tasks.benchmark(seed, validation + test)
    return Problems(records, held_out[:validation], held_out[validation:])


def _family(name: str, count: int, shares: Mapping[str, float], seed: int) -> list[dict[str, Any]]:
    """`count` problems of a family, with exact numbers of each kind."""
    each = kinds(count, shares)
    Random(f"study kinds {name} {seed}").shuffle(each)
    drawn = tasks.distinct(name, f"study {seed}", count, kept=False)
    return [
        _record(f"{name}-{i:04d}", entry, kind, seed) for i, (entry, kind) in enumerate(zip(drawn, each, strict=True))
    ]


def _record(problem_id: str, entry: dict[str, Any], kind: str, seed: int) -> dict[str, Any]:
    record = tasks.record(problem_id, entry, kind, seed)
    if kind == EASY:
        record["prompt"] = tasks.prompt(entry["question"], "T")
    if kind == UNSOLVABLE:
        record["ground_truth"] = NO_ANSWER
    return record


HEAD = """# The study: which way to pick trains better

Made by `python -m benchmarks.study report` from `{folder}/results.jsonl` ({runs} runs, {seeds}). `make study` runs what
is missing and writes this page again; `make study SHORT=1` does a miniature of it. Intervals are 95 % t intervals over
seeds.

The embedded trainer (what `gradstore train --backend local` runs) trains the demo's model, a Qwen2 of 0.53 million
parameters that knows how to be right and mostly is not, by GRPO on problems picked in rounds. Accuracy is the mean
probability of the right answer at temperature 1 on held-out problems of the target family: computed, not sampled. All
methods share every setting, the problems and the seeds of a run. Settings were chosen on oracle and random picks; the
size of the pool, the share picked and the budget on single runs of several selectors; nothing was set for one arm.
"""

TOY = Bed(
    name="toy",
    arms=ARMS,
    target=tasks.TARGET_FAMILY,
    make=problems,
    load=lambda: (load_model(MODEL, device="cpu"), load_tokenizer(MODEL)),
    reward=Reward("study", tasks.reward),
    settings=StudySettings(),
    short=StudySettings(
        pool=80, validation=16, test=100, selected=8, rounds=3, steps=2, train_batch=8, budget=8, lr=1e-4
    ),
    methods=(
        *("oracle", "random", "accgreedy", "gradalign", "lcb", "budgeted-lcb", "fdr", "dot", "shrunk", "snr"),
        *("dynamic", "learnalign", "budgeted/2-lcb", "budgeted/4-lcb"),
    ),
    totals=(4096, 8192, 10240, 13312, 53248),
    compared_at=13_312,
    shown=("oracle", "random", "accgreedy", "gradalign", "lcb", "budgeted-lcb"),
    results=Path("docs/study-toy/results.jsonl"),
    page=Path("docs/study-toy.md"),
    head=HEAD,
    seeds="0-4,7-11",
    token_budget=TOKEN_BUDGET,
    batch_tokens=1 << 20,
)
"""Its default seeds are without 5 and 6, on which the settings were chosen. Totals: the rollouts of training alone for
4, 8, 10 and 13 rounds, and of GradAlign's 8 rounds."""
