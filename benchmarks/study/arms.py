"""The study's problems: pools that random picks learn little from, each in its own way, and a benchmark.

All arms have the target family and the four other families of the demo (demo/tasks.py), whose slips need other
corrections: on the demo's model, training on `basic_arithmetic` moves the target family the wrong way, training on
`products` a little the right way. An arm says what share of the pool is what:

- `wrong_truths`: half target family; in every family half of the ground truths are wrong: the slip is paid.
- `coin_flips`: half target family; in every family 80 % of the problems pay by coin flip.
- `imbalance`: all rewards right, 10 % target family.
- `low_utility`: 12.5 % useful; a quarter is trivially easy (asked so that the policy is always right), a quarter has
  no answer that is ever paid, the rest are other families.

A problem's one tag names its kind; only the oracle and the evaluation look.
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
    """What a pool is made of."""

    title: str
    target_share: float
    """Share of the pool in the target family; the other families have equal parts of the rest."""
    kinds: Mapping[str, float]
    """Share of each kind within every family (`of_target`: within the target family); the rest is clean."""
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
    """The benchmark that rounds aim at."""
    test: list[dict[str, Any]]
    """Held out from everything; what accuracy is measured on."""


def problems(arm: str, seed: int, *, pool: int, validation: int, test: int) -> Problems:
    """The problems of an arm, so many each; the same for every method. RequestError for an unknown arm."""
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
    """Of the target family, learnable, with the right reward: what an oracle picks."""
    return record["source"] == tasks.TARGET_FAMILY and record["tags"] == [tasks.CLEAN]


def is_bad(arm: str, record: Mapping[str, Any]) -> bool:
    """What the arm puts into the pool to be avoided."""
    off_topic = ARMS[arm].others_are_bad and record["source"] != tasks.TARGET_FAMILY
    return record["tags"] != [tasks.CLEAN] or off_topic


def _family(name: str, count: int, kinds: Mapping[str, float], seed: int) -> list[dict[str, Any]]:
    """So many problems of a family with their kinds, whose numbers are exact."""
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
