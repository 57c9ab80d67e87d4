"""Word problems for a real language model: SmolLM2-135M-Instruct, taught to write the calculation and nothing else.

A problem is one of SVAMP's with + or - and two whole numbers; its answer is the calculation ("76 - 25"), seven tokens
or so, of which the numbers and the operation are read from the text. After the cold start the model is right about one
time in four, and gives the other operation one time in ten: a wrong truth that the model does give. Off topic are three
tasks of reasoning-gym (sums, differences, products), answered by a number; the cold start taught these right and with
a slip, in equal parts.

SVAMP is its authors' SVAMP.json (github.com/arkilpatel/SVAMP, MIT licence); nothing of it is kept in the repository.
A list of problems of the same form (Body, Question, Equation, Answer, ID) does as well.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.study.bed import EASY, NO_ANSWER, UNSOLVABLE, Arm, Bed, Problems, StudySettings, kinds
from gradstore.demo import tasks
from gradstore.demo.cold_start import cold_start
from gradstore.demo.real_model import smollm2
from gradstore.engine.gradients.models import load_model, load_tokenizer
from gradstore.errors import RequestError
from gradstore.trainer.sampling.reward import Reward

SOURCE = "svamp"
N_TAUGHT, N_TAUGHT_TASKS = 150, 96
"""Problems of SVAMP and of the other tasks that the cold start teaches; they are in no pool or benchmark, except the
easy ones of an arm."""
COLD_STEPS, COLD_BATCH, COLD_RATE = 32, 32, 2e-4
SHORT_STEPS, SHORT_BATCH = 6, 8
SYSTEM = {"role": "system", "content": "Answer with the calculation."}

_EQUATION = re.compile(r"\(?\s*(\d+)\.0\s*([+\-])\s*(\d+)\.0\s*\)?")
_CALCULATION = re.compile(r"\s*(\d+)\s*([+\-])\s*(\d+)\s*")


def word_problems(path: Path) -> list[dict[str, Any]]:
    """Canonical records of the file's problems with + or -, in an order by chance; `extra["other"]` is the calculation
    with the other operation. RequestError for a file that is not a list of such problems."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        records = [record for row in rows if (record := _record(row)) is not None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{path}: not SVAMP's list of problems ({error!r})") from None
    Random("word problems").shuffle(records)
    return records


def _record(row: Mapping[str, Any]) -> dict[str, Any] | None:
    found = _EQUATION.fullmatch(row["Equation"].strip())
    if found is None or row["Answer"] != int(row["Answer"]):
        return None
    body = row["Body"].strip()
    question = f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {row['Question'].strip()}"
    a, operation, b = found.groups()
    other = "-" if operation == "+" else "+"
    return {
        "id": row["ID"],
        "source": SOURCE,
        "prompt": [SYSTEM, {"role": "user", "content": question}],
        "ground_truth": f"{a} {operation} {b}",
        "tags": [tasks.CLEAN],
        "extra": {"other": f"{a} {other} {b}"},
    }


def task_problems(draw: str, count: int, kind: str = tasks.CLEAN) -> list[dict[str, Any]]:
    """`count` problems of reasoning-gym's tasks, in equal parts, answered by a number."""
    records = []
    families = tuple(tasks.SMALL_NUMBERS)
    for place, family in enumerate(families):
        own = len(range(place, count, len(families)))
        for i, entry in enumerate(tasks.distinct(family, draw, own, tasks.SMALL_NUMBERS, kept=False)):
            record = tasks.record(f"{draw}-{family}-{i:04d}".replace(" ", "-"), entry, kind, 0)
            records.append(record | {"prompt": [SYSTEM, {"role": "user", "content": entry["question"]}]})
    return records


def value(text: str) -> tuple[str, int] | None:
    """("calculation" or "number", value) of an answer; None for other text."""
    found = _CALCULATION.fullmatch(text)
    if found:
        a, operation, b = int(found[1]), found[2], int(found[3])
        return "calculation", a + b if operation == "+" else a - b
    return ("number", int(text)) if re.fullmatch(r"\s*-?\d{1,18}\s*", text) else None


def reward(record: Mapping[str, Any], response: str, rollout_index: int) -> float:
    """1.0 for an answer of the truth's form and value, else 0.0: "25 + 3" pays where "3 + 25" is the truth, "28" does
    not."""
    given = value(response)
    return float(given is not None and given == value(record["ground_truth"]))


def taught_model(
    folder: Path, svamp: Sequence[dict[str, Any]], tell: Callable[[str], None], *, short: bool = False
) -> Path:
    """Path of the cold-started model in `folder`; makes it, in about ten minutes on two cores, if it is not there.

    short: hardly taught, in half a minute."""
    out = folder / ("study-words-short" if short else "study-words")
    if not (out / "config.json").is_file():
        lessons = [*svamp[:N_TAUGHT], *task_problems("taught right", N_TAUGHT_TASKS // 2)]
        lessons += task_problems("taught slips", N_TAUGHT_TASKS // 2, tasks.WRONG_TRUTH)
        base = smollm2(folder / "smollm2", tell)
        steps, batch = (SHORT_STEPS, SHORT_BATCH) if short else (COLD_STEPS, COLD_BATCH)
        cold_start(base, lessons, out, steps=steps, batch=batch, peak=COLD_RATE, tell=tell)
    return out


ARMS: dict[str, Arm] = {
    "wrong_truths": Arm("word problems, half of the truths with the other operation", 1.0, {tasks.WRONG_TRUTH: 0.5}),
    "imbalance": Arm("word problems 10 % of the pool, the rest reasoning-gym's tasks", 0.1, {}, others_are_bad=True),
    "low_utility": Arm(
        "12.5 % useful, the rest taught before, unsolvable or off topic",
        0.625,
        {EASY: 0.4, UNSOLVABLE: 0.4},
        of_target=True,
        others_are_bad=True,
    ),
}


def problems(svamp: Sequence[dict[str, Any]], about: Arm, seed: int, pool: int, validation: int, test: int) -> Problems:
    """Make an arm's problems with the given counts. The test is the same for all seeds; benchmark and pool are drawn
    among the others. RequestError for a file with too few problems."""
    taught, unseen = svamp[:N_TAUGHT], svamp[N_TAUGHT:]
    count = round(pool * about.target_share)
    each = kinds(count, about.kinds)
    left = Random(f"study words {seed}").sample(unseen[test:], len(unseen[test:]))
    n_new = sum(kind != EASY for kind in each)
    if len(left) < validation + n_new:
        raise RequestError(f"{len(svamp)} word problems, expected at least {N_TAUGHT + test + validation + n_new}")
    new, easy = iter(left[validation:]), iter(Random(f"study easy {seed}").sample(taught, len(taught)))
    records = [_of_kind(next(easy if kind == EASY else new), kind) for kind in each]
    records += task_problems(f"study {seed}", pool - count)
    Random(f"study order {seed}").shuffle(records)
    return Problems(records, left[:validation], unseen[:test])


def _of_kind(record: dict[str, Any], kind: str) -> dict[str, Any]:
    truths = {tasks.WRONG_TRUTH: record["extra"]["other"], UNSOLVABLE: NO_ANSWER}
    return record | {"tags": [kind], "ground_truth": truths.get(kind, record["ground_truth"])}


HEAD = """# The study on a real model: which way to pick trains better

Made by `python -m benchmarks.study report --bed words` from `{folder}/results.jsonl` ({runs} runs,
{seeds}). `make study-real SVAMP=FILE` runs what is missing and writes this page again; with `SHORT=1` it does a
miniature. Intervals are 95 % t intervals over seeds.

SmolLM2-135M-Instruct, all of its weights, trained by GRPO on problems picked in rounds, as by `gradstore train
--backend local`. A cold start on 150 problems of SVAMP (and 96 of other tasks) taught it to answer a word problem by
the calculation alone. Accuracy is the mean probability of the right calculation, token for token, at temperature 1 on
held-out problems: computed, not sampled. All methods share every setting, the problems and the seeds of a run. The
learning rate was chosen on oracle picks of one seed, which the study leaves out: at 6e-5 accuracy rose for four steps
and fell below its start by step 12 (.393, .477, .329, .261), at 3e-5 it stayed up (.393, .460, .445, .446).

The toy study behind it, 960 runs, is [study-toy.md](study-toy.md).
"""


def words(svamp: Path, models: Path, tell: Callable[[str], None] = lambda line: None, *, short: bool = False) -> Bed:
    """The bed of word problems. svamp: SVAMP.json. models: folder of the base and the cold-started model, which are
    made when first loaded. short: with a model that was hardly taught, for tests."""

    @cache
    def found() -> list[dict[str, Any]]:
        if svamp is None:
            raise RequestError("the bed `words` needs --svamp FILE: SVAMP.json of github.com/arkilpatel/SVAMP")
        return word_problems(svamp)

    def load() -> tuple[Any, Any]:
        folder = str(taught_model(models, found(), tell, short=short))
        return load_model(folder, device="cpu", dtype="float32"), load_tokenizer(folder)

    return Bed(
        name="words",
        arms=ARMS,
        target=SOURCE,
        make=lambda *asked: problems(found(), *asked),
        load=load,
        reward=Reward("study", reward),
        settings=StudySettings(
            pool=80, validation=24, test=80, selected=8, train_batch=8, budget=8, budget_target=4, window=16, lr=2e-5
        ),
        short=StudySettings(
            pool=16, validation=4, test=8, selected=2, train_batch=2, rounds=2, steps=1, rollouts=4, budget=2,
            budget_target=4, window=8, fit_problems=8,
        ),
        methods=(
            *("random*8", "refresh0-dot*6", "gradalign*2", "random+dtv*8", "refresh0-dot%4*7"),
            "refresh0-dot@solutions*7",
            *("budgeted-dot*5", "oracle*8", "pilot*5", "dapo*6", "dot*2"),
        ),
        totals=(2176, 4352),
        compared_at=4352,
        shown=("oracle*8", "random*8", "random+dtv*8", "gradalign*2", "refresh0-dot@solutions*7", "refresh0-dot*6"),
        results=Path("docs/study/results.jsonl"),
        page=Path("docs/study.md"),
        head=HEAD,
        seeds="0-4",
        max_new_tokens=10,
        accept_coverage=0.4,
    )  # fmt: skip
