"""Names are compared as names: the conventions of truths and answers, one line each, symmetric between the names."""

import pytest

from gradstore.trainer.sampling.grading import grade, read_truth
from gradstore.trainer.sampling.rewards import load_reward, math_equal

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
    assert (None if found is None else found.name) == TRUTHS[gold]


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
        assert math_equal(name, dress % name) is True, (name, dress)
        assert math_equal(name, dress % other) is False, (name, dress)
        if len(name) > 1:
            for spelling in (name.lower(), name.upper()):
                assert math_equal(name, dress % spelling) is True, (spelling, dress)
        else:
            for spelling in (f"({name})", name.lower(), f"({name.lower()})", f"{name})", f"Option {name}"):
                assert math_equal(name, dress % spelling) is True, (spelling, dress)


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
        assert math_equal(gold, response) is False


def test_values_are_left_to_math_verify() -> None:
    """The way of names must not catch them."""
    for gold, response, equal in (("12", r"\boxed{12.0}", True), ("x", r"\boxed{x}", True), ("c", r"\boxed{c}", True),
                                  ("1/2", r"\boxed{\frac12}", True)):  # fmt: skip
        assert math_equal(gold, response) is equal, (gold, response)
