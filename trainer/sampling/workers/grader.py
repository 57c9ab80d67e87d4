"""The process that grades: it closes its doors, then answers batches until its keeper ends it.

A batch is {"problems": [...], "items": [[problem's place, response, rollout], ...]}. Each item has one message,
{"n": place, "score": number} or "unusable" (a fault of the problem) or "stopped" (a fault of the response) with a text.
"retire" says that this process is no longer fit to grade and has ended. A response of null asks whether the problem can
be graded at all.
"""

import functools
import resource
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from gradstore.errors import first_line
from gradstore.trainer.sampling.workers import frames
from gradstore.trainer.sampling.workers.auditing import guard, watch
from gradstore.trainer.sampling.workers.confinement import confine, limit_time, readable_paths

Grade = Callable[[Any, str | None, int], Mapping[str, Any]]
"""Grades a response to a problem, and takes the number of its rollout; returns a message without its place."""

_KIBIBYTES = 1 if sys.platform == "darwin" else 1024
"""What one unit of ru_maxrss is in bytes."""


def loaded(role: str, spec: str) -> Grade:
    """Import what a role needs: "math", "reasoning-gym", or "function" of the user's, named by `spec`."""
    if role == "math":
        _math("\\frac{1}{2}+x", "so \\boxed{\\frac{2}{4}+x}, and $y=3$")  # compiles expressions, imports the rest
        return _math
    if role == "reasoning-gym":
        _without_pictures()
        import reasoning_gym  # noqa: F401
        import sympy

        from gradstore.trainer.sampling.workers import verifiers  # noqa: F401 - no import after the doors are closed

        sympy.simplify(sympy.parse_expr("(x**2 + sin(x))/2 - log(3*x)"))
        return _reasoning_gym
    from gradstore.trainer.sampling import reward  # noqa: F401
    from gradstore.trainer.sampling.imported import imported

    return functools.partial(_function, imported(spec))


def _without_pictures() -> None:
    """Keep matplotlib out: a package of reasoning-gym imports it to draw, which takes seconds and no verifier does."""
    for name in ("matplotlib", "matplotlib.pyplot", "matplotlib.animation", "mpl_toolkits", "mpl_toolkits.mplot3d"):
        module = ModuleType(name)
        module.__getattr__ = lambda attribute: None  # type: ignore[method-assign]
        sys.modules.setdefault(name, module)


def serve(requests: int, answers: int, role: str, grade: Grade, scratch: str, limits: Mapping[str, float]) -> None:
    """Close the doors, then grade batches from one descriptor and write the messages to the other, for ever."""
    readable = readable_paths(("reasoning_gym", "sympy", "math_verify"))
    if role != "function":
        guard(("reasoning_gym",))
    confine(scratch, readable, int(limits["memory"]))
    place = 0

    def refused(reason: str) -> None:
        frames.write(answers, {"n": place, "stopped": reason, "retire": True})

    if role != "function":
        watch(refused)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTES + int(limits["memory"]) // 2
    while batch := frames.read(requests):
        for place, (problem, response, rollout) in enumerate(batch["items"]):
            limit_time(limits["seconds"])
            result = _graded(grade, batch["problems"][problem], response, rollout)
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTES > largest:
                result["retire"] = True
            frames.write(answers, {"n": place, **result})
            if "retire" in result:
                return


def _graded(grade: Grade, problem: Any, response: str | None, rollout: int) -> dict[str, Any]:
    try:
        return dict(grade(problem, response, rollout))
    except MemoryError:
        return {"stopped": "it needed more memory than a reward may take", "retire": True}
    except BaseException as error:  # noqa: BLE001 - whatever a verifier raises, SystemExit included
        return {"stopped": f"its grading raised {type(error).__name__}: {first_line(error)}"}


def _math(gold: Any, response: str | None, rollout: int = 0) -> Mapping[str, Any]:
    from gradstore.trainer.sampling.grading import grade, interrupted, readable

    if not isinstance(gold, str):
        return {"unusable": ""}
    before = interrupted()
    equal = grade(gold, response) if response is not None else (False if readable(gold) else None)
    if response is not None and interrupted() > before:
        # A time limit cut sympy at any place: neither this verdict nor the next ones of this process are sure.
        return {"stopped": "its comparison took longer than five seconds", "retire": True}
    return {"unusable": ""} if equal is None else {"score": float(equal)}


def _reasoning_gym(kept: Mapping[str, Any], answer: str | None, rollout: int) -> Mapping[str, Any]:
    from gradstore.trainer.sampling.workers.verifiers import UnusableError, verified

    try:
        return {"score": float(verified(kept, answer))}
    except UnusableError as error:
        return {"unusable": str(error)}


def _function(
    function: Callable[..., Any], problem: Mapping[str, Any], response: str | None, rollout: int
) -> Mapping[str, Any]:
    from gradstore.trainer.sampling.reward import as_number

    if response is None:
        return {"score": 0.0}
    try:
        value = function(
            data_source=problem["data_source"],
            solution_str=response,
            ground_truth=problem["ground_truth"],
            extra_info=problem["extra_info"] | {"rollout_index": rollout},
        )
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the user's own code
        return {"unusable": f"raised {type(error).__name__}: {first_line(error)}"}
    try:
        return {"score": as_number(value)}
    except ValueError as error:
        return {"unusable": str(error)}
