"""What the entries of a weight file must be, before anything is built or run with them.

A file may come from anywhere: PyTorch copies integers into weights without a word, and a bad
iteration shows only when results are written.
"""

import math
from typing import Any, Callable, Dict, Mapping, NamedTuple, Union

import numpy as np
import torch

from fgd_inputs.json_file import shown

from .errors import UserError

FORMAT = "fgd-1"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)  # of buffers that are tables of positions, and of counters
_ARRAYS = tuple(np.dtype(kind) for kind in ("f2", "f4", "f8", "i4", "i8"))
_COUNTER = "num_batches_tracked"  # of batch norm: without effect, see `fgd.weights`
# Far beyond what a training state has; a pickle of a few bytes can be endless.
_MAX_DEPTH = 50
_MAX_VALUES = 2_000_000

Weights = Mapping[str, Union[torch.Tensor, np.ndarray]]


class _Entry(NamedTuple):
    expected: str
    fits: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and all(map(_is_text, value)))


def _is_teacher(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None
    return all(map(_is_text, [*value, *value.values()])) and {"weights", "sha256"} <= value.keys()


def _is_data(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(map(_is_text, [*value, *value.values()]))
    )


def _is_iteration(value: Any) -> bool:
    return value is None or (type(value) is int and -1 <= value < 2**53)


def _is_best(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None
    texts = {key: x for key, x in value.items() if key not in ("figure", "iteration")}
    return (
        _is_data(texts)
        and "metric" in texts
        and type(value.get("figure")) is float
        and math.isfinite(value["figure"])
        and type(value.get("iteration")) is int
        and _is_iteration(value["iteration"])
    )


_ANYONES = {
    "format": _Entry("a text", _is_text),
    "classes": _Entry("a list of texts", _is_names),
    "iteration": _Entry("a whole number from -1 on", _is_iteration),
}
_OWN = {
    "checksum": _Entry("a text", _is_text),
    "config": _Entry("the text of a config", lambda value: value is None or _is_text(value)),
    "full_config": _Entry("the text of a config", _is_text),
    "teacher": _Entry("None, or a dict of the texts weights and sha256", _is_teacher),
    "data": _Entry("None, or a dict of texts", _is_data),
    "best": _Entry("None, or a dict of metric, figure and iteration", _is_best),
    "raw": _Entry("a dict of tensors", lambda value: isinstance(value, dict)),
    "distiller": _Entry("a dict of tensors", lambda value: isinstance(value, dict)),
    "trainer": _Entry("a dict", lambda value: isinstance(value, dict)),
    "rng": _Entry("a list", lambda value: isinstance(value, list)),
}


def check_entries(checkpoint: Dict[str, Any]) -> None:
    """Raise UserError for an entry of another type, by name: what was found, what is expected.

    Args:
        checkpoint: with "model". Of files in this project's format, all that it writes is looked
            at; of others, what this project reads.
    """
    _check_nesting(checkpoint)
    _check_names(checkpoint, "part")
    own = checkpoint.get("format") == FORMAT
    for name, entry in {**_ANYONES, **(_OWN if own else {})}.items():
        if name in checkpoint and not entry.fits(checkpoint[name]):
            raise UserError(
                f"its entry {name!r} is {shown(checkpoint[name])}; expected {entry.expected}"
            )
    model = checkpoint["model"]
    if not isinstance(model, dict) or not model:
        raise UserError("it holds no weights")
    check_weights(model)
    if own:
        for name in ("distiller", "raw"):
            check_weights(checkpoint.get(name, {}))


def check_weights(weights: Dict[Any, Any]) -> None:
    """Raise UserError for a name that is no text, or a value that is no tensor of numbers."""
    _check_names(weights, "weight")
    for name, value in weights.items():
        if not isinstance(value, (torch.Tensor, np.ndarray)):
            raise UserError(f"not a weight file: {shown(name)} is a {type(value).__name__}")
        array = isinstance(value, np.ndarray)
        # Arrays of the other byte order, too, have a dtype of their own.
        if value.dtype not in (_ARRAYS if array else _FLOATS + _INTEGERS):
            kind = repr(value.dtype.str) if array else str(value.dtype).removeprefix("torch.")
            raise UserError(
                f"{shown(name)} is of {kind}; weights are of float16, bfloat16, float32 or "
                "float64, in this machine's byte order. Convert the file"
            )
        if not array and (value.layout is not torch.strided or value.device.type != "cpu"):
            raise UserError(f"{shown(name)} is no plain tensor ({value.layout}, {value.device})")


def check_kinds(weights: Weights, state: Mapping[str, torch.Tensor], *, renamed: bool) -> None:
    """Raise UserError if integers are to become fractions, or fractions integers.

    Args:
        weights: of the file.  state: of the model that they are for.
        renamed: names of the file are not those of the model, so none of them may be integers.
    """
    for name, value in weights.items():
        own = state.get(name, state.get(name.removeprefix("module.")))  # that of DDP
        if name.endswith(_COUNTER) or (own is None and not renamed):
            continue
        dtypes = [str(value.dtype), "float" if own is None else str(own.dtype)]
        if len({"float" in dtype for dtype in dtypes}) > 1:
            found, wanted = (dtype.removeprefix("torch.") for dtype in dtypes)
            raise UserError(f"{shown(name)} is of {found} in the file, of {wanted} in the model")


def _check_names(content: Dict[Any, Any], what: str) -> None:
    for name in content:
        if not isinstance(name, str):
            raise UserError(f"the name of a {what} is {shown(name)}; expected a text")


def _check_nesting(content: Any) -> None:
    level, count = [content], 0
    for _ in range(_MAX_DEPTH):
        below = []
        for value in level:
            items = value.values() if isinstance(value, dict) else value
            if isinstance(value, (dict, list, tuple, set, frozenset)):
                count += len(items)
                if count > _MAX_VALUES:
                    raise UserError(f"it stands for more than {_MAX_VALUES} values")
                below.extend(items)
        level = below
        if not level:
            return
    raise UserError(f"it is nested more than {_MAX_DEPTH} levels deep, or contains itself")
