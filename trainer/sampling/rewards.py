"""Built-in rewards by name, and rewards from the user's own function.

- `math`: math-verify compares the response's boxed answer, or its last expression, with the ground truth; names
  (True, no, the letter of an option) are compared as names (grading.py).
- `reasoning-gym`: the data set's own verifier, on the entry stored in the problem's `extra["reasoning_gym"]`.
- `judge`: a model behind an OpenAI-compatible endpoint compares the answer with the ground truth (judge.py).
- `auto`: each problem's `extra["reward"]` names one of the above, for pools of mixed sources.
- `module:function` or `file.py:function`: a function with verl's `compute_score` signature.

If `extra["coin"]` holds a seed, all rewards but the last kind flip a coin, whatever the response. Studies of unreliable
rewards use it as a deliberate defect (gradstore.trainer.data).
"""

import asyncio
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradstore import to_verl
from gradstore.errors import RequestError
from gradstore.keepable import parsed_field
from gradstore.problems import detail
from gradstore.trainer.sampling.grading import read_truth
from gradstore.trainer.sampling.judge.secrecy import without_credentials
from gradstore.trainer.sampling.reward import Item, Reward

if TYPE_CHECKING:
    from gradstore.trainer.sampling.judge import JudgeSettings

JUDGES = ("judge", "model-judge")
"""Names of the judge."""

HARD_LIMIT_S = 60
"""Timeout of a verification outside the main thread, in seconds; after it, the answer counts as not equal."""

COMPARE_TUPLES = frozenset({"arc_agi", "rearc"})
"""reasoning-gym data sets whose verifiers compare tuples; with lists from JSON they would reject right answers."""


def load_reward(spec: str, judge: "JudgeSettings | None" = None) -> Reward:
    """Load a reward: "math", "reasoning-gym", "judge", "auto", "module:function" or "file.py:function".

    judge: the judge for "judge" and "auto"; None: the settings in the text, as in "judge:model=NAME,concurrency=8", and
    in the environment (see gradstore.trainer.sampling.judge).
    Raises RequestError for an unknown name, a function that cannot be imported, or a judge without a model.
    """
    if spec in BUILT_IN:
        return with_coins(Reward(spec, BUILT_IN[spec], check=CHECKS[spec]))
    if spec == "auto":
        return _by_problem(judge)
    module, colon, function = spec.partition(":")
    if module in JUDGES:
        from gradstore.trainer.sampling.judge import Judge, judge_settings

        return with_coins(Judge(judge or judge_settings(function), _equal_pairs).reward())
    if not colon or not module or not function:
        raise RequestError(
            f"unknown reward {without_credentials(spec)!r}, expected 'math', 'reasoning-gym', 'judge', 'auto', "
            "'module:function' or 'file.py:function'"
        )
    return Reward(spec, functools.partial(_user, _imported(without_credentials(spec), module, function), spec))


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
    inner = reward.many

    def many(items: Sequence[Item]) -> list[float]:
        values = [coin_flip(*item) for item in items]
        others = iter(inner([item for item, value in zip(items, values, strict=True) if value is None]))
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

    at_once = None if reward.score_many is None else many
    return Reward(reward.name, scored, at_once, check, None if reward.score_async is None else many_async)


def _by_problem(judge: "JudgeSettings | None") -> Reward:
    """A reward that uses, for each problem, the built-in reward named in its `extra["reward"]`.

    Only built-in rewards are allowed: a data file must not choose code to import or an endpoint to call.
    """
    load = functools.cache(functools.partial(load_reward, judge=judge))

    def of(record: Mapping[str, Any]) -> Reward:
        name = detail(record, "reward")
        if name not in (*BUILT_IN, "judge"):
            raise RequestError(
                f"problem {record['id']!r}: reward 'auto' needs extra.reward to be 'math', 'reasoning-gym' or 'judge', "
                f"not {name!r}"
            )
        return load(name)

    def many(items: Sequence[Item]) -> list[float]:
        rewards = [of(record) for record, _, _ in items]
        values = [math.nan] * len(items)
        for reward in dict.fromkeys(rewards):
            places = [i for i, other in enumerate(rewards) if other is reward]
            for i, value in zip(places, reward.many([items[i] for i in places]), strict=True):
                values[i] = value
        return values

    async def many_async(items: Sequence[Item]) -> list[float]:
        scores = await asyncio.gather(*(of(item[0]).many_async([item]) for item in items))
        return [score for (score,) in scores]

    def check(record: Mapping[str, Any]) -> None:
        own = of(record).check
        if own is not None:
            own(record)

    return Reward("auto", lambda record, response, j: of(record)(record, response, j), many, check, many_async)


def _math(record: Mapping[str, Any], response: str, rollout_index: int) -> float:
    """1.0 if the answer equals the ground truth (`math_equal`), else 0.0."""
    gold = record.get("ground_truth", "")
    equal = _equal(gold, response)
    if equal is None:
        raise RequestError(f"problem {record['id']!r}: {_unreadable_math(gold)}")
    return float(equal)


def _equal(gold: str, response: str) -> bool | None:
    """`math_equal` in any thread: math-verify's timeout uses a signal, which only the main thread receives."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return math_equal(gold, response) if in_main_thread else _worker().equal(gold, response)


def _equal_pairs(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """`_equal` of many (ground truth, response), for the judge."""
    return [_equal(gold, response) for gold, response in pairs]


def _unreadable_math(gold: str) -> str:
    return (
        f"ground truth {gold!r} is nothing that math-verify can read; expected a number, an expression, LaTeX, True or "
        "False, yes or no, or the letter of an option"
    )


def _check_math(record: Mapping[str, Any]) -> None:
    gold = record.get("ground_truth", "")
    if _equal(gold, "") is None:
        raise RequestError(f"problem {record['id']!r}: {_unreadable_math(gold)}")


def math_equal(gold: str, response: str) -> bool | None:
    """Whether a response's answer equals the gold answer; None if the gold answer cannot be parsed.

    True and False, yes and no, and option letters are compared as names (grading.py), all others by math-verify. A
    response without an answer is not equal, and neither is one whose comparison takes longer than five seconds.
    """
    from math_verify import verify

    named = read_truth(gold)
    if named is not None:
        return named.agrees(response)
    gold_answers = _gold(gold)
    if not gold_answers:
        return None
    return bool(verify(gold_answers, _parse(response)))


@functools.lru_cache(maxsize=4096)
def _gold(gold: str) -> list[Any]:
    # math-verify reads bare LaTeX such as \frac12 only inside a box or dollar signs
    marked = "\\boxed" in gold or "$" in gold or not gold.strip()
    return _parse(gold if marked else f"\\boxed{{{gold}}}")


def _parse(text: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # priority 0: a boxed answer wins over any other expression of the response
    return parse(text, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()])


class _MathWorker:
    """A subprocess that verifies answers in its main thread, one at a time, for this process's other threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, gold: str, response: str) -> bool | None:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                command = [
                    sys.executable,
                    "-c",
                    "from gradstore.trainer.sampling.rewards import serve_math; serve_math()",
                ]
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            process = self._process
            if process.stdin is None or process.stdout is None:
                raise RuntimeError("the verifier process has no pipes")
            process.stdin.write(json.dumps([gold, response]).encode() + b"\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], HARD_LIMIT_S)[0]:
                line = process.stdout.readline()
                if line:
                    return json.loads(line)
            process.kill()
            process.wait()
            self._process = None
            return False


def serve_math() -> None:
    """Server loop: for each line [gold, response] on stdin, print true, false or null."""
    for line in sys.stdin:
        print(json.dumps(math_equal(*json.loads(line))), flush=True)


@functools.cache
def _worker() -> _MathWorker:
    return _MathWorker()


def _reasoning_gym(record: Mapping[str, Any], response: str, rollout_index: int) -> float:
    """Score of the data set's own verifier.

    The problem's extra["reasoning_gym"] holds {"dataset": name, "entry": {"question", "answer", "metadata"}}, or the
    same as JSON text. It also holds "config": {...} if the verifier depends on the data set's settings.
    """
    name = f"problem {record['id']!r}"
    verifier, entry = _gym_entry(record)
    try:
        return verifier(answer_of(response), entry)
    except Exception as error:  # noqa: BLE001 - a hundred verifiers by many authors may raise anything
        # Some verifiers raise for an answer of an unexpected form. To distinguish this from a broken entry, grade the
        # entry's own answer, which every verifier can judge.
        try:
            verifier(str(entry["answer"]), entry)
        except Exception:  # noqa: BLE001
            raise RequestError(f"{name}: {_broken_entry(error)}") from error
        return 0.0


def _gym_entry(record: Mapping[str, Any]) -> tuple[Callable[[str, dict], float], dict[str, Any]]:
    """A problem's verifier and entry; RequestError if the problem lacks them."""
    name = f"problem {record['id']!r}"
    kept = parsed_field(detail(record, "reasoning_gym"), name, "extra.reasoning_gym")
    if not isinstance(kept, Mapping) or not isinstance(kept.get("entry"), Mapping) or "dataset" not in kept:
        raise RequestError(f"{name}: reward 'reasoning-gym' needs extra.reasoning_gym with 'dataset' and 'entry'")
    try:
        verifier = _verifier(kept["dataset"], json.dumps(kept.get("config") or {}, sort_keys=True))
    except (ValueError, TypeError, AssertionError) as error:
        raise RequestError(f"{name}: no reasoning-gym data set {kept['dataset']!r} so configured: {error}") from None
    entry = _with_tuples(kept["entry"]) if kept["dataset"] in COMPARE_TUPLES else dict(kept["entry"])
    return verifier, entry


def _check_gym(record: Mapping[str, Any]) -> None:
    """RequestError if the verifier cannot judge the entry's own answer."""
    verifier, entry = _gym_entry(record)
    try:
        verifier(str(entry["answer"]), entry)
    except Exception as error:
        raise RequestError(f"problem {record['id']!r}: {_broken_entry(error)}") from error


def _broken_entry(error: Exception) -> str:
    return f"reasoning-gym cannot use extra.reasoning_gym.entry: {type(error).__name__}: {error}"


def _with_tuples(value: Any) -> Any:
    """Convert JSON's lists back to tuples, recursively."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


@functools.lru_cache(maxsize=256)
def _verifier(dataset: str, config: str) -> Callable[[str, dict], float]:
    import reasoning_gym

    return reasoning_gym.create_dataset(dataset, **json.loads(config)).score_answer


def answer_of(response: str) -> str:
    """The answer in a response: the content of its last <answer> tags, or the whole text without tags; stripped."""
    answers = re.findall(r"<answer>(.*?)</answer>", response, flags=re.DOTALL)
    return (answers[-1] if answers else response).strip()


BUILT_IN: Mapping[str, Callable[[Mapping[str, Any], str, int], Any]] = {"math": _math, "reasoning-gym": _reasoning_gym}
CHECKS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {"math": _check_math, "reasoning-gym": _check_gym}
"""Checks of the built-in rewards: RequestError for a problem that cannot be graded."""


def _user(function: Callable[..., Any], spec: str, record: Mapping[str, Any], response: str, rollout_index: int) -> Any:
    verl = to_verl(dict(record))
    try:
        return function(
            data_source=verl["data_source"],
            solution_str=response,
            ground_truth=verl["reward_model"]["ground_truth"],
            extra_info=verl["extra_info"] | {"rollout_index": rollout_index},
        )
    except Exception as error:
        kind = type(error).__name__
        raise RequestError(f"problem {record['id']!r}: reward {spec!r} raised {kind}: {error}") from error


def _imported(spec: str, module: str, function: str) -> Callable[..., Any]:
    try:
        if module.endswith(".py"):
            loaded = _from_file(Path(module))
        else:
            # as `python -m` does: make modules of the current folder importable, whatever command runs this
            sys.path.insert(0, os.getcwd())
            try:
                loaded = importlib.import_module(module)
            finally:
                sys.path.remove(os.getcwd())
    except Exception as error:
        raise RequestError(f"reward {spec!r}: cannot import {module}: {type(error).__name__}: {error}") from error
    found = getattr(loaded, function, None)
    if not callable(found):
        raise RequestError(f"reward {spec!r}: {module} has no function {function!r}")
    return found


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file {path}")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise ImportError(f"{path} is not Python source")
    loaded = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(loaded)
    return loaded
