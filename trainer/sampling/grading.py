"""Grading of ground truths that are names: True and False, yes and no, the letter of an option.

A math parser misreads them as symbols: I is the imaginary unit, E is Euler's number, true is a product of letters. This
module compares them as words. `read_truth` recognizes such a ground truth; all others are left to math-verify. A
response's answer is the content of its last box, or the text after the last "answer is" or "Answer:", or the last line.

    truth       reward 1                                             reward 0
    True        true, TRUE, \\text{True}, **True**, True., True, as   yes, False, true or false, not true
    No          no, NO., \\text{no}                                   no solution, none, False
    C           c, (C), C., C) it grows, C: it grows, Option C        D, C or D, A cat (for A), it grows
"""

import re
from dataclasses import dataclass

_PAIRS = ("true", "false"), ("yes", "no")
_LETTERS = "A-J"
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|textsf|mathrm|mathbf|mathsf|mathit|mathtt|boldsymbol|bm|emph|mbox|hbox|operatorname)"
    r"\s*\{([^{}]*)\}"
)
_NOISE = re.compile(r"\\[()\[\],;:! ]|\\(?:bf|rm|it|tt|left|right|quad|qquad)(?![A-Za-z])|[$*_`~{}\"']")
_LEADING = re.compile(
    r"(?:(?:the|final|correct|right|best|answer|option|choice|is|letter)\b\s*[:=]?\s*)+", re.IGNORECASE
)
_AFTER = r"(?P<rest>$|\s*[.:;,)\]]+(?=\s|$).*|\s+[-–—]\s.*)"
_WORD = re.compile(rf"(?P<name>true|false|yes|no){_AFTER}", re.IGNORECASE | re.DOTALL)
_OPTION = re.compile(
    rf"(?:[(\[]\s*(?P<inside>[{_LETTERS}])\s*[)\]](?P<after>.*)|(?P<name>[{_LETTERS}]){_AFTER})",
    re.IGNORECASE | re.DOTALL,
)
_ANOTHER = re.compile(
    rf"(?:^|\b(?:or|and)\b|[,/&;])\W*(?:[{_LETTERS}]|true|false|yes|no)\W*(?:$|[,/&;]|\b(?:or|and)\b)", re.IGNORECASE
)
_MARKER = re.compile(r"\banswer\b\s*(?:is\b\s*:?|:|=)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class NamedTruth:
    """A ground truth that is a name: a word or an option's letter."""

    name: str
    """Lower case for words, upper case for letters."""

    def agrees(self, response: str) -> bool:
        """Whether the response's answer is this name and names no other."""
        read = _option if len(self.name) == 1 else _word
        return read(_answer(response)) == self.name


def read_truth(gold: str) -> NamedTruth | None:
    """Parse a ground truth as a name; None if it is a value, an expression or other text."""
    box = _last_box(gold)
    text = _plain(gold if box is None else box)
    word = _word(text)
    if word is not None:
        return NamedTruth(word)
    # Lower-case letters are more often variables than options: c in c^2 = a^2 + b^2.
    option = _option(text) if re.match(rf"[(\[]|[{_LETTERS}]", text) else None
    return None if option is None else NamedTruth(option)


def _answer(response: str) -> str:
    """The response's answer: its last box, the text after its last "answer is", or its last line."""
    box = _last_box(response)
    if box is not None:
        return _plain(box)
    marked = [found.end() for found in _MARKER.finditer(response)]
    text = response[marked[-1] :] if marked else response
    lines = [line for line in text.splitlines() if line.strip()]
    return _plain(lines[0 if marked else -1]) if lines else ""


def _last_box(text: str) -> str | None:
    """Content of the last \\boxed{...}, with nested braces; None if there is none, or it is not closed."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    depth, begin = 0, text.index("{", start)
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[begin + 1 : place]
    return None


def _plain(text: str) -> str:
    """The text without LaTeX and Markdown formatting."""
    before = None
    while before != text:
        before, text = text, _WRAPPER.sub(r"\1", text)
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
    return _ANOTHER.search(rest.strip(" .:)]")) is not None if rest.strip(" .:)]") else False
