r"""Read and compare numbers: plain, with a unit or currency, in percent.

    read as numbers     1,234   -0.5   .5   1e3   2 \times 10^{3}   3/4   \frac34   1\frac{1}{2}   0.\overline{3}   073
    with a unit         \$5   5 dollars   5\text{ cm}^2   90^\circ   50\%   \$1.5 million   x = 3

Two numbers agree if they are equal. If one is written as a decimal, six decimals must agree after rounding, as in
math-verify, and the difference must be at most 1e-4 of the number, as in Qwen2.5-Math's `math_equal`: else 0.0000004
would equal 0. A percentage agrees with its number and with its value: 50% with 50 (MATH drops the sign) and with 0.5,
not with 5000.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from gradstore.trainer.sampling.grading.markup import DOLLAR, plain
from gradstore.trainer.sampling.grading.units import CURRENCIES, MULTIPLES, read_unit

PLACES = 6
"""Decimals that must agree."""
CLOSE = Fraction(1, 10_000)
"""Largest relative difference of two decimals."""

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|[1-9]\d{0,2}(?: \d{3})+(?![\d/]| ?\d)|\d+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.(?!\.)\d*)?|\.\d+)(?:\\overline\s*\{{\d+\}})?"
_EXPONENT = (
    r"(?:[eE](?P<e1>[+-]?\d{1,3})(?!\d)|"
    r"\s*(?:\\times|\\cdot|[x*])\s*10\s*(?:\^|\*\*)\s*(?:\{\s*(?P<e2>[+-]?\d{1,3})\s*\}|(?P<e3>[+-]?\d{1,3})(?!\d)))"
)
_MONEY = "[" + "".join(CURRENCIES) + "]"
NUMBER = (
    rf"(?P<sign>[+-]?)\s*(?P<money>{_MONEY})?\s*(?P<sign2>(?:(?<=.)[+-])?)\s*(?:"
    r"(?:(?P<whole>\d+)\s*)?\\frac\s*(?:\{\s*(?P<top>[+-]?\s*"
    rf"{_DECIMAL})\s*\}}|(?P<top1>\d))\s*(?:\{{\s*(?P<bottom>[+-]?\s*{_DECIMAL})\s*\}}|(?P<bottom1>\d))|"
    r"(?P<mixed>\d+)(?:\s+|-)(?P<mixed_top>\d+)\s*/\s*(?P<mixed_bottom>\d+)|"
    rf"(?P<number>{_DECIMAL})(?:{_EXPONENT}|\s*/\s*(?P<under>{_DECIMAL}))?)"
)
"""Pattern of a number, in the form of `markup.plain`."""

_NUMBER = re.compile(NUMBER)
_NAME = re.compile(
    r"(?P<name>\\?[A-Za-z]+(?:_(?:\w|\{\w+\}))?'*(?:\s*\(\s*\\?[\w,\s]+\))?|[A-Za-z][A-Za-z ]{1,40})"
    r"\s*(?<![<>!])=(?!=)\s*"
)
_MULTIPLE = re.compile(rf"\s*\b({'|'.join(MULTIPLES)})\b\s*", re.IGNORECASE)
_OVERLINE = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}")


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number, exact, with its unit and the name it is given to ("x = 3")."""

    value: Fraction
    decimal: bool
    """Written with a decimal point or an exponent: compared with rounding."""
    unit: str
    """Canonical unit of measure, "%" or ""."""
    name: str
    written: str
    """The number alone, for math-verify."""

    @property
    def kind(self) -> str:
        """Name for messages."""
        return "number with a unit" if self.unit else "number"

    def same(self, other: "Quantity") -> bool:
        """Whether two quantities agree."""
        if self.unit and other.unit and self.unit != other.unit:
            return False
        if self.name and other.name and self.name != other.name and len(self.name) == len(other.name) == 1:
            return False
        inexact = self.decimal or other.decimal
        if equal(self.value, other.value, inexact=inexact):
            return True
        if (self.unit == "%") == (other.unit == "%"):
            return False
        mine, others = (one.value / 100 if one.unit == "%" else one.value for one in (self, other))
        return equal(mine, others, inexact=inexact)


def equal(one: Fraction, other: Fraction, *, inexact: bool) -> bool:
    """Whether two numbers are equal; `inexact`: up to rounding to PLACES decimals, and closer than CLOSE."""
    if one == other:
        return True
    if not inexact or abs(one - other) > CLOSE * max(abs(one), abs(other)):
        return False
    return round(one, PLACES) == round(other, PLACES)


def read_quantity(text: str) -> Quantity | None:
    """The number that a whole text is, with unit and name; None if it is anything else."""
    written = plain(text)
    if not written:
        return None
    name = _NAME.match(written)
    rest = written[name.end() :] if name else written
    if len(rest) > 2 and rest[0] == "(" and rest[-1] == ")" and rest.count("(") == 1:
        rest = rest[1:-1].strip()
    found = _NUMBER.match(rest)
    if found is None:
        return None
    value = _value(found)
    if value is None:
        return None
    after = rest[found.end() :]
    multiple = _MULTIPLE.match(after)
    if multiple:
        value, after = value * MULTIPLES[multiple[1].lower()], " " + after[multiple.end() :]
    unit = read_unit(after.rstrip())
    if unit is None:
        return None
    money = CURRENCIES[found["money"]] if found["money"] else ""
    if money and unit not in ("", money) and not unit.startswith("/"):
        return None  # $5% and $5 km are no amounts
    decimal = "." in found[0] or any(found[e] for e in ("e1", "e2", "e3"))
    number = str(value) if multiple else found[0].replace(DOLLAR, "").replace(",", "")
    return Quantity(value, decimal, money or unit, name["name"].strip() if name else "", number)


def _value(found: re.Match[str]) -> Fraction | None:
    """The value of a match of NUMBER; None if it has none (division by zero, 4,300 digits, 1\\frac{3}{2})."""
    try:
        if found["number"]:
            value = _decimal(found["number"])
            exponent = found["e1"] or found["e2"] or found["e3"]
            if exponent:
                value *= Fraction(10) ** int(exponent)
            if found["under"]:
                value /= _decimal(found["under"])
        elif found["mixed"]:
            part = Fraction(int(found["mixed_top"]), int(found["mixed_bottom"]))
            if part >= 1:
                return None
            value = int(found["mixed"]) + part
        else:
            value = _decimal(found["top"] or found["top1"]) / _decimal(found["bottom"] or found["bottom1"])
            if found["whole"]:
                if not 0 <= value < 1:
                    return None
                value += int(found["whole"])
    except (ValueError, ZeroDivisionError):
        return None
    return -value if (found["sign"] == "-") != (found["sign2"] == "-") else value


def _decimal(text: str) -> Fraction:
    """A decimal number's exact value, with thousands separators and a repeating part."""
    text = text.replace(",", "").replace(" ", "")
    repeating = _OVERLINE.fullmatch(text.lstrip("+-"))
    if repeating is None:
        return Fraction(text)
    whole, fixed, repeated = repeating.groups()
    scale = 10 ** len(fixed)
    value = Fraction(int((whole or "0") + fixed), scale) + Fraction(int(repeated), (10 ** len(repeated) - 1) * scale)
    return -value if text.startswith("-") else value
