r"""Compare text: short names and phrases, such as MATH's \text{Wednesday}, \text{east} and \text{no solution}.

Case, articles, punctuation, formatting and spaces do not count; every word does. A reason may follow: "east, because
it rises there".
"""

import re
from dataclasses import dataclass

from gradstore.trainer.sampling.grading.markup import WRAPPER, plain

_MOST_WORDS, _MOST_LETTERS = 12, 120
_TEXT = re.compile(r"[\w\s.,;:!?'\"()&/\u00c0-\u024f-]+")
_WORD = re.compile(r"[^\W\d_]+")
_ARTICLES = re.compile(r"\b(?:the|an|a)\s+(?=\w)")
_HALVES = re.compile(r"\b([ap])\.?\s?m\b\.?")
_LEADING = re.compile(
    r"^(?:(?:so|thus|therefore|hence|the|final|correct|answer|it|is|was|are)\s+(?:is\s+|are\s+)?)*", re.IGNORECASE
)
_REASON = re.compile(r"\s*[,;.:(-]?\s*\b(?:because|since|as|which|so|for)\b.*$", re.IGNORECASE | re.DOTALL)
_SYMBOLS = "sqrt theta alpha beta gamma delta lambda sigma omega frac sinh cosh tanh arcsin arccos arctan"
_MATHS = frozenset(_SYMBOLS.split())


@dataclass(frozen=True, slots=True)
class Words:
    """A ground truth that is a name or a short phrase."""

    words: str
    """Lower case, without articles and punctuation."""
    kind: str = "text"

    def agrees(self, answer: str) -> bool:
        """Whether the answer says the same words."""
        if len(answer) > 4 * _MOST_LETTERS + len(self.words):
            return False
        given = plain(answer)
        if not given:
            return False
        return self.words in (_key(given), _key(_LEADING.sub("", given)), _key(_REASON.sub("", given)))


def read_words(text: str) -> Words | None:
    r"""The truth as text; None if it is mathematics or has over 12 words. `abc` is a product, `\text{abc}` a name."""
    written = plain(text)
    if not written or len(written) > _MOST_LETTERS or not _TEXT.fullmatch(written):
        return None
    words = _WORD.findall(written)
    if not words or len(written.split()) > _MOST_WORDS or words[0].lower() in _MATHS:
        return None
    dressed = WRAPPER.search(text) is not None
    longest = max(map(len, words))
    wordy = longest >= 4 and not (len(words) == 1 and written.isupper() and longest < 5)
    clock = _HALVES.search(written.lower()) is not None and written[0].isdigit()
    if not (clock or wordy or (longest >= 3 and len(words) > 1) or (dressed and len(written) > 1)):
        return None
    key = _key(written)
    return Words(key) if key else None


def _key(text: str) -> str:
    text = _HALVES.sub(r"\1m", text.casefold().replace("_", " ").replace("\\infty", "infinity"))
    text = _ARTICLES.sub("", " ".join(re.sub(r"[^\w\s]", " ", text.replace("'", "")).split()) + " ")
    return text.strip()
