"""Answers are graded by the kind of their truth, as published conventions say (grading_cases.py), in linear time."""

import json
import random
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from gradstore.trainer.data import answers
from gradstore.trainer.sampling.grading import expressions, grade, last_box, read_truth, readable, unreadable
from gradstore.trainer.sampling.grading.labels import Label
from gradstore.trainer.sampling.grading.truths import of_text
from gradstore.trainer.sampling.rewards import load_reward
from tests.trainer.grading_cases import (
    BASES,
    EXPRESSIONS,
    INTERVALS,
    LISTS,
    MATH_TRUTHS,
    NUMBERS,
    RESPONSES,
    TEXTS,
    UNITS,
    UNREADABLE,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"
"""Published data sets beside the checkout; where they are missing, their test is skipped."""
TABLE = [*NUMBERS, *UNITS, *BASES, *INTERVALS, *LISTS, *TEXTS, *EXPRESSIONS, *RESPONSES]


@pytest.mark.parametrize(("gold", "response", "agrees"), TABLE)
def test_published_conventions(gold: str, response: str, agrees: bool) -> None:
    assert grade(gold, response) is agrees


WRAPS = (
    r"\boxed{%s}", r"$\boxed{%s}$", "Thus\n\\[\\boxed{%s}\\]\nDone", r"The answer is \boxed{%s}.",
    r"so \boxed{ %s }",
    "The final answer is $%s$. I hope it is correct.", "**Answer:** $%s$",
)  # fmt: skip
OTHERS = (
    r"\boxed{7351}", r"\boxed{xyz}", r"\boxed{True}", r"\boxed{%s, 7351}", r"\boxed{%s \text{ or } 7351}",
    r"\boxed{%s} or \boxed{7351}", r"\boxed{}", r"\boxed{%s", "", "I do not know",
)  # fmt: skip


@pytest.mark.parametrize("gold", MATH_TRUTHS)
def test_truths_of_math_agree_with_themselves(gold: str) -> None:
    """In whatever is usual around an answer; and with nothing that says more or something else."""
    assert readable(gold)
    for wrap in WRAPS:
        dollars = "$" in gold.replace(r"\$", "") or r"\(" in gold
        if not (dollars and "$" in wrap) and not ("boxed" in gold and "$%s$" in wrap):
            assert grade(gold, wrap % gold) is True, wrap
    for other in OTHERS:
        response = other % gold if "%s" in other else other
        # The text of an option may be a list: (B) 12 or 7351.
        of_option = gold.startswith(r"\textbf{(B)}") and other in OTHERS[3:5]
        whole_box = "boxed" in gold and other == r"\boxed{%s"
        assert grade(gold, response) is (of_option or whole_box), other


def _published() -> Iterator[tuple[str, str]]:
    """(truth, response that its publisher calls right) of three data sets."""
    for name in ("gsm8k_train", "gsm8k_test"):
        for line in (SHARED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            solution = json.loads(line)["answer"]
            yield answers.after_hashes(solution), solution
    for row in json.loads((SHARED / "svamp.json").read_text(encoding="utf-8")):
        yield str(row["Answer"]), f"It is {answers.plain(row['Answer'])}."


@pytest.mark.skipif(not SHARED.exists(), reason="needs the data sets")
def test_published_numbers_agree_with_themselves() -> None:
    """10,000 truths and solutions as published; the next number is wrong."""
    wraps = (r"\boxed{%s}", r"\boxed{\text{%s}}", "$%s$", "The answer is %s.", r"\(%s\)")
    for place, (gold, solution) in enumerate(_published()):
        assert grade(gold, solution) is True, gold
        assert grade(gold, wraps[place % len(wraps)] % gold) is True, gold
        assert grade(gold, rf"\boxed{{{float(gold) + 1}}}") is False, gold


def _spellings(value: Fraction) -> list[str]:
    """Ways to write a number, all exact."""
    sign, size = "-" if value < 0 else "", abs(value)
    top, bottom = size.numerator, size.denominator
    written = [rf"{sign}\frac{{{3 * top}}}{{{3 * bottom}}}", f"{sign}{top}/{bottom}"]
    written.append(rf"\frac{{{value.numerator}}}{{{bottom}}}")
    if bottom == 1:
        written += [f"{sign}{top}", f"{sign}{top:,}", f"{sign}{top}.0", f"x = {sign}{top}"]
        written.append(f"{sign}{top:,}".replace(",", r",\!"))
    elif top > bottom:
        written.append(rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}")
    if 10**4 % bottom == 0:
        written += [f"{sign}{float(size):.4f}", f"${sign}{float(size):.5f}$"]
    return written


def _pairs(count: int) -> Iterator[tuple[Fraction, Fraction, str, str]]:
    rng = random.Random(5)
    for _ in range(count):
        top = rng.randint(-9999, 9999) * rng.choice([1, 1, 1, 997])
        value = Fraction(top, rng.choice([1, 1, 2, 3, 7, 10, 100, 10_000]))
        other = rng.choice([value, value, -value, value + 1, value * 10, value / 10, value + Fraction(1, 1000)])
        yield value, other, rng.choice(_spellings(value)), rng.choice(_spellings(other))


def test_numbers_are_compared_exactly() -> None:
    """5,000 pairs, against exact arithmetic."""
    for value, other, gold, answer in _pairs(5_000):
        if not (gold.startswith("x") and answer.startswith("x")):
            assert grade(gold, rf"\boxed{{{answer}}}") is (value == other), (gold, answer)


def test_numbers_are_compared_as_math_verify_does() -> None:
    """Nothing is lost by not asking it."""
    from math_verify import parse, verify

    for _, _, gold, answer in _pairs(300):
        theirs = verify(parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{answer}}}"))
        assert grade(gold, rf"\boxed{{{answer}}}") is theirs, (gold, answer)


HOSTILE = {
    "boxes": "\\boxed{" * 150_000, "nested boxes": "\\boxed{" * 75_000 + "7" + "}" * 75_000,
    "braces": "\\boxed" + "{" * 10**6,
    "digits": "1" * 10**6, "boxed digits": "\\boxed{" + "1" * 10**6 + "}", "dollars": "$" * 10**6,
    "blanks": "answer" + " " * 10**6,
    "markers": "answer is " * 100_000, "hashes": "#### " * 200_000, "tags": "<answer>" * 125_000,
    "lines": "\n" * 10**6,
    "commas": "1, " * 333_333, "fractions": "\\frac{" * 166_666, "display": "\\[" * 500_000,
    "backslashes": "\\" * 10**6,
    "many boxes": "\\boxed{6} or " * 70_000, "bare boxes": "\\boxed " * 140_000, "brackets": "(" * 10**6,
    "deep text": "\\boxed{" + "\\text{" * 300 + "}" * 301, "long sum": "\\boxed{" + "9 " * 900 + "}",
    "signs": "\\boxed{" + "\\pm " * 400 + "}",
    "chain": "\\boxed{" + "x=" * 900 + "}", "units": "\\boxed{5" + " cm" * 600 + "}",
    "list": "\\boxed{" + "1," * 990 + "}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_megabyte_costs_no_second(name: str) -> None:
    """A policy learns what stops a grader."""
    for gold in ("5", "True", "C", "1, 2", r"\text{east}", "x^2", "[0, 1)"):
        grade(gold, r"\boxed{3}")  # the first call imports the graders
        start = time.process_time()
        assert grade(gold, HOSTILE[name]) is False
        assert time.process_time() - start < 1, gold


def test_nothing_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A truth or a response of any characters is read or not, without a traceback. math-verify is left out: slow."""
    monkeypatch.setattr(expressions, "_parsed", lambda source, seconds: (source,))
    monkeypatch.setattr(expressions, "_verified", lambda gold, answer: False)
    of_text.cache_clear()
    characters = "5 , . - + = < ( ) [ ] { } _ ^ % $ | / : A i x \\ é 中 ² ½ ٣ \ud800 \x00 \u202e"
    pieces = [
        *characters.split(), " ", "\n", r"\$", r"\{", r"\}", r"\frac", r"\text{", r"\boxed{", r"\pm ", r"\cup ",
        r"\infty", r"\le ", "1,234", "10_2", " cm", "e999", "9" * 50, " or ", "answer is ", "#### ", "Monday", "True",
    ]  # fmt: skip
    rng = random.Random(3)
    for _ in range(5000):
        gold, other = ("".join(rng.choices(pieces, k=rng.choice([1, 2, 3, 6]))) for _ in range(2))
        wrap = rng.choice(["%s", r"\boxed{%s}", "The answer is %s", "$%s$"])
        response = wrap.replace("%s", rng.choice([gold, other]))
        assert grade(gold, response) in (True, False, None), (gold, response)
        assert unreadable(gold)
    of_text.cache_clear()


def test_a_cut_comparison_is_counted() -> None:
    """sympy may be in disorder afterwards, so whoever keeps the process must know."""
    before = expressions.interrupted()
    assert grade("7351", r"\boxed{(9^9)!}") is False
    assert expressions.interrupted() == before + 1


def test_options_are_not_listed() -> None:
    """Whoever names all options has not answered, however the list is written."""
    listing = ("A, B, C, D", "A or B or C or D", "(A), (B), (C), (D)", "A/B/C/D", "A and B and C and D", "A; B; C; D")
    for gold in "ABCD":
        for options in listing:
            for wrap in (r"\boxed{%s}", "The answer is %s", "Answer: %s", "thinking\n%s"):
                assert grade(gold, wrap % options) is False, (gold, wrap % options)
        assert grade(gold, " ".join(rf"\boxed{{{option}}}" for option in "ABCD")) is False
        assert grade(gold, "\n".join(f"{option}. it grows" for option in "ABCD")) is False
        assert grade(gold, f"A. it grows\nB. it falls\n\nI choose by the text.\n{gold}.") is True


@pytest.mark.parametrize("gold", UNREADABLE)
def test_what_no_grader_reads(gold: str) -> None:
    """None, not 0: the problem is wrong, not the answers; the message says what can be read, and shows no megabyte."""
    assert read_truth(gold) is None
    assert grade(gold, r"\boxed{5}") is None
    assert len(unreadable(gold)) < 500
    assert "expected True or False" in unreadable(gold)


def test_kinds_have_names() -> None:
    kinds = {
        "True": "True or False", "no": "yes or no", "C": "letter of an option", "5": "number",
        "5 km": "number with a unit", "1010_2": "number in a base", "1, 2": "list", r"\{1, 2\}": "set",
        "(1, 2)": "ordered pair", "(1, 2, 3)": "tuple",
        "[0, 1)": "interval", "x < 2": "interval", r"[0, 1) \cup (2, 3)": "union of intervals", "east": "text",
        "x^2": "expression", "3:4": "notation",
    }  # fmt: skip
    found = {gold: read_truth(gold) for gold in kinds}
    assert {gold: truth and truth.kind for gold, truth in found.items()} == kinds


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{1} \boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\{1\}}", r"\{1\}"), (r"\boxed 7$.", "7"),
        (r"\fbox{3}", "3"), (r"\boxed{1", None), (r"\boxed{1} \boxed{2", None), ("none", None), (r"\boxedx{1}", None),
        (r"\boxed{}", ""), (r"\boxed{\boxed{5}, 6}", "{5}, 6"), (r"\boxed{ \boxed{5}", "5"),
        (r"} \boxed{5} {", "5"), (r"\boxed{a\}b}", r"a\}b"),
    ],
)  # fmt: skip
def test_the_last_box(text: str, box: str | None) -> None:
    assert last_box(text) == box


TRUTHS = {
    "True": "true", "false": "false", "FALSE": "false", r"\text{True}": "true", r"\boxed{False}": "false",
    "True.": "true", "yes": "yes", "No": "no", "No.": "no",
    "A": "A", "J": "J", "E": "E", "I": "I", "(C)": "C", "C.": "C", "C)": "C", "(c)": "C", "C. it grows": "C",
    "(C) 12": "C", r"\text{C}": "C", r"$\textbf{(D)}$": "D", r"\boxed{B}": "B",
    # values, expressions and other text
    "3": None, "x": None, "c": None, "AB": None, "A, B": None, "A and B": None, "N": None, "C = 3": None, "A cat": None,
    "no solution": None, "e^2": None, r"\frac12": None, "": None, "True or False": None, "12": None, "I + 1": None,
}  # fmt: skip


@pytest.mark.parametrize("gold", TRUTHS)
def test_which_truths_are_names(gold: str) -> None:
    """A value that is taken for a name would be graded by its first letter."""
    found = read_truth(gold)
    assert (found.name if isinstance(found, Label) else None) == TRUTHS[gold]


DRESSES = (
    r"\boxed{%s}", r"so \boxed{\text{%s}}.", r"\boxed{\textbf{%s}}", r"$\boxed{\mathrm{%s}}$", r"\boxed{ %s }",
    r"\boxed{%s.}", r"\boxed{3} no, \boxed{%s}", r"\fbox{%s}", "The answer is %s.", "Answer: %s", "**Answer:** %s",
    "The final answer is: **%s**", "reasoning\n%s", "reasoning\n%s.\n", "The answer is not 3. The answer is %s\nDone.",
    r"\boxed{\text{\textbf{%s}}}", r"The answer is \(\text{%s}\).", r"\boxed{\text{Answer: %s}}",
)  # fmt: skip
WORDS = {"True": "False", "False": "True", "Yes": "No", "No": "Yes"}


@pytest.mark.parametrize("dress", DRESSES)
def test_every_dress_pays_every_name(dress: str) -> None:
    """No name is easier to say than another: a bias between them is a gradient towards it."""
    for name, other in [*WORDS.items(), *zip("ABCDEFGHIJ", "BCDEFGHIJA", strict=True)]:
        assert grade(name, dress % name) is True, (name, dress)
        assert grade(name, dress % other) is False, (name, dress)
        if len(name) > 1:
            for spelling in (name.lower(), name.upper()):
                assert grade(name, dress % spelling) is True, (spelling, dress)
        else:
            for spelling in (f"({name})", name.lower(), f"({name.lower()})", f"{name})", f"Option {name}"):
                assert grade(name, dress % spelling) is True, (spelling, dress)


OPTIONS = [
    ("C", "C. it grows", 1), ("C", "C: it grows", 1), ("C", "C) it grows", 1), ("C", "(C) it grows", 1),
    ("C", "(C) 12", 1),
    ("C", "C - it grows", 1), ("C", "option C", 1), ("C", "Choice (C)", 1), ("C", "[C]", 1),
    ("I", "I. none of these", 1),
    ("C", "D", 0), ("C", "C or D", 0), ("C", "C, D", 0), ("C", "C and D", 0), ("C", "(C) or (D)", 0), ("C", "C/D", 0),
    ("C", "C.D", 0), ("C", "CD", 0), ("C", "it grows", 0), ("A", "A cat", 0), ("A", "12", 0), ("C", "not C", 0),
    ("C", "", 0),
    ("I", "i + 1", 0), ("E", "e^{1}", 0), ("E", "2.718281828459045", 0),
    ("True", "True, as shown", 1), ("True", "True. It holds", 1), ("Yes", "Yes - it does", 1),
    ("C", "C because it grows", 1), ("A", "A because", 1), ("C", "(C) or 12", 0), ("C", "C, 12", 0),
    ("Yes", "Yes or 3", 0),
    ("True", "yes", 0), ("Yes", "true", 0), ("True", "1", 0), ("False", "0", 0), ("True", "not true", 0),
    ("True", "true or false", 0), ("True", "True, False", 0), ("No", "no solution", 0), ("No", "none", 0),
    ("No", "", 0),
    ("True", "truely", 0),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer", "paid"), OPTIONS)
def test_what_stands_beside_a_name(gold: str, answer: str, paid: int) -> None:
    """An explanation does no harm; a second name does: the response did not choose."""
    reward = load_reward("math")
    record = {"id": "p", "prompt": "q", "ground_truth": gold, "source": "", "tags": [], "extra": {}}
    assert reward(record, rf"\boxed{{{answer}}}", 0) == paid


@pytest.mark.parametrize("response", ["", "I think so", "\\boxed{", "\\boxed{}", "A long story about a cat", "\n \n"])
def test_a_response_without_an_answer_is_not_paid(response: str) -> None:
    """The article A and the pronoun I are no answers."""
    for gold in ("A", "I", "True", "No"):
        assert grade(gold, response) is False


def test_values_are_left_to_math_verify() -> None:
    """The way of names must not catch them."""
    for gold, response, equal in (("12", r"\boxed{12.0}", True), ("x", r"\boxed{x}", True), ("c", r"\boxed{c}", True),
                                  ("1/2", r"\boxed{\frac12}", True)):  # fmt: skip
        assert grade(gold, response) is equal, (gold, response)
