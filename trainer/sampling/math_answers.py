"""Whether a response's answer equals a ground truth of mathematics. Runs in a reward worker, never in the trainer.

math-verify decides. It needs one to eight milliseconds to parse an answer, so its results are kept, and two plain
numbers are compared as numbers. Both give what math-verify gives, which a test compares on thousands of pairs.

What math-verify reads in a response depends on more than the answer: on dollars, on "the final answer is" and so on.
`decisive` finds responses in which its parser tries the only box first. If it can read the box, the box stands for the
whole response.
"""

import functools
import re
from typing import Any

from gradstore.trainer.sampling.grading import read_truth

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,14})", re.ASCII)
"""A whole number that math-verify reads as such."""
_BOX = "\\boxed{"
_FORMULAS = (("$$", "$$"), ("$", "$"), ("\\[", "\\]"), ("\\(", "\\)"))
"""Beginning and end of a formula."""
_CLOSING = ("$", "\\]", "\\)", "]")
"""After a box, math-verify would look for the beginning of the formula before it."""
_PERCENT = re.compile(r"\s*(?:\\?%|[Pp]ercent|[Pp]ct)")


def math_equal(gold: str, response: str) -> bool | None:
    """Whether a response's answer equals the gold answer; None if the gold answer cannot be parsed.

    True and False, yes and no, and option letters are compared as names (grading.py), all others by math-verify. A
    response without an answer is not equal, and neither is one whose comparison takes longer than five seconds.

    Call it in the main thread: math-verify's timeout is a signal.
    """
    named = read_truth(gold)
    if named is not None:
        return named.agrees(response)
    box = decisive(response)
    equal = NotImplemented if box is None else _equal_boxed(gold, box)
    return _equal_parsed(gold, parse_answer(response)) if equal is NotImplemented else equal


def decisive(response: str) -> str | None:
    """The response's only box, with the formula that it is alone in, if math-verify's parser tries it first."""
    start = response.find(_BOX)
    if start < 0 or response.find("\\boxed", start + 1) >= 0:
        return None
    before, rest = response[:start], response[start:]
    if "hope" in rest.lower():
        return None
    if not any(mark in rest for mark in _CLOSING):
        end = rest.rfind("}") + 1
        return rest[:end] if end > len(_BOX) else None
    for opening, closing in _FORMULAS:
        if before.rstrip(" ").endswith(opening):
            box, _, after = rest.partition(closing)
            head = before.rstrip(" ").removesuffix(opening)
            if not _is_alone(head, box, after, opening, closing):
                return None
            return box.rstrip(" ") if _is_closed(box.rstrip(" ")) else f"{opening}{box}{closing}"
    return None


def _is_closed(box: str) -> bool:
    """Whether the first brace is closed by the last one; then the formula around a box makes no difference."""
    depth = 0
    for place, character in enumerate(box):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth and character == "}":
            return place == len(box) - 1 and "\\" not in box[len(_BOX) - 1 :].replace("\\frac", "").replace(
                "\\sqrt", ""
            )
    return False


def _is_alone(head: str, box: str, after: str, opening: str, closing: str) -> bool:
    """Whether a formula is a box and no more, and no other formula or box can be read around it."""
    if not box.rstrip(" ").endswith("}") or "\n" in box or any(mark in box for mark in _CLOSING):
        return False
    if "}" in after or any(mark in after for mark in _CLOSING) or _PERCENT.match(after):
        return False
    if head.endswith(("$", "\\", *"0123456789")):
        return False
    return "$" in opening or head.rfind(opening) <= head.rfind(closing)


@functools.lru_cache(maxsize=4096)
def _equal_boxed(gold: str, box: str) -> bool | None:
    """`math_equal` of a decisive box; NotImplemented where the whole response is needed."""
    inside = box[box.index(_BOX) + len(_BOX) : box.rindex("}")].strip(" ")
    if _NUMBER.fullmatch(gold) and _NUMBER.fullmatch(inside):
        return int(gold) == int(inside)
    answer = _parsed_box(box)
    return _equal_parsed(gold, answer) if answer else NotImplemented


@functools.lru_cache(maxsize=4096)
def _parsed_box(box: str) -> list[Any] | None:
    """What math-verify reads in a decisive box; None if not the box as a whole, but a part of it as a last resort."""
    from math_verify.parser import parse_latex_cached

    answer = _parsed(box)
    if "answer" in box.lower() or len(answer) < 2 or not isinstance(answer[-1], str):
        return None
    try:
        return answer if parse_latex_cached(answer[-1]) is not None else None
    except Exception:  # noqa: BLE001 - antlr, sympy and others raise what they like
        return None


def _equal_parsed(gold: str, answer: list[Any]) -> bool | None:
    from math_verify import verify

    gold_answers = _parsed_gold(gold)
    return bool(verify(gold_answers, answer)) if gold_answers else None


def _parsed_gold(gold: str) -> list[Any]:
    # math-verify reads bare LaTeX such as \frac12 only inside a box or dollar signs
    marked = "\\boxed" in gold or "$" in gold or not gold.strip()
    return _parsed(gold if marked else f"\\boxed{{{gold}}}")


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> list[Any]:
    """`parse_answer` of texts that come up again: ground truths and boxes."""
    return parse_answer(text)


def parse_answer(text: str) -> list[Any]:
    """What math-verify reads in a text: expressions, then the text they were read from."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # priority 0: a boxed answer wins over any other expression of the response
    return parse(text, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()])


def readable_gold(gold: str) -> bool:
    """Whether answers can be compared with this ground truth."""
    return read_truth(gold) is not None or _NUMBER.fullmatch(gold) is not None or bool(_parsed_gold(gold))
