"""Stop code that nobody has vouched for inside a grader: sympy's parser reads data only, and Python reports the rest.

`guard` replaces `eval` in the verifiers and checks what sympy's parser is about to run. An audit hook of Python then
refuses all other code that was made from text, and ends the process at calls that no verifier makes.
"""

import os
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

from gradstore.trainer.sampling.workers.expressions import RefusedError, check_expression, literal

_ENDING = ("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.kill", "os.killpg")
_ENDING_PREFIXES = ("subprocess.", "socket.", "pty.", "ctypes.", "signal.pthread_kill")
_RUNNING = {"collections", "dataclasses", "enum", "typing", "sympy.parsing.sympy_parser"}
"""Modules that run code made from text: the standard library's, of their own text; sympy's parser, of what `guard` has
checked."""
_FUNCTIONS = {"Integer", "Float", "Rational", "Symbol", "Function", "sqrt", "cbrt", "root", "ln", "Max", "Min", "max"}
_FUNCTIONS |= {"min", "abs", "Add", "Mul", "Pow"}


def guard(packages: tuple[str, ...]) -> None:
    """Close the ways from text to code in this process, for good.

    packages: verifiers whose modules call `eval`; the modules must have been imported.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in packages and module is not None:
            module.__dict__["eval"] = literal
            module.__dict__["exec"] = _no_exec
    _guard_sympy()


def _guard_sympy() -> None:
    """Check what sympy's parser has made of a text before the parser evaluates it."""
    import sympy
    from sympy.core.function import FunctionClass, UndefinedFunction
    from sympy.parsing import sympy_parser

    known = {name: getattr(sympy, name, None) for name in dir(sympy)}
    classes = {
        name
        for name, value in known.items()
        if isinstance(value, FunctionClass) and not isinstance(value, UndefinedFunction)
    }
    functions = (classes - {"WildFunction", "Lambda"}) | _FUNCTIONS
    constants = {name for name, value in known.items() if isinstance(value, sympy.Basic)}
    written = sympy_parser.stringify_expr

    def stringify_expr(text: str, local_dict: dict, *rest: Any) -> str:
        if len(text) > 20_000:
            raise RefusedError(f"an expression of {len(text)} characters")
        code = written(text, local_dict, *rest)
        check_expression(code, {name for name in local_dict if isinstance(name, str)}, functions, constants)
        return code

    sympy_parser.stringify_expr = stringify_expr


def watch(report: Callable[[str], None]) -> None:
    """Let Python refuse code that was made from text; call `report`, and end the process, where it wants more.

    It can not be undone in this process.
    """

    def hook(event: str, arguments: tuple) -> None:
        if event == "exec":
            _check_code(arguments[0])
        elif event in _ENDING or event.startswith(_ENDING_PREFIXES):
            report(f"it called {event}")
            os._exit(1)

    sys.addaudithook(hook)


def _check_code(code: Any) -> None:
    """RefusedError for code from a text, unless one of the modules in _RUNNING runs it."""
    if not isinstance(code, CodeType) or not code.co_filename.startswith("<"):
        return  # a module on the disk
    caller = sys._getframe(2).f_globals.get("__name__")  # beyond this function and the hook
    if caller not in _RUNNING and not code.co_filename.startswith("<frozen "):
        raise RefusedError(f"code made from text, in {caller}")


def _no_exec(*_: Any) -> None:
    raise RefusedError("code made from text")
