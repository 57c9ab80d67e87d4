"""The demo's problems: five families from reasoning-gym, a pool with known defects and a held-out benchmark.

A family is one reasoning-gym dataset, small enough for a model of under a million parameters, plus a *slip*: the
systematic mistake that the demo's policy mostly makes. The pool mixes the families; one of them is the target. Every
family has known defects: some problems have a wrong ground truth (the slip, so the slip is rewarded), others have a
coin-flip reward that ignores the response. The rest is clean, with rewards from reasoning-gym's own verifier. A
problem's tag names its kind, for evaluation only; selectors must not use it. The benchmark holds clean problems of the
target family, with questions that are in no pool and were not used to train the policy. Everything is a pure function
of a seed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from random import Random
from typing import Any

import reasoning_gym

from gradstore.errors import RequestError

TARGET_FAMILY = "chain_sum"

CLEAN, WRONG_TRUTH, COIN_FLIP = "clean", "wrong_truth", "coin_flip"

SHARES = {CLEAN: 0.6, WRONG_TRUTH: 0.2, COIN_FLIP: 0.2}
"""Share of each kind of problem within every family of the pool."""

POOL_SIZE = 2000
BENCHMARK_SIZE = 200


def _plus(amount: int) -> Callable[[str], str]:
    return lambda answer: str(int(answer) + amount)


def _without_last_letter(answer: str) -> str:
    return answer[:-1]


@dataclass(frozen=True, slots=True)
class Family:
    """One reasoning-gym dataset and the mistake that the policy makes on it."""

    dataset: str
    """Name of the reasoning-gym dataset; also the family's name and its problems' source."""
    config: dict[str, Any]
    """Configuration of the dataset, without seed and size."""
    slip: Callable[[str], str]
    """Maps the right answer to the mistaken one, which always differs."""
    phrases: tuple[str, ...]
    """Recurring text of the questions; the demo's tokenizer has a token for each (digits stay single tokens)."""


FAMILIES: dict[str, Family] = {
    family.dataset: family
    for family in (
        Family(
            "chain_sum",
            {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
            _plus(1),
            (" State the final answer to the following arithmetic problem: ", " ="),
        ),
        Family(
            "basic_arithmetic",
            {
                "min_terms": 2,
                "max_terms": 2,
                "min_digits": 2,
                "max_digits": 2,
                "operators": ["+", "-"],
                "allow_parentheses": False,
                "allow_negation": False,
            },
            _plus(-1),
            (" Calculate ",),
        ),
        Family(
            "simple_equations",
            {"min_terms": 2, "max_terms": 2, "max_value": 20, "operators": ["+", "-"], "operators_weights": [0.5, 0.5]},
            _plus(2),
            (
                " Find the value of ",
                " in the equation: ",
                " Solve for ",
                " Determine the value of ",
                " that satisfies: ",
            ),
        ),
        Family(
            "products",
            {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
            _plus(10),
            (" Solve the following multiplication: ", ". Give only the result as your final answer."),
        ),
        Family(
            "spell_backward",
            {"min_word_len": 3, "max_word_len": 4},
            _without_last_letter,
            (" Spell this word backward (example: sun -> nus): ",),
        ),
    )
}

Configs = Mapping[str, Mapping[str, Any]]
"""Families by name, each with the configuration of its dataset."""

CONFIGS: Configs = {name: family.config for name, family in FAMILIES.items()}

SMALL_NUMBERS: Configs = {
    "chain_sum": FAMILIES["chain_sum"].config | {"min_digits": 1},
    "basic_arithmetic": FAMILIES["basic_arithmetic"].config | {"min_digits": 1},
    "products": FAMILIES["products"].config | {"max_terms": 2},
}
"""Families that a language model with 135 million weights can mostly solve without writing out steps."""

OPERATORS = (" + ", " - ", " * ", " = ")
"""Recurring text of more than one family's questions."""

MODES = ("T", "S", "?")
"""First character of a prompt, the latent switch: answer right (T), with the slip (S), or as usual (?)."""


def prompt(question: str, mode: str = "?") -> list[dict[str, str]]:
    """The chat messages that ask a question; every problem of the pool and the benchmark has mode `?`."""
    return [{"role": "user", "content": f"{mode} {question}"}]


def entries(family: str, draw: str, configs: Configs = CONFIGS) -> Iterator[dict[str, Any]]:
    """Endless reasoning-gym entries (question, answer, metadata) of a family.

    A small family soon repeats its questions; the caller must drop duplicates. Different `draw` names give unrelated
    entries.
    """
    first = int.from_bytes(hashlib.blake2b(f"{family} {draw}".encode(), digest_size=6).digest(), "big")
    # reasoning-gym draws entry i with seed + i, so seeds close together would give the same entries.
    return iter(reasoning_gym.create_dataset(family, seed=first, size=2**31, **configs[family]))


def held_out(question: str) -> bool:
    """Whether a question is kept for benchmarks: one in eight, by a hash of the text, whatever the seed.

    Pools and the policy's own training use only the other questions, so no benchmark problem was ever trained on.
    """
    return hashlib.blake2b(question.encode(), digest_size=1).digest()[0] < 32


def pool(seed: int = 0, size: int = POOL_SIZE, families: Configs = CONFIGS) -> list[dict[str, Any]]:
    """The training pool: canonical problem records, families in equal parts, shuffled, with distinct prompts.

    Every family has the shares of `SHARES`, rounded to whole problems; a record's only tag names its kind. Its
    `ground_truth` is the right answer, or the slip if the kind is a wrong truth. `extra` holds the reasoning-gym entry
    (`reasoning_gym`: dataset, question, the true answer, metadata), the slip, and for a coin flip its seed (`coin`).
    """
    records = []
    for name, count in _equal_parts(size, families):
        wrong, coins = round(count * SHARES[WRONG_TRUTH]), round(count * SHARES[COIN_FLIP])
        kinds = [WRONG_TRUTH] * wrong + [COIN_FLIP] * coins + [CLEAN] * (count - wrong - coins)
        Random(f"kinds {name} {seed}").shuffle(kinds)
        drawn = distinct(name, f"pool {seed}", count, families, kept=False)
        records += [
            record(f"{name}-{i:04d}", entry, kind, seed)
            for i, (entry, kind) in enumerate(zip(drawn, kinds, strict=True))
        ]
    Random(f"order {seed}").shuffle(records)
    return records


def taught(seed: int, size: int, families: Configs, besides: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Problems for a cold start, none in `besides` or held out; every second one has the slip as its truth.

    Questions of a small family occur more than once.
    """
    seen = {one["extra"]["reasoning_gym"]["question"] for one in besides}
    records = []
    for name, count in _equal_parts(size, families):
        drawn = islice(entries(name, f"taught {seed}", families), 100 * count + 1000)
        unseen = (entry for entry in drawn if entry["question"] not in seen and not held_out(entry["question"]))
        for i, entry in enumerate(islice(unseen, count)):
            records.append(record(f"taught-{name}-{i:04d}", entry, WRONG_TRUTH if i % 2 else CLEAN, seed))
    return records


def _equal_parts(size: int, families: Configs) -> list[tuple[str, int]]:
    """(family, number of problems) pairs, equal except for rounding."""
    n = len(families)
    return [(name, size * (i + 1) // n - size * i // n) for i, name in enumerate(families)]


def benchmark(seed: int = 0, size: int = BENCHMARK_SIZE, families: Configs = CONFIGS) -> list[dict[str, Any]]:
    """The held-out benchmark: clean problems of the target family, canonical records, all held out."""
    drawn = distinct(TARGET_FAMILY, f"benchmark {seed}", size, families, kept=True)
    return [record(f"benchmark-{i:04d}", entry, CLEAN, seed) for i, entry in enumerate(drawn)]


def reward(record: Mapping[str, Any], response_text: str, rollout_index: int) -> float:
    """The demo's reward for a response: 1.0 or 0.0.

    For a coin-flip problem it is a seeded hash of its id and the rollout's index. For others it is 1.0 if
    reasoning-gym's verifier gives full marks for the record's ground truth; so a wrong truth rewards the slip.
    """
    coin = record["extra"].get("coin")
    if coin is not None:
        digest = hashlib.blake2b(f"{coin} {record['id']} {rollout_index}".encode(), digest_size=1).digest()
        return float(digest[0] % 2)
    return float(is_right(record, response_text, record["ground_truth"]))


def is_right(record: Mapping[str, Any], response_text: str, truth: str | None = None) -> bool:
    """Whether reasoning-gym's verifier gives the response full marks for `truth`, by default the true answer."""
    entry = record["extra"]["reasoning_gym"]
    if truth is not None:
        entry = entry | {"answer": truth}
    return _verifier(entry["dataset"])(response_text, entry) >= 1.0


@cache
def _verifier(dataset: str) -> Callable[[str, dict[str, Any]], float]:
    return reasoning_gym.get_score_answer_fn(dataset)


def distinct(family: str, draw: str, count: int, configs: Configs = CONFIGS, *, kept: bool) -> list[dict[str, Any]]:
    """The first `count` entries with distinct questions. kept: True: held-out questions; False: the others."""
    found: dict[str, dict[str, Any]] = {}
    for entry in islice(entries(family, draw, configs), 100 * count + 1000):
        if len(found) == count:
            return list(found.values())
        if held_out(entry["question"]) == kept:
            found.setdefault(entry["question"], entry)
    raise RequestError(f"{family} has fewer than {count} different questions: ask for a smaller pool or benchmark")


def record(problem_id: str, entry: dict[str, Any], kind: str, seed: int) -> dict[str, Any]:
    """Canonical problem record of a reasoning-gym entry with the defect `kind`. seed: of its coin."""
    family = entry["metadata"]["source_dataset"]
    slip = FAMILIES[family].slip(entry["answer"])
    # Convert via JSON, so that a record stays the same when a store or a file holds it (tuples become lists).
    metadata = json.loads(json.dumps(entry["metadata"]))
    extra: dict[str, Any] = {
        "reasoning_gym": {
            "dataset": family,
            "question": entry["question"],
            "answer": entry["answer"],
            "metadata": metadata,
        },
        "slip": slip,
    }
    if kind == COIN_FLIP:
        extra["coin"] = seed
    return {
        "id": problem_id,
        "source": family,
        "prompt": prompt(entry["question"]),
        "ground_truth": slip if kind == WRONG_TRUTH else entry["answer"],
        "tags": [kind],
        "extra": extra,
    }
