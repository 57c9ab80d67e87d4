r"""Read what stands after a number: a unit, a counted noun, percent.

Published graders drop units (Minerva's list of removed expressions; MATH's `remove_right_units`). Here a unit may be
left out on either side, but two units of measure that both are written must agree: 5 km is not 5 miles. Words that are
no unit of measure (students, ways) are dropped as there.
"""

import re

_MEASURES = {
    "%": "percent percents percentage pct",
    "dollar": "dollars usd bucks buck", "cent": "cents ¢", "euro": "euros eur", "pound sterling": "gbp quid",
    "yen": "jpy", "rupee": "rupees rs inr",
    "mm": "millimeter millimeters millimetre millimetres", "cm": "centimeter centimeters centimetre centimetres cms",
    "m": "meter meters metre metres", "km": "kilometer kilometers kilometre kilometres kms",
    "inch": "in inches", "foot": "ft feet", "yard": "yd yards yds", "mile": "mi miles",
    "mg": "milligram milligrams", "g": "gram grams gm gms", "kg": "kilogram kilograms kgs kilo kilos",
    "pound": "lb lbs pounds", "ounce": "oz ounces", "ton": "tons tonne tonnes",
    "ml": "milliliter milliliters millilitre millilitres", "liter": "liters litre litres",
    "gallon": "gal gallons", "quart": "qt quarts", "pint": "pints", "cup": "cups",
    "millisecond": "ms milliseconds", "second": "sec secs seconds", "minute": "min mins minutes",
    "hour": "hr hrs hours", "day": "days", "week": "weeks wk wks", "month": "months", "year": "years yr yrs",
    "degree": "degrees deg", "radian": "radians rad",
    "mile/hour": "mph", "km/hour": "kph kmph kmh",
    "hz": "hertz", "newton": "newtons", "joule": "joules", "watt": "watts", "volt": "volts",
    "ampere": "amp amps amperes", "ohm": "ohms", "kelvin": "", "celsius": "", "fahrenheit": "",
    "am": "a.m", "pm": "p.m",
}  # fmt: skip
_LETTERS = {
    "m": "m", "g": "g", "s": "second", "h": "hour", "L": "liter", "l": "liter", "N": "newton", "J": "joule",
    "W": "watt", "V": "volt", "A": "ampere", "K": "kelvin", "C": "celsius", "F": "fahrenheit",
}  # fmt: skip
"""Units of one letter, whose case matters: 2 N is a force, 2 n a product."""
_NAMES = {alias: name for name, aliases in _MEASURES.items() for alias in (name, *aliases.split())}
CURRENCIES = {"\uff04": "dollar", "$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen", "₹": "rupee"}
MULTIPLES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_OTHER_WORDS = (
    "or and not nor but if when then than to of is are was be equals equal except plus minus times divided over mod "
    "more less half dozen either neither both no none unknown undefined where because since with without between from "
    "modulo sin cos tan cot sec csc log ln lg exp sqrt pi max min gcd lcm lim arcsin arccos arctan infinity true false"
)
_NEVER = frozenset(_OTHER_WORDS.split())
"""Words that change what is said about the number, and names of functions: text with one of them is no unit."""
_ORDINALS = frozenset({"st", "nd", "rd", "th"})
_TOKEN = re.compile(
    r"\s*(?:(?P<slash>/|\bper\b)|(?P<circle>\^?\s*\\circ(?![A-Za-z]))|(?P<percent>%)|"
    r"\^?\s*\{?\s*(?P<word>[A-Za-z](?:\.[A-Za-z](?![A-Za-z]))*[A-Za-z]*|¢)\.?\s*\}?"
    r"(?:\s*\^\s*\{?\s*(?P<power>-?\d)\s*\}?)?)"
)
_LONGEST = 80


def read_unit(text: str) -> str | None:
    r"""The unit that a text after a number names: "cm^2" for "square centimeters", "" for a counted noun or no text.

    None if the text is no unit: "or 6", "x", "\pi".
    """
    if not text:
        return ""
    if len(text) > _LONGEST:
        return None
    parts: list[str] = []
    measured, place, squared = True, 0, ""
    while place < len(text):
        token = _TOKEN.match(text, place)
        if token is None:
            return "".join(parts) if not text[place:].strip() and measured and parts else None
        if token["slash"]:
            parts.append("/")
        elif token["circle"]:
            parts.append("degree")
        elif token["percent"]:
            parts.append("%")
        else:
            word = token["word"].rstrip(".")
            word = _LETTERS.get(word, word.lower()) if len(word) == 1 else word.lower()
            if not _may_follow(token["word"], word, glued=place == 0 and text[0].isalpha()):
                return None
            if word in ("square", "squared", "sq", "cubic", "cubed", "cu"):
                power = "^2" if word.startswith("sq") else "^3"
                squared, parts = ("", [*parts, power]) if word.endswith("ed") else (power, parts)
            else:
                measured = measured and word in _NAMES
                power = f"^{token['power']}" if token["power"] else ""
                parts.append(_NAMES.get(word, word) + (squared or power))
                squared = ""
        place = token.end()
    unit = "".join(part if part[0] in "/^" else f" {part}" for part in parts).replace("/ ", "/").strip()
    return _DEGREES.get(unit, unit) if measured and not squared else ""


_DEGREES = {"degree celsius": "celsius", "degree fahrenheit": "fahrenheit"}


def _may_follow(written: str, word: str, *, glued: bool) -> bool:
    """Whether a word can name a unit or what is counted; `glued`: no space is between it and the number."""
    if word in _NEVER or word in MULTIPLES:
        return False
    if len(written) == 1:  # 5m is a product, 5 m a length
        return written in _LETTERS and not glued
    return word in _NAMES or word in _ORDINALS or (len(word) > 2 and not glued)
