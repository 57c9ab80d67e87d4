"""Corrupt rewards on purpose, for studies of selection with unreliable rewards: wrong ground truths and coin flips.

- `wrong_truth`: the problem gets the ground truth of another problem of its source (for reasoning-gym the whole entry),
  one that its right answer does not satisfy. `extra["true_ground_truth"]` keeps the right one.
- `coin_flip`: `extra["coin"]` holds a seed, and every built-in reward is 0 or 1 whatever the response.

In each source, the problems with the smallest hash of (seed, id) are corrupted. So a larger share contains a smaller
one, and other problems do not change this order. A tag names each problem's kind, for evaluation only.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from gradstore.errors import RequestError, check_known, check_number
from gradstore.problems import detail
from gradstore.trainer.sampling.rewards import load_reward

CLEAN, WRONG_TRUTH, COIN_FLIP = "clean", "wrong_truth", "coin_flip"
KINDS = (WRONG_TRUTH, COIN_FLIP)
TRIES = 200
"""Maximum number of other ground truths tried for a problem before an error is raised."""


@dataclass(frozen=True, slots=True)
class Corruption:
    """A kind of corruption and the share of problems that get it."""

    kind: str
    """wrong_truth or coin_flip."""
    share: float
    """Share of each source's problems, 0 to 1."""
    source: str | None = None
    """Corrupt only this source; None: all sources."""


def corrupted(
    records: Sequence[Mapping[str, Any]], corruptions: Sequence[Corruption], seed: int
) -> list[dict[str, Any]]:
    """Corrupt the stated shares of each source; returns all records in their order, each tagged with its kind.

    Shares are rounded to whole problems. Raises RequestError for shares that sum to more than 1, an unknown source, and
    a problem for which no wrong ground truth is found.
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
    check_known("corruption", corruption.kind, KINDS)
    check_number(f"share of the corruption {corruption.kind}", corruption.share, least=0, most=1)
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
    """The record with another problem's ground truth, for which its right answer gets no reward."""
    random = Random(f"wrong {seed} {record['id']}")
    for _ in range(TRIES):
        donor = random.choice(others)
        if donor["ground_truth"] == record["ground_truth"]:
            continue
        extra = dict(record["extra"]) | {"true_ground_truth": record["ground_truth"]}
        if "verl" in extra:  # a ground truth that is not text is stored here too
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
    """Whether the record's reward accepts this answer; without a rule-based reward, the texts are compared."""
    reward = detail(record, "reward")
    if reward == "reasoning-gym":
        return load_reward(reward)(record, f"<answer>{answer}</answer>", 0) >= 1.0
    if reward == "math":
        try:
            return load_reward(reward)(record, f"\\boxed{{{answer}}}", 0) > 0.0
        except RequestError:  # math-verify cannot read the ground truth, so no answer is accepted
            return False
    return record["ground_truth"].strip().casefold() == answer.strip().casefold()
