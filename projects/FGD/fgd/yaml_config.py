"""Read Detectron2 yaml configs without ever executing code from them.

Detectron2 opens configs with ``yaml.unsafe_load``. The plain safe loader is too strict, though:
the model zoo's own ``Base-RetinaNet.yaml`` computes its anchor sizes in a
``!!python/object/apply:eval`` tag. That one tag is read here by a small calculator (numbers,
lists, arithmetic, comprehensions); every other python tag is refused.
"""

import ast
import operator
import os
from functools import reduce
from operator import getitem
from typing import Any, Iterator, Tuple

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode
from fvcore.common.config import BASE_KEY

from .errors import UserError

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}
_MODEL_ZOO = "model_zoo://"
_SEVERAL_TYPES = frozenset({"MODEL.TIMM.PRETRAINED"})  # keys that take values of several types
_MAX_EXPONENT = 64  # 2**64 is beyond any config; bounds the time and memory of `**`


def calculate(expression: str):
    """Value of an arithmetic expression over numbers and lists, e.g. ``"[x * 2 for x in [1, 2]]"``.

    Raises:
        UserError: anything else is in it (calls, attributes, strings, ...).
    """
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body, {})
    except (SyntaxError, RecursionError, ArithmeticError, TypeError) as error:
        raise UserError(f"cannot calculate {expression!r}: {error}") from None


def _value(node: ast.expr, names: dict):
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, names) for item in node.elts]
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return -_number(node.operand, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, exponent = _number(node.left, names), _number(node.right, names)
        if abs(exponent) <= _MAX_EXPONENT and abs(base) <= 2**16:
            return base**exponent
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_number(node.left, names), _number(node.right, names))
    if isinstance(node, ast.ListComp) and len(node.generators) == 1:
        loop = node.generators[0]
        if isinstance(loop.target, ast.Name) and not loop.ifs:
            items = _value(loop.iter, names)
            return [_value(node.elt, {**names, loop.target.id: item}) for item in items]
    raise UserError(f"refused: {ast.unparse(node)!r} is not plain arithmetic on numbers and lists")


def _number(node: ast.expr, names: dict):
    """Operands are numbers only, so that ``[0] * 10**9`` cannot fill the memory."""
    value = _value(node, names)
    if not isinstance(value, (int, float)):
        raise UserError(f"refused: {ast.unparse(node)!r} is not a number")
    return value


class _Loader(yaml.SafeLoader):
    """SafeLoader plus the one tag that Detectron2's own configs use."""


def _construct_eval(loader: _Loader, node: yaml.Node):
    arguments = loader.construct_sequence(node)
    if len(arguments) != 1 or not isinstance(arguments[0], str):
        raise UserError(f"refused: eval tag with {arguments!r}; expected one expression")
    return calculate(arguments[0])


_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _construct_eval)


def parse_yaml(text: str, source: str) -> dict:
    """A config's mapping; an empty text gives ``{}``.

    Raises:
        UserError: not yaml, not a mapping, or it contains code. ``source`` names the file.
    """
    try:
        # The loader is a SafeLoader; yaml.safe_load cannot take a loader.
        content = yaml.load(text, Loader=_Loader)
    except yaml.constructor.ConstructorError as error:
        raise UserError(
            f"{source}: refused, it contains code or an unknown tag ({error.problem})"
        ) from None
    except (yaml.YAMLError, UserError) as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected a yaml mapping, found a {type(content).__name__}")
    return content


class SafeCfgNode(CfgNode):
    """Detectron2's CfgNode whose files, ``_BASE_`` files included, are read by `parse_yaml`."""

    def merge_from_other_cfg(self, cfg_other: CfgNode) -> None:
        self._let_types_change([key for key, _ in leaves(cfg_other)])
        super().merge_from_other_cfg(cfg_other)

    def merge_from_list(self, cfg_list: list) -> None:
        self._let_types_change(cfg_list[::2])
        super().merge_from_list(cfg_list)

    def _let_types_change(self, keys: list) -> None:
        """yacs takes a value of another type only in place of None."""
        for key in _SEVERAL_TYPES.intersection(keys):
            path, _, name = key.rpartition(".")
            reduce(getitem, path.split("."), self)[name] = None

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
        with cls._open_cfg(filename) as file:
            content = parse_yaml(file.read(), filename)
        bases = content.pop(BASE_KEY, [])
        merged: dict = {}
        for base in [bases] if isinstance(bases, str) else bases:
            _merge(cls.load_yaml_with_base(_base_path(base, filename)), merged)
        _merge(content, merged)
        return merged


def _base_path(base: str, filename: str) -> str:
    """``_BASE_`` is relative to the file that names it, absolute, or ``model_zoo://…/x.yaml``."""
    if base.startswith(_MODEL_ZOO):
        return model_zoo.get_config_file(base[len(_MODEL_ZOO) :])
    return os.path.join(os.path.dirname(filename), os.path.expanduser(base))


def _merge(source: dict, target: dict) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(value, target[key])
        else:
            target[key] = value


def leaves(node: dict, prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """("MODEL.ROI_HEADS.NAME", value) of every value of a config or of its parsed yaml."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
