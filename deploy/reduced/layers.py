"""The layers of a graph that have weights: how they are stored, and what they do per value moved.

Needs onnx. Says what precision a file really has, whatever it claims.
"""

from dataclasses import dataclass
from typing import Dict, List, Optional, Set

import numpy as np
import onnx

from deploy.errors import UserError

MATRIX_OPS = ("Conv", "Gemm", "MatMul")  # what int8 kernels and TensorRT both have
_WEIGHTED_OPS = (*MATRIX_OPS, "ConvTranspose", "DeformConv")
_PASSED = {"Transpose", "Reshape", "Identity"}  # between an initializer and the layer
_NAMES = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16"}
_SHARE = 0.99  # of the weights that must have the precision a file claims
# Multiply-accumulates per value read or written, under which a layer is not worth int8: the first
# layer, depthwise and thin pointwise convolutions. Memory is their cost, the conversions around
# them eat the gain, and they lose the most accuracy.
HEAVY = 32.0
_POOLING = ("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax")


@dataclass(frozen=True)
class Layer:
    """One node with weights, number `index` of the graph.

    weight: the initializer's name.  values: its number of elements.
    stored: "fp32", "fp16" or "int8", as the node computes: int8 needs quantised input as well.
    work: multiply-accumulates per input and output value; independent of the image's size.
    pooled: it sees one average per channel, as in squeeze-and-excitation, and costs nothing.
    """

    index: int
    node: str
    op: str
    weight: str
    values: int
    stored: str
    work: float
    pooled: bool = False

    @property
    def heavy(self) -> bool:
        """Whether it is worth int8, and can be had in it."""
        return self.why_light() is None

    def why_light(self) -> Optional[str]:
        """Why the layer stays float in an int8 graph; None if it is heavy."""
        if self.op not in MATRIX_OPS:
            return f"{self.op} has no int8 kernel"
        if self.pooled:
            return "one value per channel"
        if self.work < HEAVY:
            return f"{self.work:.1f} multiply-accumulates per value moved, under {HEAVY:g}"
        return None


def weighted_layers(model: onnx.ModelProto) -> List[Layer]:
    """All layers whose weights are initializers, in the order of the graph."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    pooled = _pooled(model.graph)
    layers = []
    for index, node in enumerate(model.graph.node):
        if node.op_type in _WEIGHTED_OPS:
            path = _to_initializer(node.input[1], initializers, producers)
            if path is not None:
                tensor = initializers[path.pop()]
                layers.append(
                    Layer(
                        index=index,
                        node=node.name,
                        op=node.op_type,
                        weight=tensor.name,
                        values=int(np.prod(tensor.dims)),
                        stored=_stored(node, path, tensor, producers),
                        work=_work(node, tensor.dims),
                        pooled=node.output[0] in pooled,
                    )
                )
    return layers


def check_precision(model: onnx.ModelProto, claimed: str, name: str) -> Dict[str, float]:
    """Shares of the weights' values by how they are stored, "fp32", "fp16" and "int8".

    Args:
        claimed: the `ModelSpec.precision`. Of an fp32 or fp16 graph, 99 % of all weights must be
            stored so; of an int8 graph, of the weights of its `heavy` layers.
        name: of the file, for the message.
    Raises:
        UserError: the graph has not the precision it claims, or no weights at all.
    """
    layers = weighted_layers(model)
    judged = [layer for layer in layers if layer.heavy] if claimed == "int8" else layers
    # a graph without weights, as in tests of clients, claims nothing by fp32
    share = _shares(judged).get(claimed, float(claimed == "fp32"))
    if share < _SHARE:
        kind = "heavy layers" if claimed == "int8" else "layers"
        raise UserError(
            f"{name} claims {claimed}, but of the weights in its {kind} {share:.1%} are; "
            "export it again"
        )
    return _shares(layers)


def _shares(layers: List[Layer]) -> Dict[str, float]:
    total = sum(layer.values for layer in layers)
    kinds = ("fp32", "fp16", "int8")
    sums = {kind: sum(x.values for x in layers if x.stored == kind) for kind in kinds}
    return {kind: value / total for kind, value in sums.items()} if total else {}


def _to_initializer(name: str, initializers: Dict, producers: Dict) -> Optional[List]:
    """Nodes from a layer's weight input back to its initializer, whose name comes last.

    None if it has none: MatMul of two activations.
    """
    path: List = []
    while name not in initializers:
        node = producers.get(name)
        if node is None or node.op_type not in {*_PASSED, "Cast", "DequantizeLinear"}:
            return None
        path.append(node)
        name = node.input[0]
    return [*path, name]


def _stored(node: onnx.NodeProto, path: List, tensor: onnx.TensorProto, producers: Dict) -> str:
    """What the layer computes in, by the nodes between its initializer and its weight input."""
    operators = [step.op_type for step in path]
    if "DequantizeLinear" in operators:
        before = producers.get(node.input[0])
        fed = before is not None and before.op_type == "DequantizeLinear"
        return "int8" if fed and tensor.data_type == onnx.TensorProto.INT8 else "fp32"
    if "Cast" in operators:  # the first is the nearest to the layer
        return _NAMES.get(_attribute(path[operators.index("Cast")], "to", 0), "fp32")
    return _NAMES.get(tensor.data_type, "fp32")


def _work(node: onnx.NodeProto, dims) -> float:
    """Per position of the output (of the input, for ConvTranspose) and in multiply-accumulates."""
    if node.op_type in ("Gemm", "MatMul"):
        return float(np.prod(dims)) / float(sum(dims[-2:]))
    strides = int(np.prod(_attribute(node, "strides", [1])))
    groups = _attribute(node, "group", 1)
    if node.op_type == "ConvTranspose":  # (C in, C out / groups, kernel)
        return float(np.prod(dims)) / (dims[0] + dims[1] * groups * strides)
    return float(np.prod(dims)) / (dims[1] * groups * strides + dims[0])


def _pooled(graph: onnx.GraphProto) -> Set[str]:
    """Tensors computed from averages over positions and from nothing else but constants."""
    constant, pooled = {tensor.name for tensor in graph.initializer} | {""}, set()
    for node in graph.node:
        inputs = set(node.input) - constant
        if not inputs:
            constant.update(node.output)
        elif node.op_type in _POOLING or inputs <= pooled:
            pooled.update(node.output)
    return pooled


def _attribute(node: onnx.NodeProto, name: str, default):
    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default
