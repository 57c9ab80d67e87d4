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

_INNER = re.compile(r"\\(?:boxed|fbox)\s*\{")


class Box(NamedTuple):
    """A box of a text; `text[start:end]` is all of it."""

    start: int
    end: int
    content: tuple[int, int] | None
    """Begin and end of the content; None if the box is not closed."""


def boxes(text: str) -> list[Box]:
    r"""The last boxes of a text, in its order, without those inside another. \{ and \} do not count as braces."""
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
                bare = token.span("bare") if token["bare"] else (token.end(), token.end())
                found.append(Box(token.start(), token.end(), bare))
        elif token[0][0] == "{":
            open_braces += [None] * len(token[0])
        elif token[0][0] == "}":
            for place in range(token.start(), min(token.end(), token.start() + len(open_braces))):
                opened = open_braces.pop()
                if opened is not None:
                    found.append(Box(opened[0], place + 1, (opened[1], place)))
    outer: list[Box] = []
    for box in sorted(found):
        if not outer or box.start >= outer[-1].end:
            outer.append(box)
    cut = next((opened for opened in reversed(open_braces) if opened is not None), None)
    if cut is not None and (not outer or cut[0] > outer[-1].start):
        outer.append(Box(cut[0], len(text), None))
    return outer


def last_box(text: str) -> str | None:
    """Content of the last box; None if there is no box, or the last one is not closed.

    This is the convention of Hendrycks et al. (MATH, `last_boxed_only_string`), but for a box inside another.
    """
    found = boxes(text)
    return content(text, found[-1]) if found else None


def content(text: str, box: Box) -> str | None:
    r"""What a box contains, without the boxes inside it: \boxed{\boxed{5}, 6} contains {5}, 6."""
    if box.content is None:
        return None
    begin, end = box.content
    return _INNER.sub("{", text[begin:end]).strip()


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
