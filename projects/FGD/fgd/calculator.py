"""The arithmetic that Detectron2's own configs contain, calculated within bounds."""

import ast
import math
import operator
from typing import Union

from fgd_inputs.json_file import shown

from .errors import UserError

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
# Each far beyond what the model zoo needs: 63 characters, 73 steps, numbers up to 813. Together
# they bound time and memory, also of comprehensions in comprehensions.
MAX_CHARACTERS = 1000
MAX_STEPS = 1000
_MAX_NUMBER = 2**63
_MAX_EXPONENT = 64


def calculate(expression: str):
    """Value of an arithmetic expression over numbers and lists, e.g. ``"[x * 2 for x in [1, 2]]"``.

    It has at most `MAX_STEPS` values, lists and what is in them.

    Raises:
        UserError: anything else is in it (calls, attributes, strings, ...), or too much of it.
    """
    if len(expression) > MAX_CHARACTERS:
        raise UserError(
            f"refused: an expression of {len(expression)} characters, the most is {MAX_CHARACTERS}"
        )
    try:
        return _Calculation().value(ast.parse(expression.strip(), mode="eval").body, {})
    except (SyntaxError, ValueError, ArithmeticError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot calculate {shown(expression)}: {error}") from None
    except (RecursionError, MemoryError):
        raise UserError(f"cannot calculate {shown(expression)}: nested too deeply") from None


class _Calculation:
    """Walks over an expression and counts its steps."""

    def __init__(self):
        self.steps = 0

    def value(self, node: ast.expr, names: dict):
        self._count(1)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return _bounded(node.value)
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self.value(item, names) for item in node.elts]
        if isinstance(node, ast.Name) and node.id in names:
            # Paid for again: lists of the same list are as large as if each were its own.
            self._count(_size(names[node.id]))
            return names[node.id]
        if isinstance(node, ast.UnaryOp) and type(node.op) is ast.USub:
            return -self._number(node.operand, names)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return self._combined(node, names)
        if isinstance(node, ast.ListComp) and len(node.generators) == 1:
            loop = node.generators[0]
            if isinstance(loop.target, ast.Name) and not loop.ifs:
                items = self.value(loop.iter, names)
                return [self.value(node.elt, {**names, loop.target.id: item}) for item in items]
        text = shown(ast.unparse(node))
        raise UserError(f"refused: {text} is not plain arithmetic on numbers and lists")

    def _count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise UserError(f"refused: it takes more than {MAX_STEPS} steps to calculate")

    def _combined(self, node: ast.BinOp, names: dict) -> Union[int, float]:
        left, right = self._number(node.left, names), self._number(node.right, names)
        if isinstance(node.op, ast.Pow) and abs(right) > _MAX_EXPONENT:
            raise UserError(f"refused: the exponent {right} is beyond {_MAX_EXPONENT}")
        return _bounded(_OPERATORS[type(node.op)](left, right))

    def _number(self, node: ast.expr, names: dict) -> Union[int, float]:
        """Operands are numbers only, so that ``[0] * 10**9`` cannot fill the memory."""
        value = self.value(node, names)
        if not isinstance(value, (int, float)):
            raise UserError(f"refused: {shown(ast.unparse(node))} is not a number")
        return value


def _bounded(value) -> Union[int, float]:
    """UserError for numbers that no config has; complex ones are roots of negative ones."""
    real = isinstance(value, (int, float))
    if not real or math.isnan(value) or abs(value) > _MAX_NUMBER:
        raise UserError(f"refused: a number as {shown(value)} is in no config")
    return value


def _size(value) -> int:
    return sum(map(_size, value)) + 1 if isinstance(value, list) else 0
