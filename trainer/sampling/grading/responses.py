r"""Find the final answer in a response.

1. The last box (Hendrycks et al.: MATH). Boxes with nothing between them but "and", "or" and punctuation are one answer
   in several parts. A last box that is empty or not closed is no answer: the response was cut, or did not say.
2. Without a box: the text after the last "answer is", "answer:" (Minerva, MMLU-Pro) or #### (GSM8K), to the end of its
   sentence; for values the first one in it.
3. Without that: the last line; for values the last one of the text (as in math-verify and Qwen2.5-Math).

Values side by side, such as "5 or 6" and "(5, 6)", are one answer. Only the end of a long response is searched in 2 and
3, and an answer is short: so time grows with the response's length alone.
"""

import re
from dataclasses import dataclass

from gradstore.trainer.sampling.grading.boxes import Box, boxes, content
from gradstore.trainer.sampling.grading.quantities import NUMBER, read_quantity
from gradstore.trainer.sampling.grading.units import read_unit

LONGEST = 2000
"""Characters of the longest answer that is compared, beyond the truth's own length."""
_TAIL, _WINDOW = 20_000, 2_000
"""Characters at the end of a response that are searched for a marker; and after it, or at the end, for a value."""

_BETWEEN = re.compile(
    r"(?:\s|[$.,;:&/|*]|\\[()\[\],;:!\\ ]|\\q?quad(?![A-Za-z])|"
    r"\\(?:text|mathrm|mbox)\s*\{\s*[,;]?\s*(?:and|or)?\s*[,;]?\s*\}|\b(?:and|or|either|also)\b)*",
    re.IGNORECASE,
)
_FARTHEST = 60
"""Most characters between two boxes of one answer."""
_MARKER = re.compile(r"\banswer\b\s*(?:is\b\s*:?|:|=)\s*|####\s*", re.IGNORECASE)
_SPAN = re.compile(
    r"\$\$(?P<display>(?:[^$\\]|\\.)+)\$\$|(?<![\\\d])\$(?P<inline>(?:[^$\n\\]|\\.)+)\$|"
    r"\\\[(?P<bracket>(?:[^\\]|\\(?![\[\]]))+)\\\]|\\\((?P<round>(?:[^\\]|\\(?![()]))+)\\\)",
    re.DOTALL,
)
_GROUP = r"(?P<group>[(\[][^()\[\]\n]{1,80},[^()\[\]\n]{1,80}[)\]])"
_TOKEN = re.compile(
    rf"{_GROUP}|(?<![\w.^{{\\(/+*-])(?:{NUMBER})(?:\s*\\?%|\s*percent\b)?(?![\w^{{\\]|\.\d|\s*[*/^+]\s*[\w\\])"
)
_UNIT = re.compile(r"\s?[A-Za-z]+(?:\s?/\s?[A-Za-z]+|\s+per\s+[A-Za-z]+)?(?:\^\{?\d\}?)?")
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}(?![A-Za-z}])")
_WRAPPED = re.compile(r"\\(?:text\w*|mathrm|mbox|operatorname)\s*\{[^{}]*\}")
_SMALL_WORDS = frozenset(["to", "of", "in", "is", "at", "by", "on", "an", "as", "if", "it", "we", "so"])
_CLOSING = re.compile(r"\.?\s*I hope it is correct.*", re.IGNORECASE | re.DOTALL)
_JOIN = re.compile(r"\s*\$?\s*(?:[,;&/]|,?\s*\b(?:and|or)\b)?\s*\$?\s*", re.IGNORECASE)
_NO_PROSE = frozenset(["sin", "cos", "tan", "cot", "log", "ln", "exp", "sqrt", "and", "or", "pi", "mod"])
_NOISE = " \t\r\n.,;:*_`"
_TAG = re.compile(r"</?[A-Za-z_]+>|<\|[^<>|]*\|>")


@dataclass(frozen=True, slots=True)
class Answer:
    """The final answer of a response."""

    parts: tuple[str, ...]
    """One text; several if the response gave several side by side."""
    all_boxes: tuple[str, ...] = ()
    """The contents of all boxes of the response, for truths that are lists."""
    before: str = ""
    """The line before, where the answer is the last line: a response may list all options."""


def final_answer(response: str, *, values: bool, longest: int = LONGEST) -> Answer | None:
    """The response's final answer; None if it has none, or one of more than `longest` characters.

    values: whether the answer is a number or mathematics, which can be found within a line of prose.
    """
    found = boxes(response)
    if found:
        return _boxed(response, found, longest)
    tail = _TAG.sub(" ", response[-_TAIL:])
    markers = list(_MARKER.finditer(tail))
    text = _CLOSING.sub("", tail[markers[-1].end() :][:_WINDOW] if markers else tail[-_WINDOW:])
    if values:
        parts, before = _values(text, first=bool(markers)), ""
    else:
        parts, before = _line(text, first=bool(markers))
    parts = tuple(part.strip() for part in parts)
    return Answer(parts, before=before) if parts and all(parts) and max(map(len, parts)) <= longest else None


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
    for box in found:
        inside = content(response, box) if box.end - box.start <= longest else None
        if not inside:
            return None
        contents.append(inside)
    return tuple(contents)


def _line(text: str, *, first: bool) -> tuple[tuple[str, ...], str]:
    """(the first or the last line with text, the line before the last)."""
    lines = [line for line in text.splitlines() if line.strip()]
    if first or len(lines) < 2:
        return tuple(lines[:1]), ""
    return (lines[-1],), lines[-2]


def _values(text: str, *, first: bool) -> tuple[str, ...]:
    """The value, or the values side by side, that a text names first or last."""
    text = re.sub(r"[^\S\n]+", " ", text)
    lines = [found for found in re.finditer(r"[^\n\r]+", text) if found[0].strip(_NOISE)]
    if not lines:
        return ()
    spans = [found for found in _SPAN.finditer(text) if not _money(_inside(found))]
    if first:
        spans = [found for found in spans if found.start() < lines[0].end()]
        return _side_by_side(text, spans, first=True) if spans else _within(_sentence(lines[0][0]), first=True)
    for line in reversed(lines):
        if spans and spans[-1].end() > line.start():
            return _side_by_side(text, spans, first=False)
        found = _within(line[0].strip(_NOISE), first=False)
        if found:
            return found
    return ()


def _within(line: str, *, first: bool) -> tuple[str, ...]:
    """The values in a line without delimiters of mathematics.

    All of the line if it has no prose; else what stands before or after all prose; else its first or last number.
    """
    if not _prose(line) or read_quantity(line) is not None:
        return (line,)
    words = [word for word in _PROSE.finditer(line) if _is_prose(word[0])]
    edge = (line[: words[0].start()] if first else line[words[-1].end() :]).strip(_NOISE)
    if re.search(r"[0-9A-Za-z]", edge) and len(re.findall(r"[(\[{]", edge)) == len(re.findall(r"[)\]}]", edge)):
        return (edge,)
    tokens = list(_TOKEN.finditer(line))
    found = _side_by_side(line, tokens, first=first) if tokens else ()
    if len(found) == 1:
        token = tokens[0 if first else -1]
        unit = _UNIT.match(line, token.end())
        measured = unit is not None and unit[0].strip() not in _SMALL_WORDS and read_unit(unit[0])
        return (token[0] + unit[0],) if unit and measured else found
    return found


def _side_by_side(text: str, found: list[re.Match[str]], *, first: bool) -> tuple[str, ...]:
    """The first or last of the matches, with those that only "and", "or" and commas separate from it."""
    ordered = found if first else found[::-1]
    together = [ordered[0]]
    for match in ordered[1:]:
        before, after = (together[-1], match) if first else (match, together[-1])
        if not _JOIN.fullmatch(text[before.end() : after.start()]):
            break
        together.append(match)
    return tuple(_inside(match) for match in (together if first else together[::-1]))


def _inside(found: re.Match[str]) -> str:
    """The text of a match, without delimiters of mathematics."""
    if found.re is not _SPAN:
        return found[0]
    return next(found[name] for name in ("display", "inline", "bracket", "round") if found[name] is not None)


def _sentence(line: str) -> str:
    """The line up to the end of its first sentence."""
    return re.split(r"[.;!?](?:\s|$)", line, maxsplit=1)[0]


def _prose(text: str) -> bool:
    return any(_is_prose(word) for word in _PROSE.findall(text))


def _money(span: str) -> bool:
    """Whether a text between dollars is prose between two amounts: "$5 and earns $7"."""
    words = [word for word in _PROSE.findall(_WRAPPED.sub(" ", span)) if word.islower() and _is_prose(word)]
    return (
        any(len(word) > 3 or word in _SMALL_WORDS for word in words) or re.search(r"\b(?:and|or)\s*$", span) is not None
    )


def _is_prose(word: str) -> bool:
    return word.lower() not in _NO_PROSE
