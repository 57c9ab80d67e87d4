"""The study's problems: a benchmark, and pools where random picks teach little, for a different reason in each arm.

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
from dataclasses import dataclass
from random import Random
from typing import Any

from gradstore.demo import tasks
from gradstore.errors import RequestError

EASY, UNSOLVABLE = "easy", "unsolvable"
NO_ANSWER = "no answer"
"""Ground truth that no response equals."""


@dataclass(frozen=True, slots=True)
class Arm:
    """Composition of a pool."""

    title: str
    target_share: float
    """Share of the target family in the pool; the other families have equal parts of the rest."""
    kinds: Mapping[str, float]
    """Share of each kind within every family (`of_target`: only within the target family); the rest is clean."""
    of_target: bool = False
    others_are_bad: bool = False
    """Whether a problem of another family counts as a bad pick."""


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


@dataclass(frozen=True, slots=True)
class Problems:
    """Canonical records of one arm at one seed."""

    pool: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    """The benchmark used for selection."""
    test: list[dict[str, Any]]
    """Held-out problems on which accuracy is measured."""


def problems(arm: str, seed: int, *, pool: int, validation: int, test: int) -> Problems:
    """Make an arm's problems with the given counts, the same for every method. RequestError for an unknown arm."""
    if arm not in ARMS:
        raise RequestError(f"arm {arm!r} is not one of {', '.join(ARMS)}")
    about = ARMS[arm]
    records: list[dict[str, Any]] = []
    others = [name for name in tasks.FAMILIES if name != tasks.TARGET_FAMILY]
    for name in tasks.FAMILIES:
        mine = about.target_share if name == tasks.TARGET_FAMILY else (1 - about.target_share) / len(others)
        kinds = about.kinds if name == tasks.TARGET_FAMILY or not about.of_target else {}
        records += _family(name, round(pool * mine), kinds, seed)
    Random(f"study order {seed}").shuffle(records)
    held_out = tasks.benchmark(seed, validation + test)
    return Problems(records, held_out[:validation], held_out[validation:])


def is_useful(record: Mapping[str, Any]) -> bool:
    """Whether an oracle would pick the problem: target family, learnable, right reward."""
    return record["source"] == tasks.TARGET_FAMILY and record["tags"] == [tasks.CLEAN]


def is_bad(arm: str, record: Mapping[str, Any]) -> bool:
    """Whether the problem is one that the arm put into the pool to be avoided."""
    off_topic = ARMS[arm].others_are_bad and record["source"] != tasks.TARGET_FAMILY
    return record["tags"] != [tasks.CLEAN] or off_topic


def _family(name: str, count: int, kinds: Mapping[str, float], seed: int) -> list[dict[str, Any]]:
    """`count` problems of a family, with exact numbers of each kind."""
    each = [kind for kind, share in kinds.items() for _ in range(round(count * share))]
    each += [tasks.CLEAN] * (count - len(each))
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
