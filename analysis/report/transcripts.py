"""Rollouts as readable texts: rows of rollout files, of one or several steps, looked up by problem.

Files are read once to index each problem's rows; texts are read on demand. A response stored only as token ids is
decoded if a tokenizer is given, else its ids are shown. Nothing is tokenized.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from gradstore.engine.rollouts.formats import COLUMNS, TRL, detect_format, names_in, with_rewards
from gradstore.engine.rollouts.rollout import Rollout
from gradstore.engine.rollouts.row import read_row
from gradstore.errors import RequestError
from gradstore.reading.files import RowFile
from gradstore.reading.opening import files_at, open_rows

TOKEN_SHARES = "token_shares"
"""Field of a rollout's `extra`: share of each response token in the rollout's alignment, as numbers."""


MARKS = "\u27e6", "\u27e7"
"""Brackets around what the policy did not write: tools, users, the environment."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """One rollout as readable text."""

    number: int
    """Index among the problem's rollouts of the step, from 0."""
    text: str
    reward: float
    step: int | None
    logprobs: tuple[float, ...] | None
    """One value per response token."""
    shares: tuple[float, ...] | None
    """One value per response token: its share of the rollout's alignment."""
    tokens: tuple[str, ...] | None
    """Texts of the response's tokens; None without token ids or a tokenizer."""
    written: tuple[bool, ...] | None = None
    """Whether the policy wrote each response token; None: it wrote all."""

    @property
    def marked(self) -> str:
        """The text, with what the policy did not write between MARKS if tokens are known; headed by their numbers."""
        if self.written is None or all(self.written):
            return self.text
        text = self.text
        if self.tokens is not None:
            runs = groupby(zip(self.written, self.tokens, strict=True), key=lambda pair: pair[0])
            parts = [(own, "".join(token for _, token in run)) for own, run in runs]
            text = "".join(part if own else f"{MARKS[0]}{part}{MARKS[1]}" for own, part in parts)
        marks = "" if self.tokens is None else f"; {MARKS[0]} {MARKS[1]} mark the others"
        return f"[{self.told}{marks}]\n{text}"

    @property
    def told(self) -> str:
        """How many of the response's tokens the policy wrote, if not all; else empty."""
        if self.written is None or all(self.written):
            return ""
        return f"the policy wrote {sum(self.written)} of {len(self.written)} tokens"


class Transcripts:
    """Rollout files opened for reading by problem."""

    def __init__(self, paths: Sequence[str | Path], tokenizer: Any = None) -> None:
        """paths: files in any format of docs/rollouts.md, or folders of them. RequestError for unreadable files."""
        self._tokenizer = tokenizer
        self._places: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        self._files: list[tuple[RowFile, str]] = []
        for path in paths:
            for file in files_at(Path(path)):
                self._index(file)

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))

    def of(self, problem_id: str) -> list[Transcript]:
        """The rollouts of a problem in the order of the files; empty if there are none."""
        found: list[Transcript] = []
        counts: Counter[int | None] = Counter()
        for file, place, size in self._places.get(problem_id, []):
            rows, format = self._files[file]
            rows.check_unchanged()
            rollout = read_row(rows.fetch([place], [size])[0], format, f"{rows.path}")
            found.append(self._transcript(rollout, counts[rollout.step]))
            counts[rollout.step] += 1
        return found

    def _index(self, path: Path) -> None:
        try:
            rows = open_rows(path, COLUMNS, "rollout")
            format = detect_format(next((row.value for row in rows.scan()), None))
            if format == TRL:
                format = with_rewards(format, open_rows(path).names, path)
                rows = open_rows(path, names_in(format), "rollout")
        except OSError as error:
            raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from None
        for row in rows.scan():
            rollout = read_row(row.value, format, row.where)
            self._places[rollout.problem_id].append((len(self._files), row.place, row.size))
        self._files.append((rows, format))

    def _transcript(self, rollout: Rollout, number: int) -> Transcript:
        ids = rollout.response_ids
        tokens = None
        if ids is not None and self._tokenizer is not None:
            tokens = tuple(self._tokenizer.decode([token]) for token in ids.tolist())
        text = rollout.response
        if text is None:
            text = (
                "".join(tokens) if tokens else "[token ids] " + " ".join(map(str, [] if ids is None else ids.tolist()))
            )
        return Transcript(
            number,
            text,
            float(rollout.reward),
            rollout.step,
            None if rollout.logprobs is None else tuple(rollout.logprobs.tolist()),
            _shares(rollout),
            tokens,
            None if rollout.response_mask is None else tuple(rollout.response_mask.tolist()),
        )


def chosen(transcripts: Iterable[Transcript], n: int, longest: int) -> list[dict[str, Any]]:
    """At most n rollouts of the newest step, alternately rewarded and unrewarded, JSON-able.

    Texts are cut at `longest` characters.
    """
    found = list(transcripts)
    steps = [one.step for one in found if one.step is not None]
    if steps:
        found = [one for one in found if one.step == max(steps)]
    found.sort(key=lambda one: -one.reward)
    order = [one for pair in zip(found, reversed(found), strict=True) for one in pair]
    kept = list({one.number: one for one in order}.values())[:n]
    return [
        {
            "number": one.number + 1,
            "reward": one.reward,
            "step": one.step,
            "text": one.marked
            if len(one.marked) <= longest
            else f"{one.marked[:longest]} … (cut, {len(one.marked)} characters)",
        }
        for one in kept
    ]


def _shares(rollout: Rollout) -> tuple[float, ...] | None:
    shares = rollout.extra.get(TOKEN_SHARES)
    if not isinstance(shares, list) or rollout.response_ids is None or len(shares) != len(rollout.response_ids):
        return None
    return tuple(float(share) for share in shares) if all(isinstance(s, int | float) for s in shares) else None
