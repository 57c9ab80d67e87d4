"""Read ground truths by kind, and grade responses by the kind of their truth."""

import functools
import re
from dataclasses import dataclass

from gradstore.trainer.sampling.grading.boxes import last_box
from gradstore.trainer.sampling.grading.expressions import (
    DEEPEST,
    Literal,
    depth,
    read_expression,
    same,
    sides,
    without_unit,
)
from gradstore.trainer.sampling.grading.labels import Label, read_label
from gradstore.trainer.sampling.grading.markup import latex, plain
from gradstore.trainer.sampling.grading.quantities import Quantity, read_quantity
from gradstore.trainer.sampling.grading.responses import LONGEST, final_answer
from gradstore.trainer.sampling.grading.sequences import LONGEST_LIST, Element, Listed, Union, listed, read_listed
from gradstore.trainer.sampling.grading.words import Words, read_words

EXPECTED = (
    "expected True or False, yes or no, the letter of an option, a number (with a unit, currency or percent), a list, "
    "set, tuple or interval, a short text, or mathematics in LaTeX"
)
"""What a ground truth can be, for messages."""

_LONGEST_TRUTH = 2000
_IN_BASE = re.compile(r"\(?(?P<digits>[0-9A-Fa-f]+)\)?\s*_\s*\{?\s*(?P<base>\d{1,2}|[a-z]+)\s*\}?")
_NUMERALS = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_BASES = {name: str(number) for number, name in enumerate(_NUMERALS.split(), start=2)}
_CLOCK_OR_RATIO = re.compile(r"\d+(?:\s*:\s*\d+)+")
_SHORT = 100


@dataclass(frozen=True, slots=True)
class Number:
    """A ground truth that is a number; what an answer computes, such as 2^{10}, goes to math-verify."""

    quantity: Quantity
    alternative: Listed | Union | None = None
    """The same truth read as a list: 100,200 is a number or two."""

    @property
    def kind(self) -> str:
        """Name for messages."""
        return self.quantity.kind

    def agrees(self, answer: str) -> bool:
        """Whether the answer is this number, and no other beside it."""
        if self.alternative is not None and self.alternative.agrees(answer):
            return True
        if self.quantity.unit:  # 5m is a product elsewhere
            answer = re.sub(r"(?<=\d)([A-Za-z])$", r" \1", answer.strip())
        given = read_quantity(answer)
        if given is not None:
            return self.quantity.same(given)
        based = _in_base(answer)
        if based is not None:
            return self.quantity.written == based.digits
        written = latex(answer)
        if not written or listed(written, most=LONGEST_LIST) is not None:
            return False
        *others, last = sides(written)
        numbers = [read_quantity(side) for side in (*others, last)]
        if any(number is not None and not self.quantity.same(number) for number in numbers):
            return False
        if others and numbers[-1] is not None:
            return True
        source, unit = without_unit(last)
        if unit and self.quantity.unit and unit != self.quantity.unit:
            return False
        return same(self.quantity.written, source)


@dataclass(frozen=True, slots=True)
class InBase:
    r"""A number written in a base, such as 1010_2. An answer may leave the base out; a written one must agree."""

    digits: str
    base: str
    kind: str = "number in a base"

    def agrees(self, answer: str) -> bool:
        """Whether the answer has the same digits, and no other base."""
        given = _in_base(answer)
        if given is not None:
            return given == self
        return (plain(answer) or "").replace(" ", "").lstrip("0").upper() == self.digits


Truth = Label | Number | InBase | Listed | Union | Words | Literal | Element
"""A ground truth that can be graded: `kind` names its kind, `agrees` compares one answer with it."""


def read_truth(gold: str) -> Truth | None:
    """The ground truth, by its kind; None if no grader can read it."""
    return of_text(gold) if len(gold) <= _LONGEST_TRUTH and gold.strip() else None


@functools.lru_cache(maxsize=65536)
def of_text(gold: str) -> Truth | None:
    """As `read_truth`, for a text of bounded length; remembered, because a truth is read for each response."""
    if depth(gold) > DEEPEST:
        return None
    box = last_box(gold)
    if box is None and re.search(r"\\f?box(?:ed)?\s*\{", gold):
        return None
    return _read(gold if box is None else box, top=True)


def grade(gold: str, response: str) -> bool | None:
    """Whether a response's final answer agrees with the ground truth; None if no grader can read the truth.

    A response without an answer does not agree, and neither does one that gives others beside the right one.
    math-verify limits its time by a signal, so expressions can be graded in a main thread only; elsewhere ValueError.
    """
    truth = read_truth(gold)
    if truth is None:
        return None
    values = not isinstance(truth, Label | Words)
    answer = final_answer(response, values=values, longest=LONGEST + len(gold))
    if answer is None:
        return False
    if isinstance(truth, Label) and read_label(answer.before) not in (None, truth):
        return False
    if isinstance(truth, Listed):
        if len(answer.parts) > 1:
            return truth.agrees_with(answer.parts) or all(truth.agrees(part) for part in answer.parts)
        return truth.agrees(answer.parts[0]) or (len(answer.all_boxes) > 1 and truth.agrees_with(answer.all_boxes))
    return all(truth.agrees(part) for part in answer.parts)


def readable(gold: str) -> bool:
    """Whether a grader can read the ground truth."""
    return read_truth(gold) is not None


def unreadable(gold: str) -> str:
    """Says that a ground truth cannot be read, and what it can be."""
    shown = gold if len(gold) <= _SHORT else f"{gold[:_SHORT]}..."
    return f"ground truth {shown!r} is nothing that can be graded; {EXPECTED}"


def _read(text: str, *, top: bool = False) -> Truth | None:
    label = read_label(text)
    if label is not None:
        return label
    quantity = read_quantity(text)
    if quantity is not None:
        split = read_listed(text, _element) if top and re.fullmatch(r"[\d,\s$]*\d{1,3},\d{3}[\d,\s$]*", text) else None
        return Number(quantity, split)
    based = _in_base(text)
    if based is not None:
        return based
    written = latex(text) or ""
    if _CLOCK_OR_RATIO.fullmatch(written):
        return Literal(written)
    return read_listed(text, _element) or read_words(text) or _mathematics(text, written)


def _element(text: str) -> Truth | None:
    return _read(text)


def _mathematics(text: str, written: str) -> Truth | None:
    """What math-verify reads; what it cannot parse, if short and well formed, as written."""
    found = read_expression(text)
    if found is not None or not written or len(written) > _SHORT:
        return found
    balanced = listed(f"{written}, 1") is not None
    return Literal(written) if balanced and re.search(r"\\[A-Za-z]|[=^_+]", written) else None


def _in_base(text: str) -> InBase | None:
    found = _IN_BASE.fullmatch(plain(text) or "")
    if found is None:
        return None
    base = _BASES.get(found["base"], found["base"])
    if (
        not base.isdigit()
        or not 2 <= int(base) <= 36
        or not all(int(digit, 36) < int(base) for digit in found["digits"])
    ):
        return None
    return InBase(found["digits"].lstrip("0").upper(), str(int(base)))
