"""Texts for people: the start of a problem's text, a layer's short name, numbers of bytes."""

from decimal import ROUND_HALF_UP, Decimal


def first_words(text: str, n: int = 80) -> str:
    """The start of a text on one line, at most n characters; an ellipsis shows a cut."""
    line = " ".join(text.split())
    return line if len(line) <= n else line[: n - 1] + "…"


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
