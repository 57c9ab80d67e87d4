"""Judge: scores responses by rule first, then from the cache, then by asking the model, many questions at a time.

Requests run in an event loop of the judge's own, in a thread of its own. So a judge works in any thread, with or
without an event loop; `score` waits for a batch, `score_async` awaits it. The first failure ends a batch: what was
judged until then stays in the cache.
"""

import asyncio
import hashlib
import json
import logging
import os
import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradstore.errors import GradstoreError, RequestError, needing
from gradstore.trainer.sampling.judge.cache import Row, Verdicts
from gradstore.trainer.sampling.judge.question import (
    PLACES,
    REMINDER,
    TEMPLATE,
    TOKEN_BYTES,
    Question,
    is_formula,
    is_group,
    question,
    sent,
    verdict,
)
from gradstore.trainer.sampling.judge.settings import JudgeSettings, read_template
from gradstore.trainer.sampling.own_loop import OwnLoop, all_done
from gradstore.trainer.sampling.reward import Item, Reward

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)

Rule = Callable[[Sequence[tuple[str, str]]], Sequence[bool | None]]
"""For each (ground truth, response), whether the answer is equal by rule; None for a truth that no rule can read."""

REMINDERS = 2
"""Maximum reminders of the verdict's form before the question fails."""
KEPT = 2000
"""Characters of a reply, from its end, that are kept in the cache and sent with a reminder."""
_SUSPICIOUS = 16
"""Size of a batch from which on it is worth a warning that no response holds an answer."""


@dataclass
class _Flight:
    """A question that is being asked; other batches that need it wait."""

    done: asyncio.Event = field(default_factory=asyncio.Event)
    score: float | None = None


class Judge:
    """Asks a model for verdicts. The constructor raises RequestError before any request, for no key for instance.

    equal: the comparison by rule, for `JudgeSettings.rule`; None: there is none.
    """

    def __init__(self, settings: JudgeSettings, equal: Rule | None = None) -> None:
        self.settings = settings
        own = settings.template
        self.template = TEMPLATE if own is None else read_template(Path(own), PLACES)
        if "{token}" not in self.template:
            log.warning("judge: template %s lacks {token}: a response can imitate fixed delimiters", own)
        self._equal = equal
        self._line = _Line(settings)  # now: a missing key or package is not for the first hour of sampling to find

    @property
    def name(self) -> str:
        """Name of the reward: the model, plus a digest of the settings that change scores, unless they are default."""
        changed = [
            self.template if self.template != TEMPLATE else None,
            *(getattr(self.settings, name) for name in ("answer", "length", "rule")),
        ]
        if changed == [None, "final", 2000, "equal"]:
            return f"judge:{self.settings.model}"
        return f"judge:{self.settings.model}:{hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:8]}"

    def reward(self) -> Reward:
        """The judge as a reward."""
        return Reward(
            self.name,
            lambda record, response, j: self.score([(record, response, j)])[0],
            self.score,
            self._check,
            self.score_async,
        )

    def score(self, items: Sequence[Item]) -> list[float]:
        """Score each response 1.0 or 0.0; equal questions are asked once.

        Raises GradstoreError, naming the problem, when the judge cannot be reached or gives no verdict; RequestError
        when the endpoint rejects the request itself. Earlier verdicts stay in the cache.
        """
        plan = self._plan(items)
        return plan.scores(self._open().loop.wait(self._ask_all(plan.asked)))

    async def score_async(self, items: Sequence[Item]) -> list[float]:
        """`score`, to be awaited in any event loop, which is not blocked: rules and the cache work in a thread."""
        plan = await asyncio.to_thread(self._plan, items)
        return plan.scores(await self._open().loop.awaited(self._ask_all(plan.asked)))

    def close(self) -> None:
        """Close connections and the cache."""
        self._line.close()

    def _check(self, record: Mapping[str, Any]) -> None:
        length, truth = self.settings.length, question(record, "").reference
        if self.settings.answer == "final" and len(truth) > length:
            raise RequestError(
                f"problem {record['id']!r}: ground truth of {len(truth)} characters, and answers longer than "
                f"length={length} score 0; raise length"
            )

    def _plan(self, items: Sequence[Item]) -> "_Plan":
        """Scores known without a request, and the questions to ask."""
        plan = _Plan()
        for record, response, _ in items:
            answer = sent(response, self.settings)
            one = question(record, answer or "")
            key = one.key(self.settings, self.template)
            plan.keys.append(key)
            if answer is None:
                plan.known[key] = 0.0
            elif key not in plan.known:
                plan.asked.setdefault(key, one)
        without = sum(plan.known.get(key) == 0.0 for key in plan.keys)
        if without == len(items) >= _SUSPICIOUS:
            log.warning(
                "judge: none of %d responses marks its final answer, as \\boxed{...} does: all score 0", without
            )
        by_rule = self._by_rule(plan.asked)
        plan.settle(by_rule)
        cache = self._open().verdicts
        cached = {} if cache is None else cache.get_many(plan.asked)
        plan.settle(cached)
        log.info(
            "judge: %d responses, %d without an answer; %d questions by rule, %d in the cache, %d to ask",
            *(len(items), without, len(by_rule), len(cached), len(plan.asked)),
        )
        return plan

    def _by_rule(self, asked: Mapping[str, Question]) -> dict[str, float]:
        """Scores of the questions for which the comparison by rule is final."""
        rule = self.settings.rule
        if rule == "none":
            return {}
        found = {key: 1.0 for key, one in asked.items() if one.answer.split() == one.reference.split()}
        left = {key: one for key, one in asked.items() if key not in found and is_formula(one.reference)}
        if self.settings.answer == "whole":
            pairs = {key: (one.reference, one.answer) for key, one in left.items()}
        else:
            boxes = {key: f"\\boxed{{{one.answer}}}" for key, one in left.items() if is_group(one.answer)}
            pairs = {key: (left[key].reference, box) for key, box in boxes.items()}
        if self._equal is None or not pairs:
            return found
        for key, same in zip(pairs, self._equal([*pairs.values()]), strict=True):
            if same or (same is not None and rule == "both"):
                found[key] = float(same)
        return found

    async def _ask_all(self, asked: Mapping[str, Question]) -> dict[str, float]:
        """The verdicts, by key. The first failure cancels the other questions."""
        found: dict[str, float] = {}

        async def work(key: str, one: Question) -> None:
            found[key] = await self._ask_once(key, one)

        try:
            await all_done(
                (partial(work, key, one) for key, one in asked.items()), min(self.settings.concurrency, len(asked))
            )
        finally:
            await self._line.kept()
        return found

    async def _ask_once(self, key: str, one: Question) -> float:
        """The verdict on a question, which another batch may be asking at this moment."""
        flights = self._line.flights
        while (flight := flights.get(key)) is not None:
            await flight.done.wait()
            if flight.score is not None:
                return flight.score
        flight = flights[key] = _Flight()
        try:
            flight.score = await self._ask(key, one)
            return flight.score
        finally:
            del flights[key]
            flight.done.set()

    async def _ask(self, key: str, one: Question) -> float:
        where = f"problem {one.problem_id!r}: {self.name}"
        first = {"role": "user", "content": one.text(self.template, secrets.token_hex(TOKEN_BYTES))}
        messages = [first]
        for _ in range(1 + REMINDERS):
            reply = await self._line.chat.reply(messages, where)
            score = verdict(reply.text) if reply.complete else None
            end = self._line.chat.endpoint.masked(reply.text[-KEPT:])
            if score is not None:
                self._line.keep((key, score, end))
                return score
            messages = [first, {"role": "assistant", "content": end}, {"role": "user", "content": REMINDER}]
        problem = f"ends in {' '.join(end.split())[-80:]!r}"
        if not reply.complete:
            problem = f"was cut off; is max_tokens={self.settings.max_tokens} too small?"
        raise GradstoreError(f"{where} gave no verdict after {REMINDERS} reminders; its reply {problem}")

    def _open(self) -> "_Line":
        """The judge's loop and connections; new ones in a forked process, where the thread does not exist."""
        if self._line.loop.process != os.getpid():
            self._line = _Line(self.settings)
        return self._line


@dataclass
class _Plan:
    """A batch: which scores are known, and which questions are to be asked."""

    keys: list[str] = field(default_factory=list)
    """Of each response."""
    known: dict[str, float] = field(default_factory=dict)
    asked: dict[str, Question] = field(default_factory=dict)

    def settle(self, found: Mapping[str, float]) -> None:
        """Move questions from `asked` to `known`."""
        self.known |= found
        for key in found:
            del self.asked[key]

    def scores(self, found: Mapping[str, float]) -> list[float]:
        """The scores of all responses, in their order."""
        return [self.known[key] if key in self.known else found[key] for key in self.keys]


class _Line:
    """The event loop of a judge, in a thread of its own, with the endpoint, the cache and the questions under way."""

    def __init__(self, settings: JudgeSettings) -> None:
        with needing("the judge", "gradstore[judge]"):
            from gradstore.trainer.sampling.judge.chat import Chat

        self.chat: Chat = Chat(settings)
        self.verdicts = None if settings.cache == "none" else Verdicts(settings.cache or _default_cache())
        self.flights: dict[str, _Flight] = {}
        self._unkept: list[Row] = []
        self._writing: asyncio.Task[None] | None = None
        self.loop = OwnLoop("judge", self.chat.endpoint.close)
        self.close = weakref.finalize(self, _stop, self.loop.close, self.verdicts, os.getpid())

    def keep(self, row: Row) -> None:
        """Begin to write a verdict to the cache, with all those that come while the last ones are written."""
        if self.verdicts is None:
            return
        self._unkept.append(row)
        if self._writing is None or self._writing.done():
            self._check_written()
            self._writing = asyncio.create_task(self._write(self.verdicts))

    async def kept(self) -> None:
        """Wait until all verdicts are written; RequestError if they cannot be."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
            self._check_written()

    async def _write(self, verdicts: Verdicts) -> None:
        while self._unkept:
            rows, self._unkept = self._unkept, []
            await asyncio.to_thread(verdicts.put_many, rows)

    def _check_written(self) -> None:
        if self._writing is not None and self._writing.done():
            written, self._writing = self._writing, None
            written.result()


def _stop(close_loop: Callable[[], Any], verdicts: Verdicts | None, process: int) -> None:
    """Close what a judge has open; nothing in a forked process, whose connections are its parent's."""
    if process == os.getpid():
        close_loop()
        if verdicts is not None:
            verdicts.close()


def _default_cache() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "gradstore" / "judge.sqlite"
