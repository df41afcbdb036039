"""Cut a graph behind its network, to see what selecting the detections costs. Needs onnx."""

from typing import Set

import onnx
from onnx import helper

from deploy.errors import UserError
from deploy.reduced.layers import weighted_layers


def network_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """The part of a detector up to its last layers with weights; the inputs stay.

    What is left out: decoding, score selection and NMS behind the heads. Of a two-stage detector,
    the selection of proposals stays in, because the box head needs it.

    Returns:
        A model whose outputs are the tensors that the removed part would read.
    Raises:
        UserError: no layer with weights, or nothing behind them.
    """
    graph = model.graph
    network = _ancestors(graph, {layer.index for layer in weighted_layers(model)})
    made = {name for i in network for name in graph.node[i].output}
    for i, node in enumerate(graph.node):  # without them the last layers would run in float
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] in made:
            network |= _ancestors(graph, {i})
            made.update(node.output)
    rest = [node for i, node in enumerate(graph.node) if i not in network]
    needed = {name for node in rest for name in node.input} & made
    if not needed:
        raise UserError("the graph has no layer with weights whose output is processed further")
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    for name in ("node", "output", "initializer", "value_info"):
        cut.graph.ClearField(name)
    cut.graph.node.extend(node for i, node in enumerate(graph.node) if i in network)
    read = {name for node in cut.graph.node for name in node.input}
    cut.graph.initializer.extend(value for value in graph.initializer if value.name in read)
    # types are left to ONNX Runtime's own inference
    cut.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in sorted(needed))
    return cut


def _ancestors(graph: onnx.GraphProto, nodes: Set[int]) -> Set[int]:
    """Indices of `nodes` and of all nodes that they depend on."""
    producer = {name: i for i, node in enumerate(graph.node) for name in node.output}
    found, pending = set(), list(nodes)
    while pending:
        i = pending.pop()
        if i not in found:
            found.add(i)
            pending += [producer[name] for name in graph.node[i].input if name in producer]
    return found
