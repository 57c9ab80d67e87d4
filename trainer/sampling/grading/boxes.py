r"""Find the boxes of a text: \boxed{...}, \fbox{...} and \boxed 7.

One pass over the text, whatever its braces, so that a megabyte of \boxed{ costs a megabyte's time.
"""

import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r"(?P<box>\\(?:boxed|fbox)(?![A-Za-z])\s*(?:(?P<brace>\{)|(?P<bare>[^\s${}\\][^\s${}]*|\\[A-Za-z][^\s$]*)?))"
    r"|\\.|[{}]",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a text; `text[start:end]` is all of it."""

    start: int
    end: int
    content: tuple[int, int] | None
    """Begin and end of the content; None if the box is not closed."""


def boxes(text: str) -> list[Box]:
    """The boxes that contain no other box, in the order of the text. Escaped braces do not count as braces."""
    if "\\boxed" not in text and "\\fbox" not in text:
        return []
    found: list[Box] = []
    open_braces: list[tuple[int, int] | None] = []  # for each open brace: (start, content) of a box, None for others
    for token in _TOKEN.finditer(text):
        if token["box"] is not None:
            if token["brace"]:
                open_braces.append((token.start(), token.end()))
            else:
                content = token.span("bare") if token["bare"] else (token.end(), token.end())
                found.append(Box(token.start(), token.end(), content))
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces:
            opened = open_braces.pop()
            if opened is not None:
                found.append(Box(opened[0], token.end(), (opened[1], token.start())))
    found += [Box(opened[0], len(text), None) for opened in open_braces if opened is not None]
    return _innermost(found)


def last_box(text: str) -> str | None:
    """Content of the box that begins last; None if there is no box, or that one is not closed.

    This is the convention of Hendrycks et al. (MATH, `last_boxed_only_string`).
    """
    found = boxes(text)
    if not found or found[-1].content is None:
        return None
    begin, end = found[-1].content
    return text[begin:end]


def _innermost(found: list[Box]) -> list[Box]:
    """Without the boxes that contain another: those whose successor begins before they end."""
    found.sort(key=lambda box: box.start)
    return [
        box for box, after in zip(found, [*found[1:], None], strict=True) if after is None or after.start >= box.end
    ]
