"""Read Detectron2 yaml configs without ever executing code from them, within a second.

Detectron2 opens configs with ``yaml.unsafe_load``. The plain safe loader is too strict, though:
the model zoo's own ``Base-RetinaNet.yaml`` computes its anchor sizes in a
``!!python/object/apply:eval`` tag. That one tag is read here by a small calculator; every other
python tag is refused. The plain safe loader is also too patient: a few lines can stand for more
values than a memory holds.
"""

import os
from functools import reduce
from operator import getitem
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from fvcore.common.config import BASE_KEY

from fgd_inputs.json_file import shown

from .calculator import MAX_STEPS, calculate
from .errors import UserError

_MODEL_ZOO = "model_zoo://"
SEVERAL_TYPES = frozenset({"MODEL.TIMM.PRETRAINED"})  # keys that take values of several types
_EVAL = "tag:yaml.org,2002:python/object/apply:eval"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
# A whole config of this project has 340 values in 10 kB, 5 levels deep.
MAX_BYTES = 2**18
MAX_VALUES = 10_000
MAX_DEPTH = 30
MAX_FILES = 100  # that `_BASE_` may lead to
_MAX_DIGITS = 400
_MAX_TEXT = 4096  # yacs parses each text as Python, which fails on long ones in many ways


class _Loader(yaml.SafeLoader):
    """SafeLoader plus the one tag that Detectron2's own configs use, and limits.

    They are kept while nodes are made, before anything is built from them. An alias counts with
    all that it stands for.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = self.values = 0
        self.sizes: Dict[int, int] = {}  # values of each finished node, by its id

    def compose_node(self, parent: yaml.Node, index: Any) -> yaml.Node:
        alias, event = self.check_event(yaml.AliasEvent), self.peek_event()
        before, self.depth = self.values, self.depth + 1
        if self.depth > MAX_DEPTH:
            _refuse(event, f"it is nested more than {MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if not alias:
            _check_node(node)
            self.values += 1 + (node.tag == _EVAL) * MAX_STEPS
            self.sizes[id(node)] = self.values - before
        elif id(node) not in self.sizes:
            _refuse(event, f"{event.anchor!r} contains itself")
        else:
            self.values += self.sizes[id(node)]
        if self.values > MAX_VALUES:
            _refuse(event, f"it stands for more than {MAX_VALUES} values")
        return node


def _check_node(node: yaml.Node) -> None:
    if isinstance(node, yaml.ScalarNode):
        if node.tag in _NUMBERS and len(node.value) > _MAX_DIGITS:
            _refuse(node, f"a number of {len(node.value)} digits")
        if len(node.value) > _MAX_TEXT:
            _refuse(node, f"a text of {len(node.value)} characters, the most is {_MAX_TEXT}")
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in node.value:
            if key.tag == _MERGE:
                continue
            if key.tag != _TEXT:
                _refuse(key, f"the key {shown(key.value)} is no text")
            if key.value in seen:
                _refuse(key, f"the key {shown(key.value)} occurs twice, and one would be lost")
            seen.add(key.value)


def _refuse(where, why: str) -> None:
    """``where``: a node or an event."""
    raise UserError(f"line {where.start_mark.line + 1}: {why}")


def _construct_eval(loader: _Loader, node: yaml.Node):
    arguments = loader.construct_sequence(node)
    if len(arguments) != 1 or not isinstance(arguments[0], str):
        raise UserError(f"refused: eval tag with {shown(arguments)}; expected one expression")
    return calculate(arguments[0])


_Loader.add_constructor(_EVAL, _construct_eval)


def parse_yaml(text: str, source: str) -> dict:
    """A config's mapping; an empty text gives ``{}``.

    Raises:
        UserError: not yaml, not a mapping, too much of it, or it contains code. ``source`` names
            the file.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"{source}: {len(text)} characters, a config has at most {MAX_BYTES}")
    try:
        # The loader is a SafeLoader; yaml.safe_load cannot take a loader.
        content = yaml.load(text, Loader=_Loader)
    except yaml.constructor.ConstructorError as error:
        raise UserError(
            f"{source}: refused, it contains code or an unknown tag ({error.problem})"
        ) from None
    except (yaml.YAMLError, UserError) as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from None
    except Exception as error:  # PyYAML's own, where a text does not fit its tag: of any type
        raise UserError(f"{source}: a value does not fit its tag ({shown(str(error))})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected a yaml mapping, found a {type(content).__name__}")
    return content


def read_yaml(path: str) -> dict:
    """`parse_yaml` of a file, which may also be any address of Detectron2.

    Raises:
        UserError: also if there is no such file, or it is Python code.
    """
    if path.endswith(".py"):
        raise UserError(f"config {path}: Python code, which is never executed; give a yaml file")
    try:
        local = PathManager.get_local_path(path)
        if not os.path.isfile(local):  # nor a pipe, which would be waited for
            raise UserError(f"config {path}: no such file")
        with open(local, "rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"config {path}: not UTF-8 (byte {error.start})") from None
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"config {path}: cannot be read ({error})") from None
    return parse_yaml(text, path)


class SafeCfgNode(CfgNode):
    """Detectron2's CfgNode whose files, ``_BASE_`` files included, are read by `read_yaml`."""

    def merge_from_other_cfg(self, cfg_other: CfgNode) -> None:
        """As in yacs, and a whole number may stand where the default is a fraction: 0 for 20.0."""
        given = cfg_other.clone()
        self._let_types_change([key for key, _ in leaves(given)])
        _widen(given, self)
        super().merge_from_other_cfg(given)

    def merge_from_list(self, cfg_list: list) -> None:
        """`merge_from_other_cfg` for keys and values in turn."""
        given = list(cfg_list)
        self._let_types_change(given[::2])
        known = dict(leaves(self))
        for position in range(1, len(given), 2):
            value = self._decode_cfg_value(given[position])
            if type(value) is int and type(known.get(given[position - 1])) is float:
                given[position] = float(value)
        super().merge_from_list(given)

    def _let_types_change(self, keys: list) -> None:
        """yacs takes a value of another type only in place of None."""
        for key in SEVERAL_TYPES.intersection(keys):
            path, _, name = key.rpartition(".")
            reduce(getitem, path.split("."), self)[name] = None

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
        merged = _read_with_bases(filename, [], [])
        version = merged.get("VERSION", 2)
        if type(version) is not int:  # which Detectron2 compares with numbers
            raise UserError(f"config {filename}: VERSION is {shown(version)}; expected 1 or 2")
        return merged


def _widen(given: dict, known: dict) -> None:
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(known.get(key), dict):
            _widen(value, known[key])
        elif type(value) is int and type(known.get(key)) is float:
            given[key] = float(value)


def _read_with_bases(path: str, above: Sequence[str], read: List[str]) -> dict:
    """A file over what its ``_BASE_`` names.

    Args:
        above: the files that have led to it. read: all read so far, in place.
    """
    chain = [*above, path]
    if os.path.realpath(path) in map(os.path.realpath, above):
        raise UserError(f"config {path}: _BASE_ leads in a circle: {_shown_chain(chain)}")
    read.append(path)
    if len(read) > MAX_FILES:
        raise UserError(
            f"config {chain[0]}: _BASE_ leads to more than {MAX_FILES} files: {_shown_chain(chain)}"
        )
    content = read_yaml(path)
    bases = content.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(x, str) and x for x in bases):
        raise UserError(f"config {path}: _BASE_ is {shown(bases)}; expected a file, or several")
    merged: dict = {}
    for base in bases:
        try:
            found = _base_path(base, path)
        except RuntimeError:
            raise UserError(f"config {path}: _BASE_ {base} is not in the model zoo") from None
        _merge(_read_with_bases(found, chain, read), merged)
    _merge(content, merged)
    return merged


def _shown_chain(paths: Sequence[str]) -> str:
    cut = [*paths[:4], f"... {len(paths) - 8} more ...", *paths[-4:]]
    return " -> ".join(paths if len(paths) <= 10 else cut)


def _base_path(base: str, filename: str) -> str:
    """``_BASE_`` is relative to the file that names it, absolute, or ``model_zoo://…/x.yaml``."""
    if base.startswith(_MODEL_ZOO):
        return model_zoo.get_config_file(base[len(_MODEL_ZOO) :])
    return os.path.join(os.path.dirname(filename), os.path.expanduser(base))


def _merge(source: dict, target: dict) -> None:
    for key, value in source.items():
        if isinstance(value, dict):
            # Of its own: what an alias stands for in two places is changed in one of them.
            own = target.get(key)
            target[key] = own if isinstance(own, dict) else {}
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
