r"""Write an answer's LaTeX and Unicode in one way, so that each kind of answer has one form to read.

`latex` keeps LaTeX, for math-verify: without delimiters, spacing and synonyms of commands. `plain` also opens
\text{...} and its relatives, for numbers with units, lists and words. The replacements follow Hendrycks et al. (MATH,
`_strip_string`) and Lewkowycz et al. (Minerva, appendix D.1, `normalize_final_answer`).
"""

import functools
import re

DOLLAR = "\uff04"
"""Stands for a dollar that is money. A plain one is a delimiter of mathematics."""

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2007\u2008\u2009\u200a\u202f\u3000", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\ufffd", None),
        "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∞": r"\infty ", "π": r"\pi ", "∪": r"\cup ",
        "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∈": r"\in ", "∅": r"\emptyset ",
        "°": r"^\circ ", "²": "^2", "³": "^3", "\uff05": "%", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "“": '"', "”": '"', "’": "'", "\uff0c": ",",
    }
)  # fmt: skip
_SYNONYMS = {
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\degree": "^\\circ ", "\\degrees": "^\\circ ",
    "\\leq": "\\le", "\\leqslant": "\\le", "\\geq": "\\ge", "\\geqslant": "\\ge", "\\neq": "\\ne", "\\lt": "<",
    "\\gt": ">", "\\lbrace": "\\{", "\\rbrace": "\\}", "\\lbrack": "[", "\\rbrack": "]", "\\infin": "\\infty",
    "\\varnothing": "\\emptyset", "\\dollar": DOLLAR, "\\mathdollar": DOLLAR,
    "\\textdollar": DOLLAR, "\\euro": "€", "\\pounds": "£",
    "\\$": DOLLAR, "\\%": "%", "\\#": "#", "\\&": "&", "\\_": "_", "\\!": "", "\\/": "",
    "\\(": " ", "\\)": " ", "\\[": " ", "\\]": " ", "\\lvert": "|", "\\rvert": "|", "\\vert": "|",
    "\\thicksim": "\\sim", "\\thinspace": " ",
    **dict.fromkeys(("\\,", "\\;", "\\:", "\\ ", "\\>", "\\quad", "\\qquad", "\\enspace", "\\space"), " "),
    **dict.fromkeys(("\\displaystyle", "\\textstyle", "\\limits", "\\hfill", "\\bf", "\\rm", "\\it", "\\tt"), " "),
    **dict.fromkeys(("\\left", "\\right", "\\bigl", "\\bigr", "\\Bigl", "\\Bigr", "\\big", "\\Big"), ""),
}  # fmt: skip
_COMMAND = re.compile(r",\\!|\{,\}|\\(?:left|right)\s*\.(?!\d)|\\(?:[A-Za-z]+|.)", re.DOTALL)
_WRAPPERS = (
    "text|textbf|textit|textrm|texttt|textsf|textnormal|mathrm|mathbf|mathsf|mathit|mathtt|boldsymbol|bm|emph|mbox|"
    "hbox|operatorname|underline"
)
WRAPPER = re.compile(rf"\\(?:{_WRAPPERS})\s*\{{([^{{}}]*)\}}")
_DOLLARS = re.compile(r"\$\$?")
_BEFORE, _AFTER = ' \t\n\r,;:"`*', ' \t\n\r.,;:"`*'


@functools.lru_cache(maxsize=8192)
def latex(text: str) -> str | None:
    """The answer's LaTeX in one form; None if its dollars are neither delimiters in pairs nor money."""
    text = text.translate(_CHARACTERS)
    text = _COMMAND.sub(_one_form, text).replace("~", " ")
    text = re.sub(r"\^\s*\{\s*\\circ\s*\}", r"^\\circ ", text)
    undelimited = _without_dollars(text)
    if undelimited is None:
        return None
    text = " ".join(undelimited.split()).lstrip(_BEFORE).rstrip(_AFTER)
    return re.sub(r"^(?:\\?[=:]|\\approx|\\sim)\s*", "", text).strip()


@functools.lru_cache(maxsize=8192)
def plain(text: str) -> str | None:
    r"""As `latex`, with \text{...} and its relatives opened: "5 \text{ cm}" becomes "5  cm"."""
    written = latex(text)
    if written is None:
        return None
    for _ in range(5):
        opened = WRAPPER.sub(r" \1 ", written)
        if opened == written:
            break
        written = opened
    written = " ".join(written.replace("{}", "").split()).lstrip(_BEFORE).rstrip(_AFTER)
    while len(written) > 1 and written[0] == "{" and _closes_last(written):
        written = written[1:-1].strip()
    return written


def _one_form(found: re.Match[str]) -> str:
    command = found[0]
    if command in (",\\!", "{,}"):
        return ","
    if command.startswith(("\\left", "\\right")) and command.endswith("."):
        return ""
    return _SYNONYMS.get(command, command)


def _without_dollars(text: str) -> str | None:
    count = len(_DOLLARS.findall(text))
    if count % 2 == 0:
        return _DOLLARS.sub(" ", text) if count else text
    # One too many: the first before a number is money.
    text, money = re.subn(r"\$(?=\s*-?\s*[\d.])", DOLLAR, text, count=1)
    return _DOLLARS.sub(" ", text) if money else None


def _closes_last(text: str) -> bool:
    """Whether the brace at the beginning is closed by the one at the end."""
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.end() == len(text)
    return False
