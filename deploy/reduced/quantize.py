"""int8: Q/DQ around the layers that are worth it, made by onnxruntime.quantization."""

import io
import logging
import tempfile
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Set

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from deploy.reduced.layers import MATRIX_OPS, weighted_layers
from deploy.spec import ModelSpec

# Of an activation's values, how many its range covers. All of them: outliers cost up to 0.45 AP
# (symmetric ranges); 99.99: cuts off the few largest logits, which are the objects, up to 0.4 AP.
PERCENTILE = 99.999
_FOLLOWERS = ("Relu", "MaxPool", "Add")  # quantised where all they read is


@dataclass(frozen=True)
class Recipe:
    """How one runtime wants its Q/DQ; weights are int8, symmetric, a scale per output channel.

    activations: the type of activations.  followers: operators quantised behind the layers.
    options: of onnxruntime.quantization.
    """

    activations: QuantType
    followers: tuple = ()
    options: Dict = field(default_factory=dict)


# "onnx": what x86 kernels want, outputs quantised too. "tensorrt": every zero point 0, and Q/DQ at
# the inputs of layers only, so that it fuses what follows a layer itself; biases stay float.
RECIPES = {
    "onnx": Recipe(QuantType.QUInt8, _FOLLOWERS),
    "tensorrt": Recipe(
        QuantType.QInt8,
        options={
            "ActivationSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": list(MATRIX_OPS),
        },
    ),
}


def int8_model(
    model: onnx.ModelProto, spec: ModelSpec, reader: CalibrationDataReader, recipe: str
) -> onnx.ModelProto:
    """The float32 graph with its `heavy` layers (see `layers.Layer`) in int8.

    Args:
        model: from `convert.to_onnx`.  spec: of the new file.
        reader: calibration batches, one at a time.  recipe: key of `RECIPES`.
    """
    chosen, folded = RECIPES[recipe], fold_batch_norms(model)
    nodes = [layer.node for layer in weighted_layers(folded) if layer.heavy]
    nodes += _followers(folded, set(nodes), chosen.followers)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder, "int8.onnx")
        quantize_static(
            folded,
            path,
            reader,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*MATRIX_OPS, *_FOLLOWERS],
            nodes_to_quantize=nodes,
            per_channel=True,
            activation_type=chosen.activations,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.Percentile,
            # the last one: activations of one image at a time in memory, whatever its name says
            extra_options={
                **chosen.options,
                "CalibPercentile": PERCENTILE,
                "CalibStridedMinMax": 1,
            },
        )
        quantised = onnx.load(path)
    _finish(quantised, model, spec)
    return quantised


def fold_batch_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the batch norms that alone follow a convolution, computed in float64.

    Left by the exporter where levels share a convolution: each level gets weights of its own.
    """
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    graph = folded.graph
    values = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in graph.initializer}
    reads = [name for node in graph.node for name in node.input]
    reads += [output.name for output in graph.output]
    convolutions = {node.output[0]: node for node in graph.node if node.op_type == "Conv"}
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        convolution = convolutions.get(norm.input[0])
        if convolution is not None and reads.count(norm.input[0]) == 1:
            _fold(graph, convolution, norm, values)
    read = {name for node in graph.node for name in node.input}
    unused = [tensor for tensor in graph.initializer if tensor.name not in read]
    for tensor in unused:
        graph.initializer.remove(tensor)
    return folded


def _fold(graph, convolution, norm, values: Dict[str, np.ndarray]) -> None:
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    scale, shift, mean, variance = (values[name] for name in norm.input[1:])
    factor = scale / np.sqrt(variance + epsilon)
    weight = values[convolution.input[1]]
    bias = values[convolution.input[2]] if len(convolution.input) > 2 else 0.0
    names = [f"{norm.output[0]}.weight", f"{norm.output[0]}.bias"]
    new = (weight * factor.reshape(-1, 1, 1, 1), (bias - mean) * factor + shift)
    for name, value in zip(names, new):
        graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    del convolution.input[1:]
    convolution.input.extend(names)
    convolution.output[0] = norm.output[0]
    graph.node.remove(norm)


def _followers(model: onnx.ModelProto, chosen: Set[str], operators) -> List[str]:
    """Nodes of these operators that read nothing but what chosen nodes and other followers make."""
    made = {name for node in model.graph.node if node.name in chosen for name in node.output}
    found = []
    for node in model.graph.node:
        if node.op_type in operators and made.issuperset(node.input):
            made.update(node.output)
            found.append(node.name)
    return found


@contextmanager
def _quiet():
    """Without the warning to preprocess, which we did, and what the calibrator prints."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _finish(quantised: onnx.ModelProto, model: onnx.ModelProto, spec: ModelSpec) -> None:
    """What the quantiser added or dropped beside nodes: names of operator sets, producer, types."""
    del quantised.opset_import[:]
    quantised.opset_import.extend(model.opset_import)
    quantised.producer_name, quantised.producer_version = model.producer_name, ""
    del quantised.metadata_props[:]
    onnx.helper.set_model_props(quantised, spec.to_metadata())
    onnx.checker.check_model(quantised, full_check=True)
