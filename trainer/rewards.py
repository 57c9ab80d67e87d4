"""Rewards: what a response to a problem is worth, by a verifier named in one word or by the user's own function.

- `math`: math-verify compares the response's boxed answer, or its last expression, with the ground truth.
- `reasoning-gym`: the data set's own verifier, on the entry kept in the problem's `extra["reasoning_gym"]`.
- `module:function` or `file.py:function`: a function with verl's `compute_score` signature.
"""

import functools
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from gradstore import to_verl
from gradstore.errors import RequestError

HARD_LIMIT_S = 60
"""After this long a verification outside the main thread is given up: the answer counts as not equal."""

COMPARE_TUPLES = frozenset({"arc_agi", "rearc"})
"""reasoning-gym data sets whose verifiers compare tuples: given the lists of a JSON file they pay no right answer."""


@dataclass(frozen=True)
class Reward:
    """A reward function with a name. Called with (record, response text, number of the rollout), gives a float.

    Raises RequestError, naming the problem, when the function gives anything but a finite number.
    """

    name: str
    score: Callable[[Mapping[str, Any], str, int], Any]

    def __call__(self, record: Mapping[str, Any], response: str, rollout_index: int) -> float:
        value = self.score(record, response, rollout_index)
        name = f"problem {record['id']!r}: reward {self.name!r}"
        if isinstance(value, Mapping):
            if "score" not in value:
                raise RequestError(f"{name} gave a dict without 'score' (found: {', '.join(map(str, value))})")
            value = value["score"]
        if hasattr(value, "item") and not isinstance(value, Real):  # a scalar of numpy or torch
            value = value.item() if getattr(value, "ndim", 1) == 0 else value
        if not isinstance(value, Real) or not math.isfinite(value):
            raise RequestError(f"{name} gave {value!r} for rollout {rollout_index}, expected a finite number")
        return float(value)


def load_reward(spec: str) -> Reward:
    """The reward of this name: "math", "reasoning-gym", "module:function" or "file.py:function".

    Raises RequestError for a name that is none of these and for a function that cannot be imported.
    """
    if spec == "math":
        return Reward(spec, _math)
    if spec == "reasoning-gym":
        return Reward(spec, _reasoning_gym)
    module, colon, function = spec.partition(":")
    if not colon or not module or not function:
        raise RequestError(
            f"unknown reward {spec!r}, expected 'math', 'reasoning-gym', 'module:function' or 'file.py:function'"
        )
    return Reward(spec, functools.partial(_user, _imported(spec, module, function), spec))


def _math(record: Mapping[str, Any], response: str, rollout_index: int) -> float:
    """1.0 when math-verify finds the answer equal to the ground truth, else 0.0."""
    gold = record.get("ground_truth", "")
    # math-verify stops a runaway comparison by a signal, which only a process's main thread can receive
    in_main_thread = threading.current_thread() is threading.main_thread()
    equal = math_equal(gold, response) if in_main_thread else _worker().equal(gold, response)
    if equal is None:
        raise RequestError(
            f"problem {record['id']!r}: ground truth {gold!r} is nothing that math-verify can read; "
            "expected a number, an expression or LaTeX"
        )
    return float(equal)


def math_equal(gold: str, response: str) -> bool | None:
    """Whether a response's answer equals the gold answer; None when the gold answer cannot be read.

    A response without an answer, and a comparison that takes longer than five seconds, are not equal.
    """
    from math_verify import verify

    gold_answers = _gold(gold)
    if not gold_answers:
        return None
    return bool(verify(gold_answers, _parse(response)))


@functools.lru_cache(maxsize=4096)
def _gold(gold: str) -> list[Any]:
    # bare LaTeX such as \frac12 is read only inside a box or dollars
    marked = "\\boxed" in gold or "$" in gold or not gold.strip()
    return _parse(gold if marked else f"\\boxed{{{gold}}}")


def _parse(text: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # priority 0: a boxed answer wins over any other expression of the response
    return parse(text, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()])


class _MathWorker:
    """A process whose main thread verifies for the threads of this one, one answer at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, gold: str, response: str) -> bool | None:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                command = [sys.executable, "-c", "from trainer.rewards import serve_math; serve_math()"]
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
    """Answers lines of [gold, response] on standard input with true, false or null on standard output."""
    for line in sys.stdin:
        print(json.dumps(math_equal(*json.loads(line))), flush=True)


@functools.cache
def _worker() -> _MathWorker:
    return _MathWorker()


def _reasoning_gym(record: Mapping[str, Any], response: str, rollout_index: int) -> float:
    """The score of the data set's own verifier.

    The problem's extra["reasoning_gym"] holds {"dataset": name, "entry": {"question", "answer", "metadata"}} and,
    for data sets whose verifier depends on their settings, "config": {...}.
    """
    name = f"problem {record['id']!r}"
    kept = record.get("extra", {}).get("reasoning_gym")
    if not isinstance(kept, Mapping) or not isinstance(kept.get("entry"), Mapping) or "dataset" not in kept:
        raise RequestError(f"{name}: reward 'reasoning-gym' needs extra.reasoning_gym with 'dataset' and 'entry'")
    try:
        verifier = _verifier(kept["dataset"], json.dumps(kept.get("config") or {}, sort_keys=True))
    except (ValueError, TypeError, AssertionError) as error:
        raise RequestError(f"{name}: no reasoning-gym data set {kept['dataset']!r} so configured: {error}") from None
    entry = _with_tuples(kept["entry"]) if kept["dataset"] in COMPARE_TUPLES else dict(kept["entry"])
    try:
        return verifier(answer_of(response), entry)
    except Exception as error:  # noqa: BLE001 - a verifier of a hundred, by a hundred hands
        # Some verifiers raise at an answer of another shape than theirs. They are told from a broken entry by the
        # entry's own answer, which every verifier can judge.
        try:
            verifier(str(entry["answer"]), entry)
        except Exception:  # noqa: BLE001
            kind = type(error).__name__
            raise RequestError(
                f"{name}: reasoning-gym cannot use extra.reasoning_gym.entry: {kind}: {error}"
            ) from error
        return 0.0


def _with_tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were before."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


@functools.lru_cache(maxsize=256)
def _verifier(dataset: str, config: str) -> Callable[[str, dict], float]:
    import reasoning_gym

    return reasoning_gym.create_dataset(dataset, **json.loads(config)).score_answer


def answer_of(response: str) -> str:
    """The answer in a response: what its last <answer> tags hold, or without tags all of it, stripped."""
    answers = re.findall(r"<answer>(.*?)</answer>", response, flags=re.DOTALL)
    return (answers[-1] if answers else response).strip()


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
            # as `python -m` would: modules of the current folder can be named, whatever command runs this
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
