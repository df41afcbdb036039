"""How configs are read and checked. Rooms hand in their keys: `fgd/__init__.py` lists them."""

import math
import os
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Sequence

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg

from fgd_inputs.json_file import shown

from .errors import UserError
from .yaml_config import SEVERAL_TYPES, SafeCfgNode, leaves, parse_yaml

META_ARCHITECTURE = "Distiller"
_SHOWN = 150  # characters at either end of another library's message


class Keys(NamedTuple):
    """The config keys of one room.

    Attributes:
        add: gives a config the keys with their defaults, in place.
        check: raises UserError for settings that cannot work: key, what was found, what is allowed.
    """

    add: Callable[[CfgNode], None]
    check: Optional[Callable[[CfgNode], None]] = None


_KEYS: List[Keys] = []


def hand_in(*keys: Keys) -> None:
    """Make keys part of every config from now on."""
    _KEYS.extend(keys)


def add_fgd_config(cfg: CfgNode) -> None:
    """Add the project's keys, all off by default, to a Detectron2 config, in place."""
    for keys in _KEYS:
        keys.add(cfg)


def check_config(cfg: CfgNode) -> None:
    """Refuse settings that cannot work, before anything is built.

    Raises:
        UserError: names the key, what was found and what is allowed.
    """
    for keys in _KEYS:
        if keys.check is not None:
            keys.check(cfg)


def check_device(device: str, key: str = "MODEL.DEVICE") -> None:
    """Raise UserError if PyTorch does not know the device or there is none; ``key`` set it."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"{key}: {device!r} is not a device; use cuda or cpu") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key} is cuda, but PyTorch finds no GPU; add {key} cpu")


def get_fgd_cfg() -> CfgNode:
    """Detectron2's defaults plus this project's keys; its files are read without executing code."""
    cfg = SafeCfgNode(get_cfg())
    add_fgd_config(cfg)
    return cfg


def find_config_file(path: str) -> str:
    """The local path itself or the model zoo's file of that name; UserError if there is none."""
    path = os.path.expanduser(path)
    if os.path.isfile(path) or "://" in path:
        return path
    try:
        return model_zoo.get_config_file(path)
    except RuntimeError:
        raise UserError(
            f"config {path!r}: no such file, and Detectron2's model zoo has none of that name"
        ) from None


def load_config(path: str = "", opts: Sequence[str] = ()) -> CfgNode:
    """Defaults, then the file (if any), then ``KEY VALUE`` pairs. Not frozen.

    A text that begins with "~" names a file in the home folder.

    Raises:
        UserError: missing file, unknown key, wrong type, a number that is not finite, code in the
            file; names file and key.
    """
    cfg = get_fgd_cfg()
    if path:
        with _merging(cfg, path):
            cfg.merge_from_file(find_config_file(path), allow_unsafe=False)
    with _merging(cfg, "command line"):
        cfg.merge_from_list(list(opts))
    return cfg


@contextmanager
def _merging(cfg: CfgNode, source: str):
    """Inside, values are merged into ``cfg``; all that can be wrong with them is one UserError.

    Detectron2 and yacs report a bad config through exceptions of any type.
    """
    try:
        yield
        _check_values(cfg)
        _find_home(cfg)
    except UserError as error:
        text = str(error)
        raise UserError(text if source in text else f"{source}: {text}") from error
    except (RecursionError, MemoryError):
        raise UserError(f"{source}: a value is nested too deeply to be read") from None
    except Exception as error:
        text = " ".join(str(error.args[-1] if error.args else type(error).__name__).split())
        text = text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} ... {text[-_SHOWN:]}"
        raise UserError(f"{source}: {text}") from error


def _check_values(cfg: CfgNode) -> None:
    """Raise UserError where yacs does not look: inside of lists, at null, at numbers."""
    defaults = dict(leaves(get_fgd_cfg()))
    for key, value in leaves(cfg):
        default, items = defaults.get(key), list(_items(value))
        for item in items:
            most = {int: 2**63, float: math.inf}.get(type(item))
            if most is not None and not abs(item) < most:
                raise UserError(f"{key}: {shown(item)} is no number to calculate with")
        if default is None or key in SEVERAL_TYPES:  # it may be anything
            continue
        if value is None:
            raise UserError(f"{key}: null; expected a value as {shown(default)}")
        expected = set(map(_kind, _items(default)))
        if expected and not expected.issuperset(map(_kind, items)):
            raise UserError(f"{key}: {shown(value)}; expected {' or '.join(sorted(expected))}")


def _items(value: Any) -> Iterator[Any]:
    """What nested lists hold; of anything else, itself."""
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, (list, tuple)):
            yield from _items(item)
        else:
            yield item


def _kind(value: Any) -> str:
    kinds = {int: "numbers", float: "numbers", bool: "numbers", str: "texts"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _find_home(node: CfgNode, above: str = "") -> None:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            _find_home(value, f"{above}{key}.")
        elif isinstance(value, str) and value.startswith("~"):
            node[key] = os.path.expanduser(value)
            if node[key] == value:
                raise UserError(f"{above}{key} {value}: there is no such home folder")


def load_config_text(text: str, source: str) -> CfgNode:
    """A config that is stored as text, e.g. in a checkpoint; errors as in `load_config`."""
    cfg = get_fgd_cfg()
    with _merging(cfg, source):
        cfg.merge_from_other_cfg(SafeCfgNode(parse_yaml(text, source)))
    return cfg


def checkpoint_config(cfg: CfgNode) -> CfgNode:
    """`student_config` of a model that a checkpoint will fill: nothing else is fetched for it."""
    student = student_config(cfg)
    student.MODEL.WEIGHTS, student.MODEL.TIMM.PRETRAINED = "", False
    return student


def student_config(cfg: CfgNode) -> CfgNode:
    """A clone that builds the student alone: its meta-architecture, and no distiller node."""
    student = cfg.clone()
    student.defrost()
    if student.MODEL.META_ARCHITECTURE == META_ARCHITECTURE:
        student.MODEL.META_ARCHITECTURE = student.MODEL.DISTILLER.STUDENT
    student.MODEL.pop("DISTILLER", None)
    return student
