"""Rewards spoiled on purpose, for studies of selection under unreliable rewards: wrong ground truths and coin flips.

- `wrong_truth`: the problem gets the ground truth of another problem of its source (for reasoning-gym the whole entry),
  one that the right answer is not paid for. What was right is kept under `extra["true_ground_truth"]`.
- `coin_flip`: `extra["coin"]` holds a seed, and every built-in reward pays 0 or 1 whatever the response.

Which problems: of every source the stated share, those with the smallest hash of (seed, id). So a larger share contains
a smaller one, and other problems of the pool change nothing. A tag says what each problem is, for evaluation alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from gradstore.errors import RequestError
from gradstore.problems import detail
from gradstore.trainer.sampling.rewards import load_reward

CLEAN, WRONG_TRUTH, COIN_FLIP = "clean", "wrong_truth", "coin_flip"
KINDS = (WRONG_TRUTH, COIN_FLIP)
TRIES = 200
"""How many other problems' ground truths are tried before a problem is said to have no wrong one."""


@dataclass(frozen=True, slots=True)
class Corruption:
    """A share of the problems to spoil."""

    kind: str
    """wrong_truth or coin_flip."""
    share: float
    """Of every source's problems, 0 to 1."""
    source: str | None = None
    """Only this source's problems; None: all."""


def corrupted(
    records: Sequence[Mapping[str, Any]], corruptions: Sequence[Corruption], seed: int
) -> list[dict[str, Any]]:
    """The records in their order, of every source the stated shares spoiled, each tagged with what it is.

    Shares hold to the nearest problem. Raises RequestError for shares that are more than the whole, a source that is
    not there, and a problem for which no other problem's ground truth is wrong.
    """
    for corruption in corruptions:
        _check(corruption, records)
    spoiled = {record["id"]: dict(record) | {"tags": [*record["tags"], CLEAN]} for record in records}
    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_source.setdefault(record["source"], []).append(record)
    for source, theirs in by_source.items():
        left = sorted(theirs, key=lambda record: _rank(seed, record["id"]))
        for corruption in corruptions:
            if corruption.source not in (None, source):
                continue
            n = round(corruption.share * len(theirs))
            if n > len(left):
                raise RequestError(f"corruptions of {source!r} are more than all of its problems: lower their shares")
            for record in left[:n]:
                changed = _coin(record, seed) if corruption.kind == COIN_FLIP else _wrong(record, theirs, seed)
                spoiled[record["id"]] = changed | {"tags": [*record["tags"], corruption.kind]}
            left = left[n:]
    return [spoiled[record["id"]] for record in records]


def _check(corruption: Corruption, records: Sequence[Mapping[str, Any]]) -> None:
    if corruption.kind not in KINDS:
        raise RequestError(f"unknown corruption {corruption.kind!r}, expected {' or '.join(KINDS)}")
    if not 0 <= corruption.share <= 1:
        raise RequestError(f"corruption {corruption.kind} of {corruption.share}, expected a share from 0 to 1")
    sources = sorted({record["source"] for record in records})
    if corruption.source is not None and corruption.source not in sources:
        raise RequestError(
            f"corruption of {corruption.source!r}, but the problems' sources are {', '.join(map(repr, sources))}"
        )


def _rank(seed: int, problem_id: str) -> bytes:
    return hashlib.blake2b(f"{seed} {problem_id}".encode(), digest_size=16).digest()


def _coin(record: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return dict(record) | {"extra": dict(record["extra"]) | {"coin": seed}}


def _wrong(record: Mapping[str, Any], others: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """The record with another problem's ground truth, one that its right answer is not paid for."""
    random = Random(f"wrong {seed} {record['id']}")
    for _ in range(TRIES):
        donor = random.choice(others)
        if donor["ground_truth"] == record["ground_truth"]:
            continue
        extra = dict(record["extra"]) | {"true_ground_truth": record["ground_truth"]}
        if "verl" in extra:  # a ground truth that is not text stands there too
            rewarded = {k: v for k, v in (extra["verl"].get("reward_model") or {}).items() if k != "ground_truth"}
            extra["verl"] = extra["verl"] | {"reward_model": rewarded}
        entry = detail(donor, "reasoning_gym")
        if entry is not None:
            extra |= {"reasoning_gym": entry, "true_reasoning_gym": detail(record, "reasoning_gym")}
        changed = dict(record) | {"ground_truth": donor["ground_truth"], "extra": extra}
        if not _pays(changed, record["ground_truth"]):
            return changed
    raise RequestError(
        f"problem {record['id']!r}: no other problem of {record['source']!r} has a ground truth that is wrong for it; "
        "corrupt by coin_flip, or take more problems of this source"
    )


def _pays(record: Mapping[str, Any], answer: str) -> bool:
    """Whether the record's own reward pays for this answer; where it has none of the rules, the texts are compared."""
    reward = detail(record, "reward")
    if reward == "reasoning-gym":
        return load_reward(reward)(record, f"<answer>{answer}</answer>", 0) >= 1.0
    if reward == "math":
        try:
            return load_reward(reward)(record, f"\\boxed{{{answer}}}", 0) > 0.0
        except RequestError:  # a ground truth that math-verify cannot read pays for nothing
            return False
    return record["ground_truth"].strip().casefold() == answer.strip().casefold()
