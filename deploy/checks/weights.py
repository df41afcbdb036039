"""Initializers of a graph beside those of its checkpoint, by name. Needs onnx."""

from dataclasses import dataclass, field, replace
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import onnx
from onnx import numpy_helper

from deploy.checks.inventory import FOLDED_BIAS
from fgd_inputs.names import one_line

# In units of the dtype's epsilon: batch norms folded by another PyTorch may round differently in
# float32; float16 weights are those, rounded once.
_ROUNDINGS = {"float32": 16, "float64": 16, "float16": 1}
_HALF_STEP = 0.501  # of int8: rounding to the nearest step moves a value no further
_QUANTISED = "_quantized"  # what ONNX Runtime's quantiser appends to a weight's name
_MANY = 10  # differing initializers, and a tenth of all, that are no accident
_SHOWN = 8  # of them in a text


@dataclass(frozen=True)
class Comparison:
    """total: initializers that both have.  differing: name -> what differs, in the graph's order.
    missing: of the reference, not in the graph.  extra: the other way round."""

    total: int
    differing: Dict[str, str] = field(default_factory=dict)
    missing: List[str] = field(default_factory=list)
    extra: List[str] = field(default_factory=list)

    def only(self, kept: Callable[[str], bool]) -> "Comparison":
        """Without the differences of other names."""
        differing = {name: text for name, text in self.differing.items() if kept(name)}
        missing, extra = list(filter(kept, self.missing)), list(filter(kept, self.extra))
        return replace(self, differing=differing, missing=missing, extra=extra)

    def found(self) -> List[str]:
        """Reasons to refuse the graph; so many differences are another training, not a change."""
        found, count = [], len(self.differing)
        if count >= max(_MANY, self.total / 10):
            found.append(f"different weights: {count} of {self.total} initializers differ")
        elif count:
            verb = "initializer differs" if count == 1 else "initializers differ"
            found.append(f"{count} {verb} from the checkpoint's: {next(iter(self.differing))}")
        for names, text in (
            (self.missing, "not in the graph"),
            (self.extra, "in the graph, but not the checkpoint's"),
        ):
            if names:
                more = ", ..." if len(names) > 3 else ""
                found.append(f"{len(names)} initializers {text}: {', '.join(names[:3])}{more}")
        return found

    def lines(self) -> List[str]:
        """For a person: how many are equal, and what of the others differs by how much."""
        texts = [f"  {one_line(name)}, {text}" for name, text in self.differing.items()]
        more = [f"  and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
        equal = self.total - len(texts)
        head = f"weights: {equal} of {self.total} initializers are the checkpoint's"
        return [head, *texts[:_SHOWN], *more]


def compare_weights(model: onnx.ModelProto, reference: onnx.ModelProto) -> Comparison:
    """Compare the initializers of equal names. Those of int8 may be half a step away.

    Args:
        reference: a float graph; of an int8 one after `quantize.fold_batch_norms`.
    """
    expected, differing, extra, seen = _arrays(reference), {}, [], set()
    readers = {name: node for node in reversed(model.graph.node) for name in node.input}
    for name, array, step in _stored(model):
        # a bias that layers share has a numbered copy in int8 for each of them
        original = name if name in expected else name.rstrip("0123456789")
        if original not in expected:
            extra.append(name)
            continue
        seen.add(original)
        allowed = _rounding(original, expected[original]) if step is None else _HALF_STEP * step
        text = _difference(array, expected[original], allowed)
        if text:
            node = readers.get(name) or readers.get(name + _QUANTISED)
            reader = f"{node.op_type} {node.name}" if node else "nothing"
            differing.setdefault(original, f"read by {one_line(reader)}: {text}")
    missing = [name for name in expected if name not in seen]
    return Comparison(len(seen), differing, missing, extra)


def _arrays(model: onnx.ModelProto) -> Dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def _stored(model: onnx.ModelProto) -> Iterator[Tuple[str, np.ndarray, Optional[np.ndarray]]]:
    """Name in float, values, and the step between two of them in int8 (None of a float tensor).

    Scales and zero points are left out: those of activations come from images, and those of weights
    are in the values.
    """
    arrays, used = _arrays(model), set()
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            used.update(node.input[1:])
        elif node.op_type == "DequantizeLinear":
            used.update(node.input[1:])
            values = _dequantise(node, arrays)
            if values is not None:
                used.add(node.input[0])
                yield node.input[0].removesuffix(_QUANTISED), *values
    yield from ((name, array, None) for name, array in arrays.items() if name not in used)


def _dequantise(node, arrays) -> Optional[Tuple[np.ndarray, np.ndarray]]:
    """(values, step of each) of a node that reads an initializer; None if it reads none."""
    given = [arrays.get(name, np.array("")) for name in [*node.input, ""][:3]]
    if [array.dtype.kind for array in given[:2]] != ["i", "f"]:
        return None
    values, scale = given[0].astype(np.float64), given[1].astype(np.float64)
    zero = given[2] if given[2].dtype.kind == "i" else np.zeros_like(scale)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    if scale.ndim == 1 and -values.ndim <= axis < values.ndim:
        shape = [-1 if i == axis % values.ndim else 1 for i in range(values.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    try:
        floats = ((values - zero) * scale).astype(np.float32)
    except ValueError:  # nothing that a quantiser wrote
        return None
    return (floats, scale) if floats.shape == values.shape else None


def _rounding(name: str, expected: np.ndarray) -> np.ndarray:
    """How far each value may be away, by another order of the same arithmetic."""
    if expected.dtype.name not in _ROUNDINGS:
        return np.zeros(())
    size = np.where(np.isfinite(expected), np.abs(expected.astype(np.float64)), 0)
    if name.endswith(FOLDED_BIAS):
        size = size.max(initial=0)  # a difference of two products, whose rounding may exceed it
    return _ROUNDINGS[expected.dtype.name] * np.finfo(expected.dtype).eps * size


def _difference(found: np.ndarray, expected: np.ndarray, allowed: np.ndarray) -> str:
    """What differs, and by how much; "" if nothing does."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        kinds = [f"{array.dtype} {list(array.shape)}" for array in (found, expected)]
        return f"it is {kinds[0]}, not {kinds[1]}"
    a, b = found.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        distance = np.abs(a - b)
        far = (found != expected) & ~((a != a) & (b != b))
        far &= ~((distance <= allowed) & (distance > 0))
    if not far.any():
        return ""
    if found.size == 1:
        return f"{found.item():g}, not {expected.item():g}"
    return (
        f"{far.sum():,} of {far.size:,} values differ, by up to {distance[far].max():.3g} (largest "
        f"value {np.abs(b).max():.3g})"
    )


def other_nodes(model: onnx.ModelProto, reference: onnx.ModelProto) -> Optional[str]:
    """Where two graphs differ beside their initializers and metadata; None if they do not."""
    if _without_weights(model) == _without_weights(reference):
        return None
    pairs = zip(model.graph.node, reference.graph.node)
    for i, (node, other) in enumerate(pairs):
        if node != other:
            titles = [f"{x.op_type} {x.name}" for x in (node, other)]
            if titles[0] != titles[1]:
                return f"node {i} is {titles[0]}, not {titles[1]}"
            return f"node {i}, {titles[0]}, has other inputs, outputs or attributes"
    counts = [len(x.graph.node) for x in (model, reference)]
    if counts[0] != counts[1]:
        return f"{counts[0]} nodes, not {counts[1]}"
    return "other inputs, outputs, types or operator sets"


def _without_weights(model: onnx.ModelProto) -> bytes:
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    bare.graph.ClearField("initializer")
    bare.ClearField("metadata_props")
    return bare.SerializeToString(deterministic=True)
