"""Truths that are names, not values: True and False, yes and no, the letter of an option.

A parser of mathematics reads them as symbols: I is the imaginary unit, E Euler's number, true a product of letters.
Here they are compared as what they are. `read_truth` says which of these a ground truth is; any other is left to
math-verify. The answer is what the last box of a response holds, or what follows the last "answer is" or "Answer:",
or the last line.

    truth       paid                                                 not paid
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
    """A ground truth that is a name."""

    name: str
    """In lower case for words, upper case for letters."""

    def agrees(self, response: str) -> bool:
        """Whether the response's answer is this name and no other beside it."""
        read = _option if len(self.name) == 1 else _word
        return read(_answer(response)) == self.name


def read_truth(gold: str) -> NamedTruth | None:
    """The name that a ground truth is; None for one that is a value, an expression or other text."""
    box = _last_box(gold)
    text = _plain(gold if box is None else box)
    word = _word(text)
    if word is not None:
        return NamedTruth(word)
    # Small letters are variables more often than options: c^2 = a^2 + b^2 for c.
    option = _option(text) if re.match(rf"[(\[]|[{_LETTERS}]", text) else None
    return None if option is None else NamedTruth(option)


def _answer(response: str) -> str:
    """The response's answer: its last box, what follows its last "answer is", or its last line."""
    box = _last_box(response)
    if box is not None:
        return _plain(box)
    marked = [found.end() for found in _MARKER.finditer(response)]
    text = response[marked[-1] :] if marked else response
    lines = [line for line in text.splitlines() if line.strip()]
    return _plain(lines[0 if marked else -1]) if lines else ""


def _last_box(text: str) -> str | None:
    """What the last \\boxed{...} holds, braces inside it included; None without one that is closed."""
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
    """The text without LaTeX's and Markdown's dress."""
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
    """Whether what follows a name names a second one: "A, B", "true or false"."""
    return _ANOTHER.search(rest.strip(" .:)]")) is not None if rest.strip(" .:)]") else False
