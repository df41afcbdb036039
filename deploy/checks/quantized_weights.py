"""Weights of an int8 graph as floats again, to be compared with a checkpoint's. Needs onnx."""

from typing import Dict, Set

import numpy as np
import onnx
from onnx import numpy_helper

_SUFFIX = "_quantized"  # what ONNX Runtime's quantiser appends to a weight's name
_HALF_STEP = 0.501  # rounding to the nearest step moves a value no further


def with_float_weights(model: onnx.ModelProto, reference: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose quantised weights are float, under the names they have in float32.

    Where each value is the reference's rounded to a step of its scale, it becomes the reference's;
    so what still differs is no matter of quantisation. Scales and zero points are left out: those
    of activations come from images, and those of weights are in the floats.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in copy.graph.initializer}
    expected = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in reference.graph.initializer
    }
    used_up: Set[str] = set()
    floats: Dict[str, np.ndarray] = {}
    for node in copy.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        used_up.update(node.input[1:])
        if node.op_type == "DequantizeLinear" and node.input[0] in arrays:
            used_up.add(node.input[0])
            name = _original(node.input[0].removesuffix(_SUFFIX), expected)
            floats[name] = _nearest(node, arrays, expected.get(name), floats.get(name))
            node.input[0] = name
    kept = [tensor for tensor in copy.graph.initializer if tensor.name not in used_up]
    kept = [tensor for tensor in kept if not _is_copy(tensor.name, arrays, expected)]
    kept += [numpy_helper.from_array(array, name) for name, array in floats.items()]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    return copy


def _original(name: str, expected: Dict[str, np.ndarray]) -> str:
    """A bias that layers share has a numbered copy for each of them."""
    return name if name in expected else name.rstrip("0123456789")


def _is_copy(name: str, arrays: Dict[str, np.ndarray], expected: Dict[str, np.ndarray]) -> bool:
    """Whether a float tensor is such a copy, and equal to what it copies."""
    original = _original(name, expected)
    return original != name and np.array_equal(arrays[name], expected.get(original))


def _nearest(node, arrays: Dict[str, np.ndarray], expected, earlier) -> np.ndarray:
    """The node's weight as float32: `expected` if that is within half a step, else as stored.

    Args:
        earlier: what another copy of it gave, which stays if it differs from `expected`.
    """
    if earlier is not None and earlier is not expected:
        return earlier
    values, scale = arrays[node.input[0]].astype(np.float64), arrays[node.input[1]]
    zero = arrays[node.input[2]] if len(node.input) > 2 else np.zeros_like(scale)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    if scale.ndim:
        shape = [-1 if i == axis % values.ndim else 1 for i in range(values.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    values = (values - zero) * scale.astype(np.float64)
    if expected is not None and expected.shape == values.shape:
        if (np.abs(values - expected) <= _HALF_STEP * scale).all():
            return expected
    return values.astype(np.float32)
