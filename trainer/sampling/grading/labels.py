r"""Read and compare labels: True and False, yes and no, the letter of an option.

A math parser misreads them as symbols: I is the imaginary unit, E is Euler's number, true is a product of letters.

    truth       agrees                                               does not
    True        true, TRUE, \text{true}, **True**, True., True, as   yes, False, true or false, not true
    No          no, NO., \text{no}                                   no solution, none, False
    C           c, (C), C., C) it grows, C: it grows, Option C       D, C or D, A cat (for A), it grows

Options are A to J, as in MMLU-Pro and SuperGPQA.
"""

import re
from dataclasses import dataclass

from gradstore.trainer.sampling.grading.markup import WRAPPER

_LETTERS = "A-J"
_NOISE = re.compile(r"\\[()\[\],;:! ]|\\(?:bf|rm|it|tt|left|right|quad|qquad)(?![A-Za-z])|[$*_`~{}\"']")
_LEADING = re.compile(
    r"(?:(?:the|final|correct|right|best|answer|option|choice|is|letter)\b\s*[:=]?\s*)+", re.IGNORECASE
)
_AFTER = r"(?P<rest>$|\s*[.:;,)\]]+(?=\s|$).*|\s+[-–—]\s.*|\s+(?:because|since|as)\b.*)"
_WORD = re.compile(rf"(?P<name>true|false|yes|no){_AFTER}", re.IGNORECASE | re.DOTALL)
_OPTION = re.compile(
    rf"(?:[(\[]\s*(?P<inside>[{_LETTERS}])\s*[)\]](?P<after>.*)|(?P<name>[{_LETTERS}]){_AFTER})",
    re.IGNORECASE | re.DOTALL,
)
_ANOTHER = re.compile(
    rf"(?:^|\b(?:or|and)\b|[,/&;])\W*(?:[{_LETTERS}]|true|false|yes|no)\W*(?:$|[,/&;]|\b(?:or|and)\b)", re.IGNORECASE
)
_CHOICE = re.compile(r"\s*[.)\]]?\s*(?:(?:or|and)\b|[/&]|,\s*[-\d.]+\s*$)", re.IGNORECASE)
"""The beginning of a text that names one more answer."""


@dataclass(frozen=True, slots=True)
class Label:
    """A ground truth that is a name: a word or an option's letter."""

    name: str
    """Lower case for words, upper case for letters."""

    @property
    def kind(self) -> str:
        """Name for messages."""
        if len(self.name) == 1:
            return "letter of an option"
        return "True or False" if self.name in ("true", "false") else "yes or no"

    def agrees(self, answer: str) -> bool:
        """Whether the answer is this name and names no other."""
        read = _option if len(self.name) == 1 else _word
        return read(_plain(answer)) == self.name


def read_label(text: str) -> Label | None:
    """Parse a ground truth as a label; None if it is a value, an expression or other text."""
    text = _plain(text)
    word = _word(text)
    if word is not None:
        return Label(word)
    # Lower-case letters are more often variables than options: c in c^2 = a^2 + b^2.
    option = _option(text) if re.match(rf"[(\[]|[{_LETTERS}]", text) else None
    return None if option is None else Label(option)


def _plain(text: str) -> str:
    """The text without LaTeX and Markdown formatting."""
    before = None
    while before != text:
        before, text = text, WRAPPER.sub(r"\1", text)
    return " ".join(_NOISE.sub(" ", text).split())


def _word(text: str) -> str | None:
    found = _WORD.fullmatch(_LEADING.sub("", text, count=1) if _LEADING.match(text) else text)
    if found is None or _names_another(found["rest"]):
        return None
    return found["name"].lower()


def _option(text: str) -> str | None:
    found = _OPTION.fullmatch(_LEADING.sub("", text, count=1) if _LEADING.match(text) else text)
    if found is None or _names_another(found["after"] or found["rest"] or ""):
        return None
    return (found["inside"] or found["name"]).upper()


def _names_another(rest: str) -> bool:
    """Whether the text after a name contains a second name: "A, B", "true or false"."""
    if _CHOICE.match(rest):
        return True
    return _ANOTHER.search(rest.strip(" .:)]")) is not None if rest.strip(" .:)]") else False
