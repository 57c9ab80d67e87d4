"""Built-in rewards by name, and rewards from the user's own function.

- `math`: the response's boxed answer, or its last value, is compared with the ground truth by the kind of the truth:
  labels, numbers with units, lists, intervals and text by rules, other mathematics by math-verify (grading/).
- `reasoning-gym`: the data set's own verifier, on the entry stored in the problem's `extra["reasoning_gym"]`.
- `judge`: a model behind an OpenAI-compatible endpoint compares the answer with the ground truth (judge.py).
- `auto`: each problem's `extra["reward"]` names one of the above, for pools of mixed sources.
- `module:function` or `file.py:function`: a function with verl's `compute_score` signature, in this process.
- `isolated:module:function`: the same in reward workers, which have no network, no files and limits.

Reward workers (workers/) grade `math` and `reasoning-gym`: no answer can hurt, stop or hold up the trainer.

If `extra["coin"]` holds a seed, all rewards but the user's own flip a coin, whatever the response. Studies of
unreliable rewards use it as a deliberate defect (gradstore.trainer.data).
"""

import asyncio
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradstore import to_verl
from gradstore.errors import RequestError, first_line
from gradstore.keepable import parsed_field
from gradstore.problems import detail
from gradstore.trainer.sampling.grading import unreadable
from gradstore.trainer.sampling.imported import imported
from gradstore.trainer.sampling.reward import Item, Reward, Score
from gradstore.trainer.sampling.secrecy import without_credentials
from gradstore.trainer.sampling.workers import frames
from gradstore.trainer.sampling.workers.pool import PoolItem, pool_of

if TYPE_CHECKING:
    from gradstore.trainer.sampling.judge import JudgeSettings

JUDGES = ("judge", "model-judge")
"""Names of the judge."""

ISOLATED = "isolated:"
"""Before a user's function: call it in a reward worker."""

LONGEST = 4 << 20
"""Longest response that is graded, in characters; a longer one scores 0."""


def load_reward(spec: str, judge: "JudgeSettings | None" = None) -> Reward:
    """Load a reward: "math", "reasoning-gym", "judge", "auto", "[isolated:]module:function" or the same with "file.py".

    judge: the judge for "judge" and "auto"; None: the settings in the text, as in "judge:model=NAME,concurrency=8", and
    in the environment (see gradstore.trainer.sampling.judge).
    Raises RequestError for an unknown name, a function that cannot be imported, or a judge without a model.
    """
    if spec in BUILT_IN:
        return with_coins(BUILT_IN[spec].reward())
    if spec == "auto":
        return _by_problem(judge)
    module, colon, function = spec.partition(":")
    if module in JUDGES:
        from gradstore.trainer.sampling.judge import Judge, judge_settings

        return with_coins(Judge(judge or judge_settings(function), equal_pairs).reward())
    if not colon or not module or not function:
        raise RequestError(
            f"unknown reward {without_credentials(spec)!r}, expected 'math', 'reasoning-gym', 'judge', 'auto', "
            "'module:function' or 'file.py:function'"
        )
    if spec.startswith(ISOLATED) and ":" in function:
        return _isolated(spec, function)
    return Reward(spec, functools.partial(_user, imported(spec), spec))


def coin_flip(record: Mapping[str, Any], response: str, rollout_index: int) -> float | None:
    """Reward of a coin-flip problem: 0 or 1 with equal probability; None for any other problem.

    The coin is a hash of the seed in `extra["coin"]`, the problem's id, the rollout's number and the response. So the
    same rollout always gets the same reward.
    """
    seed = detail(record, "coin")
    if seed is None:
        return None
    text = json.dumps([seed, record["id"], rollout_index, response])
    return float(hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 2)


def with_coins(reward: Reward) -> Reward:
    """Wrap a reward: coin-flip problems get their coin's value and never reach the reward itself."""

    def many(items: Sequence[Item]) -> list[Any]:
        values = [coin_flip(*item) for item in items]
        others = iter(reward.scores([item for item, value in zip(items, values, strict=True) if value is None]))
        return [next(others) if value is None else value for value in values]

    async def many_async(items: Sequence[Item]) -> list[float]:
        values = [coin_flip(*item) for item in items]
        others = [item for item, value in zip(items, values, strict=True) if value is None]
        scores = iter(await reward.many_async(others))
        return [next(scores) if value is None else value for value in values]

    def scored(record: Mapping[str, Any], response: str, rollout_index: int) -> Any:
        flip = coin_flip(record, response, rollout_index)
        return reward.score(record, response, rollout_index) if flip is None else flip

    def check(record: Mapping[str, Any]) -> None:
        if reward.check is not None and detail(record, "coin") is None:
            reward.check(record)

    def check_many(records: Sequence[Mapping[str, Any]]) -> list[str | None]:
        flipped = [detail(record, "coin") is not None for record in records]
        others = iter(reward.faults([record for record, own in zip(records, flipped, strict=True) if not own]))
        return [None if own else next(others) for own in flipped]

    at_once = None if reward.score_many is None else many
    awaited = None if reward.score_async is None else many_async
    return Reward(reward.name, scored, at_once, check, awaited, check_many)


def _by_problem(judge: "JudgeSettings | None") -> Reward:
    """A reward that uses, for each problem, the built-in reward named in its `extra["reward"]`.

    Only built-in rewards are allowed: a data file must not choose code to import or an endpoint to call.
    """
    load = functools.cache(functools.partial(load_reward, judge=judge))

    def fault(record: Mapping[str, Any]) -> str | None:
        name = detail(record, "reward")
        known = isinstance(name, str) and name in (*BUILT_IN, "judge")
        wanted = "reward 'auto' needs extra.reward to be 'math', 'reasoning-gym' or 'judge'"
        return None if known else f"{wanted}, not {name!r}"

    def many(items: Sequence[Item]) -> list[Any]:
        for record, _, _ in items:
            _raise(record, fault(record))
        return _by_name(items, [detail(record, "reward") for record, _, _ in items], lambda name: load(name).scores)

    async def many_async(items: Sequence[Item]) -> list[float]:
        for record, _, _ in items:
            _raise(record, fault(record))
        scores = await asyncio.gather(*(load(detail(item[0], "reward")).many_async([item]) for item in items))
        return [score for (score,) in scores]

    def check_many(records: Sequence[Mapping[str, Any]]) -> list[str | None]:
        faults = [fault(record) for record in records]
        names = [detail(record, "reward") if own is None else "" for record, own in zip(records, faults, strict=True)]
        found = _by_name(records, names, lambda name: load(name).faults if name else lambda part: [None] * len(part))
        return [own or other for own, other in zip(faults, found, strict=True)]

    return replace(_in_batches("auto", many, check_many), score_async=many_async)


def _by_name(items: Sequence[Any], names: Sequence[str], function: Callable[[str], Callable]) -> list[Any]:
    """Apply function(name) to all items of a name at once; the results in the items' order."""
    found: list[Any] = [None] * len(items)
    for name in dict.fromkeys(names):
        places = [i for i, other in enumerate(names) if other == name]
        for i, value in zip(places, function(name)([items[i] for i in places]), strict=True):
            found[i] = value
    return found


def _in_batches(
    name: str,
    many: Callable[[Sequence[Item]], list[Any]],
    check_many: Callable[[Sequence[Mapping[str, Any]]], list[str | None]],
) -> Reward:
    """A reward from functions of many responses and many problems."""
    return Reward(
        name,
        lambda *item: many([item])[0],
        many,
        lambda record: _raise(record, check_many([record])[0]),
        check_many=check_many,
    )


def _raise(record: Mapping[str, Any], fault: str | None) -> None:
    if fault is not None:
        raise RequestError(f"problem {record['id']!r}: {fault}")


@dataclass(frozen=True)
class _Graded:
    """A reward that reward workers compute."""

    name: str
    problem: Callable[[Mapping[str, Any]], Any]
    """What a worker needs of a problem record; RequestError if the record lacks it."""
    answer: Callable[[str], str]
    """The part of a response that a worker needs."""
    unusable: Callable[[Mapping[str, Any], str], str]
    """The message for a problem that no answer can be graded for, from the record and the worker's reason."""
    role: str
    spec: str = ""

    def reward(self) -> Reward:
        return _in_batches(self.name, self.scores, self.faults)

    def scores(self, items: Sequence[Item]) -> list[Score]:
        """The workers' scores; RequestError for a problem that cannot be graded."""
        results = self._results(items)
        scores = []
        for (record, _, _), result in zip(items, results, strict=True):
            if "unusable" in result:
                _raise(record, self.unusable(record, _printable(result["unusable"])))
            reason = result.get("stopped")
            scores.append(Score(0.0, _printable(reason)) if reason is not None else Score(result["score"]))
        return scores

    def faults(self, records: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """For each problem why it cannot be graded, or None."""
        known: list[str | None] = []
        for record in records:
            try:
                self.problem(record)
                known.append(None)
            except RequestError as error:
                known.append(str(error).removeprefix(f"problem {record['id']!r}: "))
        asked = [record for record, fault in zip(records, known, strict=True) if fault is None]
        results = iter(self._results([(record, None, 0) for record in asked]))
        return [
            self._fault(record, next(results)) if own is None else own
            for record, own in zip(records, known, strict=True)
        ]

    def _fault(self, record: Mapping[str, Any], result: Mapping[str, Any]) -> str | None:
        if "stopped" in result:
            return f"reward {self.name!r} cannot grade it: {_printable(result['stopped'])}"
        return self.unusable(record, _printable(result["unusable"])) if "unusable" in result else None

    def _results(self, asked: Sequence[tuple[Mapping[str, Any], str | None, int]]) -> list[dict[str, Any]]:
        """Results of the workers. A record that occurs several times, as in a group, is sent once."""
        places: dict[int, int] = {}
        problems: list[Any] = []
        items: list[PoolItem] = []
        long: list[int] = []
        for record, response, rollout in asked:
            if id(record) not in places:
                places[id(record)] = len(problems)
                problems.append(self.problem(record))
            if response is not None and len(response) > LONGEST:
                long.append(len(items) + len(long))
            else:
                items.append((places[id(record)], response if response is None else self.answer(response), rollout))
        results = pool_of(self.role, self.spec).results(problems, items)
        for place in long:
            results.insert(place, {"stopped": f"it has more than {LONGEST} characters"})
        return results


def _printable(text: str) -> str:
    """A worker's text without control characters: it may repeat what an answer said."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _gold(record: Mapping[str, Any]) -> str:
    return record.get("ground_truth", "")


def _unreadable_math(record: Mapping[str, Any], reason: str) -> str:
    return unreadable(_gold(record))


def _gym_entry(record: Mapping[str, Any]) -> dict[str, Any]:
    """A problem's data set, entry and settings; RequestError if the problem lacks them.

    extra["reasoning_gym"] holds {"dataset": name, "entry": {"question", "answer", "metadata"}}, or the same as JSON
    text. It also holds "config": {...} if the verifier depends on the data set's settings.
    """
    name = f"problem {record['id']!r}"
    kept = parsed_field(detail(record, "reasoning_gym"), name, "extra.reasoning_gym")
    if not isinstance(kept, Mapping) or not isinstance(kept.get("entry"), Mapping) or "dataset" not in kept:
        raise RequestError(f"{name}: reward 'reasoning-gym' needs extra.reasoning_gym with 'dataset' and 'entry'")
    wanted = {field: kept[field] for field in ("dataset", "entry", "config") if field in kept}
    try:
        frames.encoded(wanted)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name}: extra.reasoning_gym is nothing that JSON can hold: {first_line(error)}") from None
    return wanted


def answer_of(response: str) -> str:
    """The answer in a response: the content of its last <answer> tags, or the whole text without tags; stripped."""
    answer, place = None, 0
    while (start := response.find("<answer>", place)) >= 0 and (end := response.find("</answer>", start)) >= 0:
        answer, place = response[start + len("<answer>") : end], end
    return (response if answer is None else answer).strip()


BUILT_IN: Mapping[str, _Graded] = {
    "math": _Graded("math", _gold, lambda response: response, _unreadable_math, "math"),
    "reasoning-gym": _Graded("reasoning-gym", _gym_entry, answer_of, lambda record, reason: reason, "reasoning-gym"),
}
"""The rewards that a data file may name, beside the judge."""


def equal_pairs(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """For each (ground truth, response), whether `math` would pay it; None for a ground truth it cannot read."""
    results = pool_of("math").results([gold for gold, _ in pairs], [(i, text, 0) for i, (_, text) in enumerate(pairs)])
    return [None if "unusable" in result else result.get("score") == 1.0 for result in results]


def _isolated(spec: str, function: str) -> Reward:
    """A user's function in reward workers. Its module is imported before their doors close."""
    module, _, name = function.rpartition(":")
    if module.endswith(".py"):
        module = str(Path(module).absolute())
    named = f"{module}:{name}"
    graded = _Graded(spec, to_verl_fields, str, lambda record, reason: f"reward {spec!r} {reason}", "function", named)
    return graded.reward()


def to_verl_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of verl's `compute_score` that a problem record gives."""
    verl = to_verl(dict(record))
    return {
        "data_source": verl["data_source"],
        "ground_truth": verl["reward_model"]["ground_truth"],
        "extra_info": verl["extra_info"],
    }


def _user(function: Callable[..., Any], spec: str, record: Mapping[str, Any], response: str, rollout_index: int) -> Any:
    given = to_verl_fields(record)
    given["extra_info"] = given["extra_info"] | {"rollout_index": rollout_index}
    try:
        return function(solution_str=response, **given)
    except Exception as error:
        kind = type(error).__name__
        raise RequestError(f"problem {record['id']!r}: reward {spec!r} raised {kind}: {error}") from error
