"""Grading of mathematics: answers per second and core, by reward workers and by math-verify in this process.

    python -m benchmarks.rewards [--problems 60] [--rounds 7]

Each round draws new problems, with eight responses each of some 300 characters that end in a box: six in ten ground
truths are whole numbers, the others fractions, decimals, roots, polynomials and pairs; half of the responses are right,
the wrong ones are alike in part, as a policy's are. `direct` is math-verify with the ground truth parsed once per
problem, in this process, without limits. `workers` is the reward `math`, with one worker. The rates are of processor
time, of all processes that take part (this one, keeper, grader), so that they hold per core on a busy machine too.
Results must agree. The two run in turn.
"""

import functools
import os
import statistics
import time
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from gradstore.cli.show import print_table
from gradstore.trainer.sampling.workers.pool import WorkerPool

PER_PROBLEM = 8
FILL = "We add the terms, divide by the number of cases and simplify what is left, which gives the value below. "
FORMS = (
    ["{n}"] * 12
    + [r"\frac{{{n}}}{{{b}}}"] * 3
    + ["{n}.{b}"]
    + [r"{n}\sqrt{{{b}}}"] * 2
    + ["x^2+{n}x-{b}", "({n}, {b})"]
)
"""Ground truths and answers; one of them is drawn for each problem."""


def draw(problems: int, random: Random) -> list[tuple[str, str]]:
    """Pairs of ground truth and response, eight per problem."""
    pairs = []
    for _ in range(problems):
        a, b = random.randint(2, 999), random.randint(2, 99)
        form = random.choice(FORMS)
        for _ in range(PER_PROBLEM):
            answer = form.format(n=a + random.choice([0, 0, 0, 1, -1, random.randint(2, 9)]), b=b)
            box = random.choice([rf"\boxed{{{answer}}}.", rf"$\boxed{{{answer}}}$", rf"\[\boxed{{{answer}}}\]"])
            pairs.append((form.format(n=a, b=b), f"Let $n$ be the number. {FILL * 3}So the answer is {box}"))
    return pairs


def direct(pairs: list[tuple[str, str]]) -> list[float]:
    """Scores by math-verify, as called in the process of the trainer."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    @functools.cache
    def golden(gold: str) -> list[Any]:
        return parse(rf"\boxed{{{gold}}}", configs)

    return [float(verify(golden(gold), parse(response, configs))) for gold, response in pairs]


def used(workers: WorkerPool) -> float:
    """Processor time in seconds of this process, the keepers and their graders."""
    seconds = time.process_time()
    keepers = {worker.process.pid for worker in workers._idle}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if keepers & {int(place.name), int(fields[1])}:
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def main(
    problems: Annotated[int, typer.Option(help="Problems per round.")] = 60,
    rounds: Annotated[int, typer.Option(help="Rounds of either.")] = 7,
) -> None:
    random = Random(0)
    workers = WorkerPool("math", workers=1)
    rates: dict[str, list[float]] = {"direct": [], "workers": []}
    warm = draw(5, random)
    direct(warm)
    workers.results([gold for gold, _ in warm], [(i, text, 0) for i, (_, text) in enumerate(warm)])
    for number in range(rounds):
        pairs = draw(problems, random)
        scores: dict[str, list[float]] = {}
        for name in ("direct", "workers") if number % 2 else ("workers", "direct"):
            begun = used(workers)
            if name == "direct":
                scores[name] = direct(pairs)
            else:
                golds = list(dict.fromkeys(gold for gold, _ in pairs))
                items = [(golds.index(gold), text, j % PER_PROBLEM) for j, (gold, text) in enumerate(pairs)]
                scores[name] = [result["score"] for result in workers.results(golds, items)]
            rates[name].append(len(pairs) / (used(workers) - begun))
        if scores["direct"] != scores["workers"]:
            raise SystemExit("the two disagree")
    workers.close()
    middle = statistics.median(rates["direct"])
    columns = ["", "median", "lowest", "highest", "times direct"]
    table = []
    for name, own in rates.items():
        median = statistics.median(own)
        table.append([name, *(f"{rate:,.0f}" for rate in (median, min(own), max(own))), f"{median / middle:.1f}"])
    print_table(f"math: answers per second and core, {rounds} rounds of {problems * PER_PROBLEM}", columns, table)


if __name__ == "__main__":
    typer.run(main)
