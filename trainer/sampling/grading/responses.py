r"""Find the final answer in a response.

1. The last box (Hendrycks et al.: MATH). Boxes with nothing between them but "and", "or" and punctuation are one answer in
   several parts. A last box that is empty or not closed is no answer: the response was cut, or did not say.
2. Without a box: the text after the last "answer is", "answer:" (Minerva, MMLU-Pro) or #### (GSM8K), to the end of its line.
3. Without that: the last line; for values the last expression of mathematics or number (as in math-verify, Qwen2.5-Math).

Only the end of a long response is searched in 2 and 3, and an answer is short: time grows with the response's length alone.
"""

import re
from dataclasses import dataclass

from gradstore.trainer.sampling.grading.boxes import Box, boxes
from gradstore.trainer.sampling.grading.quantities import NUMBER, read_quantity

LONGEST = 2000
"""Characters of the longest answer that is compared, beyond the truth's own length."""
_WINDOW = 4000
"""Characters at the end of a response, or after its last marker, that are searched for an answer without a box."""

_BETWEEN = re.compile(
    r"(?:\s|[$.,;:&/|*]|\\[()\[\],;:!\\ ]|\\q?quad(?![A-Za-z])|\\(?:text|mathrm|mbox)\s*\{\s*[,;]?\s*(?:and|or)?\s*[,;]?\s*\}|"
    r"\b(?:and|or|either|also)\b)*",
    re.IGNORECASE,
)
_FARTHEST = 60
"""Most characters between two boxes of one answer."""
_MARKER = re.compile(r"\banswer\b\s*(?:is\b\s*:?|:|=)\s*|####\s*", re.IGNORECASE)
_SPAN = re.compile(r"\$\$(.+?)\$\$|(?<![\\\d])\$([^$\n]+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
_TOKEN = re.compile(rf"(?<![\w.^{{\\(/+*-])(?:{NUMBER})(?:\s*\\?%|\s*percent\b)?(?![\w^{{\\]|\.\d|\s*[*/^+]\s*[\w\\])")
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}(?![A-Za-z}])")
_JOIN = re.compile(r"\s*(?:[,;&]|,?\s*\b(?:and|or)\b|/)?\s*(?:\band\b|\bor\b)?\s*\$?", re.IGNORECASE)
_NO_PROSE = frozenset("sin cos tan cot sec csc log ln exp sqrt and or pi mod gcd lcm max min".split())
_NOISE = " \t\r\n.*_`"


@dataclass(frozen=True, slots=True)
class Answer:
    """The final answer of a response."""

    parts: tuple[str, ...]
    """One text; several if the response gave several side by side."""
    all_boxes: tuple[str, ...] = ()
    """The contents of all boxes of the response, for truths that are lists."""


def final_answer(response: str, *, values: bool, longest: int = LONGEST) -> Answer | None:
    """The response's final answer; None if it has none, or one of more than `longest` characters.

    values: whether the answer is a number or mathematics, which can be found within a line of prose.
    """
    found = boxes(response)
    if found:
        return _boxed(response, found, longest)
    markers = list(_MARKER.finditer(response))
    if markers:
        begin = markers[-1].end()
        text = response[begin : begin + _WINDOW]
    else:
        text = response[-_WINDOW:]
    parts = _values(text, first=bool(markers)) if values else _line(text, first=bool(markers))
    parts = tuple(part.strip() for part in parts)
    return Answer(parts) if parts and all(parts) and max(map(len, parts)) <= longest else None


def _boxed(response: str, found: list[Box], longest: int) -> Answer | None:
    together = [found[-1]]
    for box in reversed(found[:-1]):
        gap = response[box.end : together[-1].start]
        if len(gap) > _FARTHEST or not _BETWEEN.fullmatch(gap):
            break
        together.append(box)
    contents = _contents(response, together[::-1], longest)
    if contents is None:
        return None
    return Answer(contents, _contents(response, found, longest) or ())


def _contents(response: str, found: list[Box], longest: int) -> tuple[str, ...] | None:
    """The boxes' contents; None if one is not closed, empty or too long."""
    contents = []
    for box in found[:_WINDOW]:
        if box.content is None or box.content[1] - box.content[0] > longest:
            return None
        contents.append(response[box.content[0] : box.content[1]].strip())
    return tuple(contents) if all(contents) else None


def _line(text: str, *, first: bool) -> tuple[str, ...]:
    """The first or the last line with text."""
    lines = [line for line in text.splitlines() if line.strip()]
    return (lines[0 if first else -1],) if lines else ()


def _values(text: str, *, first: bool) -> tuple[str, ...]:
    """The value, or the values side by side, that a text names first or last."""
    spans = [found for found in _SPAN.finditer(text) if not _prose(found[0])]
    lines = [line.strip(_NOISE) for line in text.splitlines() if line.strip(_NOISE)]
    if first and lines:
        begin = lines[0]
        inside = [found for found in spans if text.find(found[0]) <= text.find(begin) + len(begin)]
        if not inside:
            return _within(_sentence(begin), first=True)
        return _side_by_side(text, inside, first=True)
    last = lines[-1] if lines else ""
    if spans and (spans[-1].end() > text.rfind(last) or not _within(last, first=False)):
        return _side_by_side(text, spans, first=False)
    for line in reversed(lines):
        found = _within(line, first=False)
        if found:
            return found
    return ()


def _within(line: str, *, first: bool) -> tuple[str, ...]:
    """The values in a line without delimiters of mathematics: all of it if it has no prose, else its numbers."""
    if not _prose(line) or read_quantity(line) is not None:
        return (line,)
    tokens = list(_TOKEN.finditer(line))
    if "\\" in line and not first:
        tail = line[list(_PROSE.finditer(line))[-1].end() :].strip(_NOISE)
        if "\\" in tail:
            return (tail,)
    return _side_by_side(line, tokens, first=first) if tokens else ()


def _side_by_side(text: str, found: list[re.Match[str]], *, first: bool) -> tuple[str, ...]:
    """The first or last of the matches, with those that only "and", "or" and commas separate from it."""
    ordered = found if first else found[::-1]
    together = [ordered[0]]
    for match in ordered[1:]:
        before, after = (together[-1], match) if first else (match, together[-1])
        if not _JOIN.fullmatch(text[before.end() : after.start()]):
            break
        together.append(match)
    together = together if first else together[::-1]
    return tuple(
        next((group for group in match.groups()[:4] if group), match[0]) if match.re is _SPAN else match[0]
        for match in together
    )


def _sentence(line: str) -> str:
    """The line up to the end of its first sentence."""
    return re.split(r"[.;!?](?:\s|$)", line, maxsplit=1)[0]


def _prose(text: str) -> bool:
    return any(word.lower() not in _NO_PROSE for word in _PROSE.findall(text))
