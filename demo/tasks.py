"""The demo's problems: five families from reasoning-gym, a pool with known defects and a held-out benchmark.

A family is one reasoning-gym dataset at a size that a model of under a million parameters can learn, plus a
*slip*: the systematic mistake that the demo's policy mostly makes on it. The pool mixes the families, one of
them the target, and has known defects in every family: for some problems the ground truth is wrong (it is the
slip, so the slip is what gets paid), for others the reward is a coin flip that does not look at the response.
The rest is clean and paid by reasoning-gym's own verifier. Which problem is which stands in its tags, for
evaluation alone: no selector may look. The benchmark holds clean problems of the target family, from
questions that no pool has and the policy was not trained on. Everything is a pure function of a seed.
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
    """From the right answer to the mistaken one; never the right answer itself."""
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
            {
                "min_terms": 2,
                "max_terms": 2,
                "max_value": 20,
                "operators": ["+", "-"],
                "operators_weights": [0.5, 0.5],
            },
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
"""What a language model of 135 million weights can do in its head, or nearly."""

OPERATORS = (" + ", " - ", " * ", " = ")
"""Recurring text of more than one family's questions."""

MODES = ("T", "S", "?")
"""The latent switch, first character of a prompt: answer truly, answer with the slip, or as habit has it."""


def prompt(question: str, mode: str = "?") -> list[dict[str, str]]:
    """The chat messages that ask a question; every problem of the pool and the benchmark has mode `?`."""
    return [{"role": "user", "content": f"{mode} {question}"}]


def entries(family: str, draw: str, configs: Configs = CONFIGS) -> Iterator[dict[str, Any]]:
    """reasoning-gym's entries (question, answer, metadata) of a family, without end.

    A small family repeats its questions soon: the caller drops those it has. Draws of other names are unrelated.
    """
    first = int.from_bytes(hashlib.blake2b(f"{family} {draw}".encode(), digest_size=6).digest(), "big")
    # reasoning-gym draws entry i with seed + i, so seeds close together would give the same entries.
    return iter(reasoning_gym.create_dataset(family, seed=first, size=2**31, **configs[family]))


def held_out(question: str) -> bool:
    """Whether a question is kept for benchmarks: one in eight, by a hash of the text, whatever the seed.

    Pools and the policy's own training take from the others, so no benchmark problem was ever trained on.
    """
    return hashlib.blake2b(question.encode(), digest_size=1).digest()[0] < 32


def pool(seed: int = 0, size: int = POOL_SIZE, families: Configs = CONFIGS) -> list[dict[str, Any]]:
    """The training pool: canonical problem records, the families in equal parts and mixed, prompts all different.

    Within every family the shares of `SHARES` hold to the nearest problem; a record's one tag names its kind.
    Its `ground_truth` is the right answer, or the slip where the truth is wrong. `extra` holds the
    reasoning-gym entry (`reasoning_gym`: dataset, question, the true answer, metadata), the slip, and for a coin flip
    the seed of its coin (`coin`).
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
    """Problems for a cold start, none of them among `besides` or held out; every second one's truth is the slip.

    A small family's questions come more than once.
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
    """So many problems of each family, equal but for rounding."""
    n = len(families)
    return [(name, size * (i + 1) // n - size * i // n) for i, name in enumerate(families)]


def benchmark(seed: int = 0, size: int = BENCHMARK_SIZE, families: Configs = CONFIGS) -> list[dict[str, Any]]:
    """The held-out benchmark: clean problems of the target family, canonical records, all held out."""
    drawn = distinct(TARGET_FAMILY, f"benchmark {seed}", size, families, kept=True)
    return [record(f"benchmark-{i:04d}", entry, CLEAN, seed) for i, entry in enumerate(drawn)]


def reward(record: Mapping[str, Any], response_text: str, rollout_index: int) -> float:
    """What the demo pays for a response: 1.0 or 0.0.

    A coin-flip problem pays by a seeded hash of its id and the rollout's index. Every other problem pays when
    reasoning-gym's verifier, given the record's ground truth, gives full marks: so a wrong truth pays the slip.
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
    """The first `count` entries with questions that are different and held out, or not."""
    found: dict[str, dict[str, Any]] = {}
    for entry in islice(entries(family, draw, configs), 100 * count + 1000):
        if len(found) == count:
            return list(found.values())
        if held_out(entry["question"]) == kept:
            found.setdefault(entry["question"], entry)
    raise RequestError(f"{family} has fewer than {count} different questions: ask for a smaller pool or benchmark")


def record(problem_id: str, entry: dict[str, Any], kind: str, seed: int) -> dict[str, Any]:
    """The canonical problem record of a reasoning-gym entry, with the defect that `kind` names; seed: of its coin."""
    family = entry["metadata"]["source_dataset"]
    slip = FAMILIES[family].slip(entry["answer"])
    # Through JSON, so that a record is the same before and after a store or a file held it (tuples become lists).
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
