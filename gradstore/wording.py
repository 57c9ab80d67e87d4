"""Texts for people: without control characters, the start of a problem's text, a layer's short name, bytes."""

import re
from decimal import ROUND_HALF_UP, Decimal

_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line ends, those that turn the direction of text, and halves of surrogate pairs."""


def shown(text: object, most: int | None = None) -> str:
    """A text for a line of a terminal: characters that would control it are escaped, other letters stay as they are.

    most: length from which the middle is left out.
    """
    line = _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))
    return line if most is None or len(line) <= most else f"{line[: most - 500]} … {line[-500:]}"


def json_shown(text: str) -> str:
    """A JSON document in which the same characters are escaped as JSON does; it says the same. Line ends stay."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


def first_words(text: str, n: int = 80) -> str:
    """The start of a text on one line, at most n characters; an ellipsis shows a cut."""
    line = " ".join(text.split())
    return line if len(line) <= n else line[: n - 1] + "…"


def counted(n: int, noun: str) -> str:
    """`1 problem`, `2 problems`."""
    return f"{n} {noun}{'s' * (n != 1)}"


def short_layer(name: str) -> str:
    """A layer's number and last name: `model.layers.3.self_attn.q_proj` is 3.q_proj."""
    parts = [part for part in name.split(".") if part != "default"]
    numbers = [part for part in parts if part.isdigit()]
    return ".".join([*numbers[:1], parts[-1]])


def size(n_bytes: float) -> str:
    """A number of bytes with a unit, such as `1.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{fixed(n_bytes, 0 if unit == 'B' else 1)} {unit}"
        n_bytes /= 1000
    return f"{fixed(n_bytes, 1)} TB"


def fixed(value: float, digits: int) -> str:
    """Format with `digits` decimals, rounding halves away from zero like JavaScript's toFixed (unlike Python)."""
    return f"{Decimal(float(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP):f}"
