r"""Compare mathematics by math-verify: expressions, equations, matrices, sets that no simpler kind reads.

math-verify gets one answer, without prose, unit and delimiters, in a box: so its search for an answer in a text, whose
time grows with the square of the text, has nothing to search.
"""

import dataclasses
import functools
import logging
import re
import time
from dataclasses import dataclass
from typing import Any

from gradstore.trainer.sampling.grading.markup import DOLLAR, latex, plain
from gradstore.trainer.sampling.grading.sequences import LONGEST_LIST, listed
from gradstore.trainer.sampling.grading.units import CURRENCIES, read_unit

_NAMES = (
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp sqrt max min gcd lcm lim mod det dim ker deg "
    "arg inf sup rank abs floor ceil"
)
_FUNCTIONS = frozenset(_NAMES.split())
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{3,}")
_WRAPPED_UNIT = re.compile(
    r"\s*\\(?:text|mathrm|mbox|textrm|textbf|hbox)\s*\{(?P<unit>[^{}]*)\}\s*(?P<power>\^\s*\{?\s*\d\s*\}?)?$"
)
_BARE_UNIT = re.compile(
    r"(?<![\\A-Za-z])(?P<unit>[A-Za-z]{2,}\.?(?:[ /]+[A-Za-z]{2,}\.?){0,4}(?:\s*\^\s*\{?[23]\}?)?)$"
)
_CIRCLE = re.compile(r"\s*\^\s*\\circ\s*$")
_TEXTUAL = re.compile(r"\\(?:text|mbox|textbf|textit|textrm)\s*\{[^{}]*[A-Za-z]{3,}|(?<![A-Z\\])[A-Z]{3,}(?![A-Z])")
"""What math-verify reads as products of letters: words, and points as in \\angle ABC."""
_SIDES = re.compile(r"(?<![<>!:\\])=+")
_APPROXIMATELY = re.compile(r"\\(?:approx|simeq|doteq)(?![A-Za-z])")
_RELATION = re.compile(
    r"[<>]|\\(?:le|ge|ne|in|sim|equiv|subset\w*|mid|to|implies|Rightarrow|cup|cap|not)(?![A-Za-z])|!="
)
_RANGES = re.compile(r"\\(?:lim|sum|int|prod)(?![A-Za-z])")
_CUT: list[float] = []
"""When a time limit struck, by the monotonic clock."""
_MOST_WORDS = 4
"""Most words of three letters or more in a truth that is no prose."""
DEEPEST = 40
"""Deepest nesting of braces and brackets that is parsed."""
_LONGEST = 300
"""Characters of the longest answer that is parsed, beyond four times the truth's: parsing is slow."""
TRUTH_S, ANSWER_S = 20, 5
"""Seconds for reading a truth, and for reading and for comparing an answer; after these it is not equal."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A ground truth that math-verify reads."""

    source: str
    """LaTeX without delimiters and unit."""
    unit: str
    kind: str = "expression"

    def agrees(self, answer: str) -> bool:
        """Whether math-verify finds the answer equal."""
        whole = latex(answer) or ""
        if listed(whole, most=LONGEST_LIST) is not None:
            return False
        written, unit = without_unit(whole)
        if self.unit and unit and self.unit != unit:
            return False
        return same(self.source, written)


@dataclass(frozen=True, slots=True)
class Literal:
    """Short mathematics that math-verify cannot parse, compared as text, as Hendrycks et al. do for MATH."""

    source: str
    kind: str = "notation"

    def agrees(self, answer: str) -> bool:
        """Whether the answer is written as the truth is, but for spaces and formatting."""
        return squeezed(self.source) == squeezed(latex(answer) or "")


def read_expression(text: str) -> Expression | None:
    """The truth as an expression; None if math-verify cannot parse it."""
    written = latex(text)
    if not written or depth(written) > DEEPEST:
        return None
    source, unit = without_unit(written)
    if _TEXTUAL.search(source) or len(_WORD.findall(_COMMAND.sub(" ", source))) > _MOST_WORDS:
        return None
    return Expression(source, unit) if _parsed(source, TRUTH_S) else None


def same(gold: str, answer: str) -> bool:
    """Whether two expressions in the form of `latex` are equal; False for prose, and for what cannot be parsed."""
    if not answer or len(answer) > _LONGEST + 4 * len(gold) or depth(answer) > DEEPEST:
        return False
    if _words(answer) - _words(gold) or _infinite(answer) != _infinite(gold):
        return False
    return squeezed(gold) == squeezed(answer) or _verified(gold, answer)


def without_unit(written: str) -> tuple[str, str]:
    """(the expression without a unit after it or money before it, the unit)."""
    if written[:1] in CURRENCIES and len(written) > 1:
        return written[1:].strip(), CURRENCIES[written[0]]
    if written.startswith("-") and written[1:2] == DOLLAR:
        return "-" + written[2:].strip(), CURRENCIES[DOLLAR]
    if _CIRCLE.search(written):
        return _CIRCLE.sub("", written), "degree"
    if written.endswith("%"):
        return written, ""
    wrapped = _WRAPPED_UNIT.search(written)
    found = wrapped or _BARE_UNIT.search(written)
    if found is None or not written[: found.start()].strip():
        return written, ""
    unit = read_unit(f" {found['unit'].strip()}{wrapped['power'] or '' if wrapped else ''}")
    if unit is None or not (wrapped or unit or (found["unit"].islower() and len(found["unit"]) > 3)):
        return written, ""
    return written[: found.start()].strip(), unit


def sides(answer: str) -> list[str]:
    """The sides of an answer's equations: "x = 6/2 = 3" gives x, 6/2 and 3; what is approximately equal is left out.

    One side if the answer has another relation. Minerva takes the last side as the answer.
    """
    if _RELATION.search(answer):
        return [answer]
    found = [side.strip() for side in _SIDES.split(answer)]
    exact = _APPROXIMATELY.split(found[-1])
    if len(exact) > 1:  # 22/7 \approx 3.14, but x \approx 3.14
        named = re.fullmatch(r"\s*(?:\\?[A-Za-z]+(?:_\w)?)?\s*", exact[0])
        found[-1] = exact[-1 if named else 0].strip()
    return found


def squeezed(text: str) -> str:
    """The text without wrappers and spaces, for comparison letter by letter."""
    return re.sub(r"\s+", "", plain(text) or text)


def interrupted() -> int:
    """How many times a time limit cut sympy short in this process.

    Its caches may hold half-made values after that. A process that grades for others should be replaced then.
    """
    return len(_CUT)


def _infinite(text: str) -> bool:
    """Whether infinity is part of a value, not of the range of a limit, sum or integral."""
    return "\\infty" in text and _RANGES.search(text) is None


def _words(text: str) -> set[str]:
    """The words of a text that are no commands or functions."""
    bare = re.sub(r"\\(?:begin|end)\s*\{\w+\*?\}(?:\s*\{[clr| ]*\})?", " ", text)
    return {word.casefold() for word in _WORD.findall(_COMMAND.sub(" ", bare)) if word not in _FUNCTIONS}


def depth(text: str) -> int:
    """How deep a text's brackets are nested."""
    deepest = now = 0
    for character in text:
        if character in "{([":
            now += 1
            deepest = max(deepest, now)
        elif character in "})]":
            now -= 1
    return deepest


@functools.lru_cache(maxsize=65536)
def _parsed(source: str, seconds: int) -> tuple[Any, ...]:
    verifier = _math_verify()
    latex_config = verifier.LatexExtractionConfig(boxed_match_priority=0)
    # Its removal of units takes variables for units: a + b - c would become "a +". `without_unit` has removed them.
    form = dataclasses.replace(latex_config.normalization_config, units=False)
    configs = [dataclasses.replace(latex_config, normalization_config=form), verifier.ExprExtractionConfig()]
    text, start = f"\\boxed{{{source.replace('**', '^')}}}", time.monotonic()
    found = tuple(verifier.parse(text, configs, fallback_mode="no_fallback", parsing_timeout=seconds))
    _note_limit(start, seconds)
    return found


@functools.lru_cache(maxsize=65536)
def _verified(gold: str, answer: str) -> bool:
    golden, given = list(_parsed(gold, TRUTH_S)), list(_parsed(answer, ANSWER_S))
    start = time.monotonic()
    equal = bool(golden and given and _math_verify().verify(golden, given, timeout_seconds=ANSWER_S))
    _note_limit(start, ANSWER_S)
    return equal


def _note_limit(start: float, seconds: int) -> None:
    """After a time limit struck, forget what sympy has remembered: it was cut at any place."""
    if time.monotonic() - start >= seconds:
        from sympy.core.cache import clear_cache

        _CUT.append(start)
        clear_cache()


@functools.cache
def _math_verify() -> Any:
    import math_verify

    # Its warnings quote answers, and each answer that takes too long is one.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify
