"""What two graphs of one detector differ in: nodes, and initializers by name. Needs onnx."""

from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple

import numpy as np
import onnx
from onnx import numpy_helper

from deploy.checks.inventory import FOLDED_BIAS

# In units of the dtype's epsilon: batch norms folded by another PyTorch may round differently in
# float32; float16 weights are those, rounded once.
_ROUNDINGS = {"float32": 16, "float64": 16, "float16": 1}
_MANY = 10  # differing initializers, and a tenth of all, that are no accident


@dataclass(frozen=True)
class TensorDifference:
    """One initializer that is not the reference's.

    largest: absolute difference; None where dtype or shape differ.  scale: the reference's largest
    absolute value.  changed: values that differ, of `values`.  readers: nodes that read it.
    """

    name: str
    readers: str
    largest: Optional[float]
    scale: float
    changed: int
    values: int
    note: str

    def text(self) -> str:
        """One line."""
        what = f"{self.name}, read by {self.readers}: "
        if self.largest is None:
            return what + self.note
        return what + (
            f"{self.changed:,} of {self.values:,} values differ, by up to {self.largest:.3g} "
            f"(largest value {self.scale:.3g})" + (f"; {self.note}" if self.note else "")
        )


@dataclass
class Comparison:
    """Initializers of a graph beside those of a reference, by name."""

    equal: int = 0  # to the last bit
    rounded: int = 0  # apart by rounding only
    differences: List[TensorDifference] = field(default_factory=list)  # in the graph's order
    missing: List[str] = field(default_factory=list)  # of the reference, not in the graph
    extra: List[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Initializers that both have."""
        return self.equal + self.rounded + len(self.differences)

    @property
    def other_weights(self) -> bool:
        """Whether so many differ that this is another training rather than a change."""
        return len(self.differences) >= max(_MANY, self.total / 10)


def compare_initializers(
    model: onnx.ModelProto, reference: onnx.ModelProto, by_position: bool = False
) -> Comparison:
    """Compare the initializers of equal names; those of one graph alone are listed.

    Args:
        by_position: the structure is equal, so compare what nodes read in the same place, under
            the reference's names: the exporter stores equal tensors once, under one of their names.
    """
    found, expected = _initializers(model), _initializers(reference)
    if by_position:
        pairs = _pairs_by_position(model, reference)
    else:
        pairs = [(name, name) for name in _in_order(model) if name in expected]
    readers, result = _readers(reference if by_position else model), Comparison()
    for ours, theirs in pairs:
        a, b = numpy_helper.to_array(found[ours]), numpy_helper.to_array(expected[theirs])
        if a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes():
            result.equal += 1
        elif _within_rounding(theirs, a, b):
            result.rounded += 1
        else:
            where = ", ".join(readers.get(theirs, ["nothing"])[:3]) + _folded(theirs, expected)
            result.differences.append(_describe(theirs, where, a, b))
    paired = [{pair[i] for pair in pairs} for i in (0, 1)]
    result.extra = [name for name in found if name not in paired[0]]
    result.missing = [name for name in expected if name not in paired[1]]
    return result


def structure_difference(model: onnx.ModelProto, reference: onnx.ModelProto) -> Optional[str]:
    """The first node, input or output that is another in the reference; None if all are equal.

    Names of initializers do not count.
    """
    for kind in ("input", "output"):
        pair = [getattr(x.graph, kind) for x in (model, reference)]
        if [v.SerializeToString() for v in pair[0]] != [v.SerializeToString() for v in pair[1]]:
            return f"the graph's {kind}s are not the reference's"
    nodes, others = model.graph.node, reference.graph.node
    held = [_initializers(x).keys() for x in (model, reference)]
    for i, (node, other) in enumerate(zip(nodes, others)):
        if (node.op_type, node.domain) != (other.op_type, other.domain):
            return f"node {i} is {_title(node)}, not {_title(other)}"
        reads = [[None if n in h else n for n in x.input] for x, h in zip((node, other), held)]
        if reads[0] != reads[1] or node.output != other.output:
            return f"node {i}, {_title(node)}, reads or makes other tensors"
        changed = _attribute_difference(node, other)
        if changed:
            return f"node {i}, {_title(node)}: {changed}"
    if len(nodes) != len(others):
        return f"{len(nodes)} nodes, not {len(others)}"
    return None


def _attribute_difference(node: onnx.NodeProto, other: onnx.NodeProto) -> Optional[str]:
    a, b = ({x.name: x for x in y.attribute} for y in (node, other))
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            values = [
                onnx.helper.get_attribute_value(x[name]) if name in x else "absent" for x in (a, b)
            ]
            return f"{name} is {values[0]}, not {values[1]}"
    return None


def _pairs_by_position(model, reference) -> List[Tuple[str, str]]:
    """(initializer, the reference's) that are read in the same place, each pair once."""
    found, expected = _initializers(model), _initializers(reference)
    places = (
        zip(node.input, other.input) for node, other in zip(model.graph.node, reference.graph.node)
    )
    pairs = ((a, b) for place in places for a, b in place if a in found and b in expected)
    return list(dict.fromkeys(pairs))


def _in_order(model: onnx.ModelProto) -> List[str]:
    """Names of the initializers, first read first."""
    held = _initializers(model)
    read = (name for node in model.graph.node for name in node.input if name in held)
    return list(dict.fromkeys([*read, *held]))


def _initializers(model: onnx.ModelProto) -> Dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _readers(model: onnx.ModelProto) -> Dict[str, List[str]]:
    """Tensor -> nodes that read it, with the operator's own name for that input, in order."""
    readers: Dict[str, List[str]] = {}
    opset = {entry.domain: entry.version for entry in model.opset_import}
    for node in model.graph.node:
        known = onnx.defs.has(node.op_type, node.domain) and node.domain in opset
        schema = known and onnx.defs.get_schema(node.op_type, opset[node.domain], node.domain)
        for i, name in enumerate(node.input):
            role = schema.inputs[min(i, len(schema.inputs) - 1)].name if known else f"input {i}"
            readers.setdefault(name, []).append(f"{_title(node)} as {role}")
    return readers


def _folded(name: str, names) -> str:
    """What the exporter made of the student's own tensors, for a message."""
    if name.endswith(FOLDED_BIAS) and name.removesuffix(FOLDED_BIAS) in names:
        return f" (from the batch norm behind {name.removesuffix(FOLDED_BIAS)})"
    return " (its batch norm folded in)" if name + FOLDED_BIAS in names else ""


def _title(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name}".strip()


def _within_rounding(name: str, found: np.ndarray, expected: np.ndarray) -> bool:
    if found.dtype != expected.dtype or found.shape != expected.shape or found.dtype.kind != "f":
        return False
    a, b = found.astype(np.float64), expected.astype(np.float64)
    size = np.abs(b)
    if name.endswith(FOLDED_BIAS):
        size = size.max()  # a difference of two products, whose rounding may exceed it
    return bool(
        (np.abs(a - b) <= _ROUNDINGS[found.dtype.name] * np.finfo(found.dtype).eps * size).all()
    )


def _describe(name: str, readers: str, a: np.ndarray, b: np.ndarray) -> TensorDifference:
    if a.dtype != b.dtype or a.shape != b.shape:
        note = f"it is {a.dtype} {list(a.shape)}, not {b.dtype} {list(b.shape)}"
        return TensorDifference(name, readers, None, 0.0, a.size, a.size, note)
    same = (a == b) | ((a != a) & (b != b))
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        largest = float(np.abs(np.where(same, 0.0, x - y)).max())
    scale = float(np.abs(y).max())
    note = _note(x, y, same)
    return TensorDifference(name, readers, largest, scale, int((~same).sum()), a.size, note)


def _note(a: np.ndarray, b: np.ndarray, same: np.ndarray) -> str:
    """What kind of change it looks like; "" for none in particular."""
    if not np.isfinite(a).all():
        return "NaN or infinity"
    parts = []
    if a.ndim and len(a) > 1:
        rows = np.flatnonzero(~same.reshape(len(a), -1).all(axis=1))
        if len(rows) <= min(4, len(a) - 1):
            parts.append(f"at index {', '.join(map(str, rows))} of its first axis")
    if a.size > 1 and np.array_equal(np.sort(a, axis=None), np.sort(b, axis=None)):
        return "; ".join([*parts, "the same values in another order"])
    changed = ~same & (b != 0)
    ratios = a[changed] / b[changed]
    if a.size == 1:
        parts.append(f"{a.item():g}, not {b.item():g}")
    elif changed.sum() == (~same).sum() and np.ptp(ratios) <= 1e-4 * abs(ratios[0]):
        parts.append(f"times {ratios[0]:.6g}")
    return "; ".join(parts)
