r"""Read and compare lists, sets, ordered pairs and tuples, intervals and their unions.

    truth              order      brackets of an answer
    1, 2, 3            any        none, or any (`1 \text{ and } 2`, `x = 1 or x = 2`, `\pm 1` are lists too)
    \{1, 2\}           any        none, or \{ \}
    (1, 2), (a, b, c)  as given   the same, or none
    [0, 1), [0, 1]     as given   the same: open and closed ends must agree
    [0, 1) \cup (2, 3) any        the same, part by part; x < 2 is (-\infty, 2)
    x = 1, y = 2       by name    none, or ( ) in the order of the truth

Every element must agree, and nothing else may be listed.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gradstore.trainer.sampling.grading.markup import latex, plain


class Element(Protocol):
    """An element of a sequence, or a whole truth."""

    @property
    def kind(self) -> str:
        """Name for messages."""

    def agrees(self, answer: str) -> bool:
        """Whether an answer equals it."""


_MOST = 100
"""Most elements of a truth."""
LONGEST_LIST = 10_000
"""Most elements of an answer that `listed` counts, to tell it from one value."""
_OPEN, _CLOSE = {"(": "(", "[": "[", "\\{": "{", "\\langle": "<"}, {")": ")", "]": "]", "\\}": "}", "\\rangle": ">"}
_TOKEN = re.compile(r"\\(?:begin|end|langle|rangle)(?![A-Za-z])|\\[{}]|\\.|[()\[\]{},;|]", re.DOTALL)
_JOINED = re.compile(
    r"\s*[,;]?\s*(?:\\(?:text|mathrm|mbox|textrm)\s*\{\s*[,;]?\s*(?:and|or|,|;)\s*[,;]?\s*\}|"
    r"(?<![\\A-Za-z])(?:and|or)(?![A-Za-z]))\s*|\s*;\s*"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,]\d)")
_PREFIX = re.compile(
    r"^(?:(?:\\?[A-Za-z]+(?:_\w)?|\([^()=]{1,20}\))\s*(?:=|\\in(?![A-Za-z]))\s*)(?=\(|\[|\\\{|\\langle)"
)
_NAME = re.compile(r"^\s*(\\?[A-Za-z](?:_\w|_\{\w+\})?)\s*=(?!=)")
_BELOW, _ABOVE = {"<": ")", "\\le": "]"}, {">": "(", "\\ge": "["}
_END = r"[^<>,=\\]*(?:\\(?!le\b|ge\b|ne\b)[^<>,=\\]*)*"
_BETWEEN = re.compile(
    rf"(?P<low>{_END})(?P<left><|\\le(?![a-z]))\s*(?P<name>\\?[A-Za-z]+)\s*(?P<right><|\\le(?![a-z]))(?P<high>{_END})"
)
_BEYOND = re.compile(rf"(?P<name>\\?[A-Za-z])\s*(?P<sign>[<>]|\\[lg]e(?![a-z]))(?P<end>{_END})")
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
_BEFORE = re.compile(rf"(?P<end>{_END})(?P<sign>[<>]|\\[lg]e(?![a-z]))\s*(?P<name>\\?[A-Za-z])")


@dataclass(frozen=True, slots=True)
class Listed:
    """Elements with their brackets: "", "()", "{}", "[)" and so on."""

    elements: tuple[Element, ...]
    brackets: str
    names: tuple[str, ...] = ()
    """The elements' names, if all have different ones: x = 1, y = 2."""
    interval: bool = False
    """Two ends, which only the same brackets give: [0, 1), x < 2. (1, 2) can be a point too."""

    @property
    def kind(self) -> str:
        """Name for messages."""
        if self.interval:
            return "interval"
        return {"": "list", "{}": "set"}.get(self.brackets, "ordered pair" if len(self.elements) == 2 else "tuple")

    def agrees(self, answer: str) -> bool:
        """Whether the answer lists the same elements, in brackets that fit."""
        split = listed(answer, most=len(self.elements))
        if split is None and len(self.elements) == 1:
            split = (answer,), ""
        return split is not None and self.agrees_with(*split)

    def agrees_with(self, parts: Sequence[str], brackets: str = "") -> bool:
        """As `agrees`, for an answer in parts, such as one box for each element."""
        if len(parts) != len(self.elements) or not self._fits(brackets):
            return False
        if self.names:
            given = tuple(_name(part) for part in parts)
            if set(given) == set(self.names):
                parts = [parts[given.index(name)] for name in self.names]
            elif any(given):
                return False
        elif self.brackets in ("", "{}"):
            return _matched(self.elements, parts)
        return all(element.agrees(part) for element, part in zip(self.elements, parts, strict=True))

    def _fits(self, brackets: str) -> bool:
        if self.interval:
            return brackets == self.brackets
        if self.brackets == "":
            return brackets in ("", "()", "{}", "[]")
        if self.brackets == "{}":
            return brackets in ("", "{}")
        if self.brackets == "()":
            return brackets in ("", "()", "<>") or (brackets == "[]" and len(self.elements) > 2)
        return brackets in ("", "()", self.brackets)


@dataclass(frozen=True, slots=True)
class Union:
    """A union of intervals and sets."""

    parts: tuple[Element, ...]
    kind: str = "union of intervals"

    def agrees(self, answer: str) -> bool:
        """Whether the answer is the union of the same parts, in any order."""
        parts = _union(latex(answer) or "")
        return len(parts) == len(self.parts) and _matched(self.parts, parts)


def read_listed(text: str, read: Callable[[str], Element | None]) -> Listed | Union | None:
    """A truth that lists elements; None if it lists none, or `read` cannot read one of them."""
    parts = _union(latex(text) or "")
    if len(parts) > 1:
        members = [read_listed(part, read) for part in parts]
        known = tuple(member for member in members if member is not None)
        return Union(known) if len(known) == len(parts) else None
    split = listed(text)
    if split is None or (len(split[0]) == 1 and split[1] != "{}"):
        return None
    elements = [read(part) for part in split[0]]
    known_elements = tuple(element for element in elements if element is not None)
    if len(known_elements) < len(elements):
        return None
    names = tuple(_name(part) for part in split[0])
    distinct = all(names) and len(set(names)) == len(names) and split[1] == ""
    ends = len(elements) == 2 and split[1] in ("()", "[]", "(]", "[)")
    interval = ends and (split[1] != "()" or "\\infty" in text or _interval(latex(text) or "") is not None)
    return Listed(known_elements, split[1], names if distinct else (), interval)


def listed(text: str, most: int = _MOST) -> tuple[tuple[str, ...], str] | None:
    """(the elements of a list, its brackets); None for what lists nothing, or more than `most` elements."""
    written = latex(text)
    if not written:
        return None
    if "\\" not in (plain(text) or "\\"):
        written = plain(text) or ""
    written = _interval(written) or _PREFIX.sub("", written)
    inner, brackets = _bracketed(written)
    inner = _JOINED.sub(";", inner).strip(" ;,")
    if re.search(r",\s|;", inner):
        inner = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), inner)
    parts = _split(inner, most + 1)
    if parts is None or len(parts) > most:
        return None
    parts = [one for part in parts for one in _both_signs(part)]
    if not all(parts) or (len(parts) < 2 and brackets != "{}"):
        return None
    if brackets not in ("", "()", "[]", "{}", "<>") and len(parts) != 2:
        return None
    return tuple(parts), brackets


def _matched(elements: Sequence[Element], parts: Sequence[str]) -> bool:
    """Whether every element agrees with a part of its own."""
    left = list(parts)
    for element in elements:
        place = next((i for i, part in enumerate(left) if element.agrees(part)), None)
        if place is None:
            return False
        left.pop(place)
    return not left


def _split(text: str, most: int) -> list[str] | None:
    """The text cut at commas and semicolons outside all brackets; None if brackets are not closed."""
    parts: list[str] = []
    depth = begin = bars = 0
    for token in _TOKEN.finditer(text):
        what = token[0]
        if what in ("(", "[", "{", "\\{", "\\begin", "\\langle"):
            depth += 1
        elif what in (")", "]", "}", "\\}", "\\end", "\\rangle"):
            depth -= 1
            if depth < 0:
                return None
        elif what == "|":
            bars += 1
        elif what in (",", ";") and depth == 0 and bars % 2 == 0 and len(parts) < most:
            parts.append(text[begin : token.start()].strip())
            begin = token.end()
    return [*parts, text[begin:].strip()] if depth == 0 else None


def _bracketed(text: str) -> tuple[str, str]:
    """(inner text, brackets) if one pair of brackets surrounds the whole text; else (text, "")."""
    begin = next((opening for opening in _OPEN if text.startswith(opening)), None)
    end = next((closing for closing in _CLOSE if text.endswith(closing)), None)
    if begin is None or end is None or len(text) < len(begin) + len(end):
        return text, ""
    inner, depth = text[len(begin) : -len(end)], 0
    for token in _TOKEN.finditer(inner):
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        if depth < 0:
            return text, ""
    return (inner, _OPEN[begin] + _CLOSE[end]) if depth == 0 else (text, "")


def _both_signs(part: str) -> list[str]:
    r"""a \pm b as a + b and a - b; any other element alone."""
    found = re.split(r"\\pm(?![A-Za-z])\s*", part)
    if len(found) != 2:
        return [part]
    before, after = found
    alone = not before.strip() or before.strip()[-1] in "=("
    return [f"{before}{after}" if alone else f"{before}+{after}", f"{before}-{after}"]


def _union(text: str) -> list[str]:
    """The parts of a union."""
    text = re.sub(r"^\\?[A-Za-z]\s*\\in(?![A-Za-z])\s*", "", text)
    parts = re.split(r"\s*(?:\\cup(?![A-Za-z])|(?<=[\])])\s*U\s*(?=[\[(]))\s*", text)
    if len(parts) == 1 and "," not in text and re.search(r"[<>]|\\[lg]e\b", text):
        parts = _JOINED.split(text)
    return [part for part in parts if part.strip()]


def _interval(text: str) -> str | None:
    r"""An inequality in one unknown as an interval: 0 \le x < 1 as [0, 1). None for all else."""
    between = _BETWEEN.fullmatch(text)
    if between and between["low"].strip() and between["high"].strip():
        opening = "(" if between["left"] == "<" else "["
        return f"{opening}{between['low'].strip()}, {between['high'].strip()}{_BELOW[between['right']]}"
    found, sign = _BEYOND.fullmatch(text), ""
    if found:
        sign = found["sign"]
    else:
        found = _BEFORE.fullmatch(text)
        sign = _FLIPPED[found["sign"]] if found else ""
    end = found["end"].strip() if found else ""
    if not end:
        return None
    return f"(-\\infty, {end}{_BELOW[sign]}" if sign in _BELOW else f"{_ABOVE[sign]}{end}, \\infty)"


def _name(part: str) -> str:
    found = _NAME.match(part)
    return found[1] if found else ""
