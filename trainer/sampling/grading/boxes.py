r"""Find the boxes of a text: \boxed{...}, \fbox{...} and \boxed 7.

The last MOST boxes are found in one pass, so that a megabyte of \boxed{ costs no more than a megabyte of prose.
"""

import re
from typing import NamedTuple

MOST = 100
"""Most boxes that are found; earlier ones of a text are ignored."""

_TOKEN = re.compile(
    r"(?P<box>\\(?:boxed|fbox)(?![A-Za-z])\s*(?:(?P<brace>\{)|(?P<bare>[^\s${}\\][^\s${}]*|\\[A-Za-z][^\s$]*)?))"
    r"|\\.|\{+|\}+",
    re.DOTALL,
)


class Box(NamedTuple):
    """A box of a text; `text[start:end]` is all of it."""

    start: int
    end: int
    content: tuple[int, int] | None
    """Begin and end of the content; None if the box is not closed."""


def boxes(text: str) -> list[Box]:
    """The last boxes that contain no other box, in the order of the text. Escaped braces do not count as braces."""
    begin = _last_openings(text)
    if begin is None:
        return []
    found: list[Box] = []
    open_braces: list[tuple[int, int] | None] = []  # for each open brace: (start, content) of a box, None for others
    for token in _TOKEN.finditer(text, begin):
        if token["box"] is not None:
            if token["brace"]:
                open_braces.append((token.start(), token.end()))
            else:
                content = token.span("bare") if token["bare"] else (token.end(), token.end())
                found.append(Box(token.start(), token.end(), content))
        elif token[0][0] == "{":
            open_braces += [None] * len(token[0])
        elif token[0][0] == "}":
            for place in range(token.start(), min(token.end(), token.start() + len(open_braces))):
                opened = open_braces.pop()
                if opened is not None:
                    found.append(Box(opened[0], place + 1, (opened[1], place)))
    found += [Box(opened[0], len(text), None) for opened in open_braces if opened is not None]
    found.sort()
    # A box whose successor begins before it ends contains it.
    ends = [*(box.start for box in found[1:]), len(text)]
    return [box for box, after in zip(found, ends, strict=True) if box.end <= after]


def last_box(text: str) -> str | None:
    """Content of the box that begins last; None if there is no box, or that one is not closed.

    This is the convention of Hendrycks et al. (MATH, `last_boxed_only_string`).
    """
    found = boxes(text)
    if not found or found[-1].content is None:
        return None
    begin, end = found[-1].content
    return text[begin:end]


def _last_openings(text: str) -> int | None:
    """Where the first of the last MOST boxes begins; None if there is none."""
    begin = None
    marks = [mark for mark in ("\\boxed", "\\fbox") if mark in text]
    for _ in range(MOST if marks else 0):
        place = max(text.rfind(mark, 0, begin) for mark in marks)
        if place < 0:
            break
        begin = place
    return begin
