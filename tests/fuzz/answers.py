"""Target: responses of models to the rule graders, `math` and `reasoning-gym` (all data sets).

A response runs no code, ends no process and takes no longer than an honest one may; after it, an honest answer still
gets its reward.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from gradstore.trainer.sampling.rewards import load_reward
from tests.fuzz import edits
from tests.fuzz.trial import Trial

LIMIT_S = 15.0
"""Graders have limits of their own, of five seconds for each of a response's comparisons."""
_TRUTHS = ("72", "1/2", "\\frac{3}{4}", "0.5", "(1, 2)", "\\sqrt{2}", "x^2+1", "True", "no", "C", "3,000", "50\\%",
    "\\{1, 2\\}", "[0, 1)",
           "\\$5", "12 cm", "2^{10}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}")  # fmt: skip
_CODE = (
    "__import__('os').system('touch {outside}/ran')", "().__class__.__base__.__subclasses__()",
    "open('{outside}/ran', 'w').write('x')",
    "__import__('os')._exit(0)", "exit()", "quit()", "raise SystemExit", "__import__('sys').exit(0)",
    "exec('import os; os._exit(1)')",
    "(lambda f: f(f))(lambda f: f(f))", "__import__('os').kill(__import__('os').getppid(), 9)",
    "__import__('time').sleep(1000)",
    "open('{outside}/canary').read()", "{{}.__class__}", "${jndi:ldap://127.0.0.1/a}", "'a' * 10**10", "[0] * 10**10",
    "list(range(10**10))",
    "while True: pass", "__import__('socket').create_connection(('127.0.0.1', 9))", "breakpoint()", "input()",
)  # fmt: skip
_HEAVY = (
    "9**9**9**9", "9**9**9", "factorial(10**8)", "10**10**10", "2^{2^{2^{2^{2^{2}}}}}", "\\frac{1}{10^{10^{10}}}",
    "1e999999999", "0x" + "f" * 9,
    "sum(i for i in range(10**12))", "x**x**x**x**x", "integrate(exp(x**x), x)", "(x+1)**100000",
    "\\binom{10^9}{5 \\cdot 10^8}", "1/0", "zoo", "nan", "oo",
    "\\sqrt{\\sqrt{\\sqrt{x}}}^{\\sqrt{x}}", "\\int_0^\\infty e^{-x^2} dx", "\\sum_{i=1}^{10^{12}} i", "100000!",
    "(9!)!!",
)  # fmt: skip

_EVALUATING = (
    "string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown", "puzzle24", "simple_integration",
    "intermediate_integration", "polynomial_multiplication", "number_sorting",
)  # fmt: skip
"""Data sets whose verifiers evaluated what they were given."""


@dataclass
class Honest:
    """The rewards, and the data sets of reasoning-gym by name."""

    math: Any
    gym: Any
    names: list[str]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Data set -> an entry, with the reward of its own answer."""


def prepare(folder: Path) -> Honest:
    """Load the graders and grade once with each, which starts what they start."""
    from reasoning_gym.factory import DATASETS

    folder.mkdir()
    names = sorted(set(DATASETS) - {"composite"})  # which is made of others
    honest = Honest(load_reward("math"), load_reward("reasoning-gym"), names)
    honest.math({"id": "p", "ground_truth": "72"}, "\\boxed{72}", 0)
    _entry(honest, "leg_counting")
    return honest


def draw(random: Random, honest: Honest) -> dict[str, Any]:
    """A grader, what it compares with, and a response."""
    if random.random() < 0.5:
        return {"grader": "math", "truth": random.choice(_TRUTHS), "response": _wrapped(random, _hostile(random))}
    name = random.choice(_EVALUATING if random.random() < 0.4 else honest.names)
    case = {"grader": "reasoning-gym", "truth": name, "response": _wrapped(random, _hostile(random))}
    if random.random() < 0.3:  # a data file that somebody else wrote
        value = random.choice((random.choice(_CODE), random.choice(_HEAVY), edits.nasty(random)))
        case["file"] = [random.choice(("answer", "question", "metadata", "first", "dataset", "config", "entry")), value]
    return case


def attempt(trial: Trial, honest: Honest, case: dict[str, Any]) -> None:
    """Grade the response, then an honest one with the same grader."""
    response = edits.payload(case["response"]).decode("utf-8", "surrogatepass").replace("{outside}", str(trial.outside))
    if case["grader"] == "math":
        record, own, expected = {"id": "p", "ground_truth": case["truth"]}, f"\\boxed{{{case['truth']}}}", 1.0
        reward = honest.math
        check = "72"
        if case["truth"] not in ("72",):  # the truth itself may be one that no grader reads
            record_own, own = {"id": "q", "ground_truth": check}, f"\\boxed{{{check}}}"
        else:
            record_own = record
    else:
        entry = _entry(honest, case["truth"])
        record_own = entry["record"]
        record = _changed(record_own, *case["file"], trial.outside) if "file" in case else record_own
        reward, own, expected = honest.gym, entry["own"], entry["reward"]
    value = trial.call(case["grader"], reward, record, response, 0)
    if value is not None and not 0 <= value <= 1:
        trial.wrong(f"{case['grader']}: reward", f"{value}")
    again = trial.call(f"{case['grader']} afterwards", reward, record_own, own, 1)
    if again is not None and again != expected:
        trial.wrong(f"{case['grader']}: an honest answer afterwards", f"{again}, expected {expected}")


def _entry(honest: Honest, name: str) -> dict[str, Any]:
    """One problem of a data set of reasoning-gym, and the reward of its own answer."""
    if name not in honest.entries:
        import reasoning_gym

        made = reasoning_gym.create_dataset(name, size=1, seed=1)[0]
        entry = json.loads(json.dumps(made, default=str))
        kept = {"dataset": name, "entry": entry}
        record = {"id": name, "prompt": "?", "ground_truth": str(entry["answer"]), "extra": {"reasoning_gym": kept}}
        own = f"<answer>{entry['answer']}</answer>"
        honest.entries[name] = {"record": record, "own": own, "reward": honest.gym(record, own, 0)}
    return honest.entries[name]


def _changed(record: dict[str, Any], place: str, value: Any, outside: Path) -> dict[str, Any]:
    """A record with another value at some place of what reasoning-gym is given."""
    record = json.loads(json.dumps(record))
    try:
        value = json.loads(edits.dumped(value).replace(b"{outside}", str(outside).encode()))
    except RecursionError:
        return record  # no record of a file can hold it: reading refuses such depth
    kept = record["extra"]["reasoning_gym"]
    entry = kept["entry"]
    if place in ("dataset", "config", "entry"):
        kept[place] = value
    elif place == "first" and entry["metadata"]:
        entry["metadata"][min(entry["metadata"])] = value
    else:
        entry[place] = value
    return record


def _hostile(random: Random) -> Any:
    """Text in place of an answer."""
    kind = random.randrange(10)
    if kind <= 2:
        return random.choice(_CODE)
    if kind <= 4:
        return random.choice(_HEAVY)
    if kind == 5:
        unit = random.choice(
            (
                "(",
                "[",
                "{",
                "\\frac{",
                "\\sqrt{",
                "-",
                "((((",
                "\\left(",
                "$",
                "\\boxed{",
                "<answer>",
                "9",
                "a ",
                "1+",
                "\x00",
                "\\\\",
                "`",
            )
        )
        return {"repeat": unit, "times": random.choice((10, 1000, 100_000)) // len(unit) + 1}
    if kind == 6:
        return random.choice(edits.NAMES + tuple(text for text in edits.OTHERS if isinstance(text, str)))
    if kind == 7:
        return json.dumps(
            random.choice((None, [], {}, [[1, 2], [3]], {"a": [1]}, [[["x"]]], True, 1e308, -1, [None] * 50))
        )
    if kind == 8:
        return "".join(
            chr(random.choice((random.randrange(32, 127), random.randrange(0x20, 0x3000))))
            for _ in range(random.randrange(60))
        )
    return random.choice(
        (
            "\n".join(["1 2 3"] * 9),
            "1, 2, 3",
            "x = 5",
            "(3 + 5) * 2",
            "A B C",
            "O(n)",
            "01:30",
            "{'a': 1}",
            "a -> b",
            "1/3",
            "--",
            "E=mc^2",
        )
    )


def _wrapped(random: Random, inner: Any) -> Any:
    """The answer where a grader looks for it."""
    if not isinstance(inner, str):
        return inner
    forms = ("{}", "<answer>{}</answer>", "\\boxed{{}}", "$${}$$", "The answer is {}.", "<answer>\\boxed{{}}</answer>")
    form = random.choice((*forms[:2], *forms[:3], *forms, "```\n{}\n```"))
    return form.replace("{}", inner, 1)
