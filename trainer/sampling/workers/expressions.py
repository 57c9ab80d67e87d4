"""Read answers as data where verifiers run them as code: Python literals, arithmetic, and expressions for sympy.

reasoning-gym's verifiers call `eval` and sympy's `parse_expr`, which is `eval` too. `literal` stands in for the first;
`check_expression` stops the second before anything is run. Both accept whatever an honest answer holds, and refuse
names, attributes, and numbers that have no end (`9**9**9`).
"""

import ast
import operator
from collections.abc import Callable, Collection
from fractions import Fraction
from typing import Any

BITS = 1 << 20
"""Largest whole number in an answer, in bits; honest ones have fewer than a thousand."""
LONGEST = 100_000
"""Longest text that is read as an expression, in characters."""

Number = int | float | complex | Fraction


class RefusedError(ValueError):
    """The text is not data."""


def literal(source: Any, *_: Any) -> Any:
    """The value of a Python literal, or of arithmetic on numbers; in place of `eval`."""
    if not isinstance(source, str) or len(source) > LONGEST:
        raise RefusedError("expected the text of a value")
    return _value(ast.parse(source.strip(), mode="eval").body)


def check_expression(code: str, names: Collection[str], functions: Collection[str], constants: Collection[str]) -> None:
    """RefusedError for code of sympy's parser that is more than an expression of these functions and constants.

    names: variables that the caller defines.
    """
    if len(code) > LONGEST:
        raise RefusedError(f"an expression of {len(code)} characters")
    tree = ast.parse(code.strip(), mode="eval")
    called = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called.add(_called(node, functions))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node not in called:
            if node.id not in names and node.id not in constants:
                raise RefusedError(f"the name {node.id}")
        elif not isinstance(node, _NODES):
            raise RefusedError(type(node).__name__)
    _size(tree.body)


_NODES = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant),
    *(ast.Tuple, ast.List, ast.operator, ast.unaryop, ast.cmpop),
)


def _called(node: ast.Call, functions: Collection[str]) -> ast.expr:
    """The function of a call: a known name, or `Function('f')` of an undefined one."""
    function = node.func
    if isinstance(function, ast.Call) and isinstance(function.func, ast.Name) and function.func.id == "Function":
        return function
    if not isinstance(function, ast.Name) or function.id not in functions:
        raise RefusedError("a call of something that is no function")
    if node.keywords:
        raise RefusedError("an option of a function")
    return function


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Tuple):
        return tuple(map(_value, node.elts))
    if isinstance(node, ast.List):
        return list(map(_value, node.elts))
    if isinstance(node, ast.Set):
        return set(map(_value, node.elts))
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, ast.BinOp):
        return _applied(node.op, _number(_value(node.left)), _number(_value(node.right)))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_number(_value(node.operand)))
    raise RefusedError(type(node).__name__)


def _number(value: Any) -> Number:
    if not isinstance(value, int | float | complex):
        raise RefusedError("arithmetic on something that is no number")
    return value


def _applied(op: ast.operator, left: Any, right: Any) -> Any:
    """The result of an operation; RefusedError if it has more than BITS bits."""
    if isinstance(left, int | Fraction) and isinstance(right, int | Fraction):
        have, other = _bits(left), _bits(right)
        large: Any = abs(right)
        powers = have * large if abs(Fraction(left)) > 1 else 0
        needed = {ast.Mult: have + other, ast.LShift: have + abs(int(right)), ast.Pow: powers}
        if needed.get(type(op), 0) > BITS:
            raise RefusedError(f"a number of more than {BITS} bits")
        if isinstance(op, ast.Pow) and isinstance(left, Fraction) and large * have > BITS:
            raise RefusedError(f"a number of more than {BITS} bits")
    if type(op) not in _BINARY:
        raise RefusedError(type(op).__name__)
    return _BINARY[type(op)](left, right)


def _bits(number: int | Fraction) -> int:
    if isinstance(number, Fraction):
        return max(number.numerator.bit_length(), number.denominator.bit_length())
    return number.bit_length()


_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
    ast.Not: operator.not_,
}


def _is_endless(node: ast.expr) -> bool:
    """Whether a decimal number in text has an exponent of more than four digits."""
    text = str(node.value) if isinstance(node, ast.Constant) else ""
    return len(text.lower().partition("e")[2].lstrip("+-0")) > 4


def _size(node: ast.AST) -> Any:
    """The exact number that a part of an expression stands for; None if it has symbols or functions.

    RefusedError if it would be too large to compute. Roots and other irrational numbers count as unknown.
    """
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, int) and not isinstance(node.value, bool) else None
    parts = [_size(child) for child in ast.iter_child_nodes(node)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "Float" and any(_is_endless(argument) for argument in node.args):
            raise RefusedError("an endless decimal")
        return _size_of_call(node.func.id, parts[1:])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and parts[1] is not None:
        return -parts[1]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd):
        return parts[1]
    if isinstance(node, ast.BinOp):
        left, op, right = parts[0], node.op, parts[2]
        if isinstance(op, ast.Pow) and isinstance(right, int) and abs(right) > BITS:
            raise RefusedError("an endless power")
        if left is not None and right is not None and isinstance(op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow):
            return _exact(op, left, right)
    return None


def _exact(op: ast.operator, left: Any, right: Any) -> Any:
    if isinstance(op, ast.Div):
        return Fraction(left) / Fraction(right) if right else None
    if isinstance(op, ast.Pow):
        if isinstance(right, Fraction) and right.denominator != 1:
            return None
        return _applied(op, Fraction(left), int(right)) if left or right > 0 else None
    return _applied(op, left, right)


def _size_of_call(name: str, arguments: list[Any]) -> Any:
    if name in ("factorial", "factorial2", "gamma", "fibonacci", "binomial") and any(
        isinstance(value, int | Fraction) and abs(Fraction(value)) > 10_000 for value in arguments
    ):
        raise RefusedError(f"an endless {name}")
    if name == "Integer" and len(arguments) == 1:
        return arguments[0]
    if name == "Rational" and len(arguments) == 2 and None not in arguments and arguments[1]:
        return Fraction(arguments[0], arguments[1])
    if name == "Pow" and len(arguments) == 2 and None not in arguments:
        return _exact(ast.Pow(), *arguments)
    return None
