"""Catalogue of public data sets: hub repository, columns and answer form of each.

To add a data set, add an entry. docs/data.md says how each schema was checked.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gradstore.trainer.data import answers

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
TRUE_FALSE = "Please reason step by step, and put your final answer, True or False, within \\boxed{}."
LETTER = "Please reason step by step, and put the letter of the right option within \\boxed{}."

DAPO_BEFORE = "is the answer to the problem.\n\n"
DAPO_AFTER = "\n\nRemember to put your answer on its own line"
"""DAPO wraps each problem in its own instruction; the problem is the text between these two strings."""


@dataclass(frozen=True, slots=True)
class DataSet:
    """One data set: its location, and how its rows become problems."""

    name: str
    """Name on the command line; also the `source` of its problems."""
    hub: str
    """Hugging Face hub repository."""
    split: str
    """Default split."""
    question: str
    """Column of the question."""
    answer: str
    """Column of the answer."""
    configs: tuple[str, ...] = ()
    """Configurations on the hub, read one after the other; empty: the default configuration."""
    id: str | None = None
    """Column of a stable id; None: a hash of the question."""
    topic: str | None = None
    """Column whose value becomes a tag; None: no such tag."""
    options: str | None = None
    """Column with the list of multiple-choice options."""
    read_question: Callable[[Any], str] | None = None
    """Converts the question column's value to text; None: it is text already."""
    read_answer: Callable[[Any], str] = answers.plain
    """Converts the answer column's value to the ground truth."""
    keep: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether to keep a row; other rows are counted as not kept. None: keep all."""
    needs: tuple[str, ...] = ()
    """Further columns that `keep` reads."""
    instruction: str = BOXED
    """Text after the question in the prompt."""
    ability: str = "math"
    """verl's `ability` field, and the problems' first tag."""
    half: str | None = None
    """`train` or `test`: the first or the second half of the rows, after GradAlign's shuffle (`half_of`); None: all."""
    solution: bool = False
    """Whether the answer column is a whole solution, which `--solutions` keeps."""
    reward: str = "math"
    """The reward that can grade its answers; `--reward auto` uses it."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns a row must have."""
        return tuple(
            dict.fromkeys(
                name for name in (self.question, self.answer, self.id, self.topic, self.options, *self.needs) if name
            )
        )


def _dapo_question(messages: Any) -> str:
    """The problem without DAPO's instruction, from the first user message."""
    content = next((m["content"] for m in messages if m.get("role") == "user"), "") if messages else ""
    return str(content).split(DAPO_BEFORE, 1)[-1].rsplit(DAPO_AFTER, 1)[0].strip()


def _amc_of(year: int) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: f"{year}_AMC" in str(row["url"])


def _amc(name: str, keep: Callable[[Mapping[str, Any]], bool] | None) -> DataSet:
    return DataSet(name, "AI-MO/aimo-validation-amc", "train", "problem", "answer", id="id", keep=keep, needs=("url",))


def _without_picture(row: Mapping[str, Any]) -> bool:
    return row["Picture"] is None


def _of_mathematics(row: Mapping[str, Any]) -> bool:
    return row["category"] == "math"


def half_of(n: int, half: str) -> list[int]:
    """Row numbers of a half of n rows, in GradAlign's order: `datasets` shuffles with seed 42, `train` comes first."""
    order = np.random.default_rng(42).permutation(n).tolist()
    return order[: n // 2] if half == "train" else order[n // 2 :]


def _choice(name: str, hub: str, split: str, answer: str, id: str, topic: str) -> DataSet:
    return DataSet(
        name, hub, split, "question", answer,
        id=id, topic=topic, options="options", instruction=LETTER, ability="knowledge",
    )  # fmt: skip


DATA_SETS: dict[str, DataSet] = {
    entry.name: entry
    for entry in (
        DataSet("aime24", "math-ai/aime24", "test", "problem", "solution",
                id="id", read_answer=answers.boxed_or_plain),
        DataSet("aime25", "math-ai/aime25", "test", "problem", "answer", id="id"),
        _amc("amc", None),
        _amc("amc22", _amc_of(2022)),
        _amc("amc23", _amc_of(2023)),
        DataSet("dapo", "BytedTsinghua-SIA/DAPO-Math-17k", "train", "prompt", "reward_model",
                read_question=_dapo_question, read_answer=answers.ground_truth),
        DataSet("deepscaler", "agentica-org/DeepScaleR-Preview-Dataset", "train", "problem", "answer"),
        DataSet("gsm8k", "openai/gsm8k", "train", "question", "answer",
                configs=("main",), read_answer=answers.after_hashes, solution=True),
        DataSet("math", "EleutherAI/hendrycks_math", "train", "problem", "solution",
                configs=("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
                         "prealgebra", "precalculus"),
                topic="type", read_answer=answers.boxed, solution=True),
        DataSet("math500", "HuggingFaceH4/MATH-500", "test", "problem", "answer", id="unique_id", topic="subject"),
        DataSet("metamath", "meta-math/MetaMathQA", "train", "query", "response",
                topic="type", read_answer=answers.after_phrase, solution=True),
        _choice("mmlupro", "TIGER-Lab/MMLU-Pro", "test", "answer", "question_id", "category"),
        DataSet("strategyqa", "tasksource/strategy-qa", "train", "question", "answer",
                id="qid", instruction=TRUE_FALSE, ability="knowledge"),
        _choice("supergpqa", "m-a-p/SuperGPQA", "train", "answer_letter", "uuid", "discipline"),
        DataSet("theoremqa", "TIGER-Lab/TheoremQA", "test", "Question", "Answer",
                topic="Answer_type", keep=_without_picture, needs=("Picture",)),
        DataSet("webinstruct", "TIGER-Lab/WebInstruct-verified-unfiltered", "train", "original_question",
                "short_answer", ability="knowledge", reward="judge"),
    )
}  # fmt: skip

DATA_SETS |= {
    f"{name}_{half}": replace(DATA_SETS[name], name=f"{name}_{half}", half=half)
    for name in ("theoremqa", "supergpqa")
    for half in ("train", "test")
}
DATA_SETS["mmlupro-math"] = replace(DATA_SETS["mmlupro"], name="mmlupro-math", keep=_of_mathematics)

ALIASES = {
    "hendrycks_math": "math",
    "gsm-8k": "gsm8k",
    "dapo-math-17k": "dapo",
    "mmlu-pro": "mmlupro",
    "mmlu_pro": "mmlupro",
}
"""GradAlign's other names."""

TOGETHER: dict[str, tuple[str, ...]] = {"aime": ("aime24", "aime25")}
"""Names for several data sets, read one after the other."""

NAMES = sorted((*DATA_SETS, *TOGETHER))
