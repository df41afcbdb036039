"""Command: what in a graph TensorRT would refuse, run slowly or get wrong. Needs no TensorRT.

From what TensorRT 10 and 11 document about their ONNX parser, and from open reports of operators
that they compute wrongly. A graph without findings is likely to be parsed; only building an engine
and comparing it with ONNX Runtime proves more.
"""

import argparse
from collections import Counter
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from deploy.errors import ParityError, run_main
from deploy.serving.graph_file import load_graph

OPSET = 20  # TensorRT 10.0 takes 9 to 20
TOP_K = 3840
NMS_BOXES = 5000
BATCH = 2  # put in place of a dynamic batch to see that all other sizes are constant
_BY_DATA = ("NonZero", "NonMaxSuppression", "Unique", "Compress")  # sizes that depend on values
_CONTROL = ("If", "Loop", "Scan")
# Engines with these build and run. What makes them wrong (batches, typing, neighbouring nodes)
# differs between the reports, so all are refused.
_WRONG = "wrong values without an error in TensorRT"
_AGAIN = "; export again with --target tensorrt"
REPORTED = {
    "GridSample": f"{_WRONG} 10.13 to 11.1 (NVIDIA/TensorRT#4813, #4646){_AGAIN}",
    "Mod": f"{_WRONG} 10.7 (NVIDIA/TensorRT#4702){_AGAIN}",
    "CumSum": f"{_WRONG} since 10.8 (NVIDIA/TensorRT#4551, #4513)",
    "GroupNormalization": f"{_WRONG} 10.16 (NVIDIA/TensorRT#4756)",
    "Or": f"{_WRONG} (NVIDIA/TensorRT#4512)",
}
_EXAMPLES = """examples:
  python -m deploy.trt_lint model_final_onnx/model.onnx

Exit codes: 0 nothing found; 2 not a model; 4 findings, one line each. Notes are no findings.
"""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `where` names the node or the tensor."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def lint(model: onnx.ModelProto) -> List[Finding]:
    """Everything found, in the order of the graph; [] when there is nothing."""
    constants = _constants(model.graph)
    found = _lint_model(model)
    for node in model.graph.node:
        found += [Finding(_name(node), text) for text in _lint_node(node, constants)]
    if not any(finding.text.startswith("operator set") for finding in found):
        found += _lint_sizes(model)
    return found


def notes(model: onnx.ModelProto) -> List[str]:
    """What the user must know about a graph without findings."""
    count = Counter(node.op_type for node in model.graph.node)
    texts = []
    if count["DeformConv"]:
        texts.append(f"{count['DeformConv']} DeformConv: TensorRT 10.1 or later")
    if count["RoiAlign"]:
        texts.append(f"{count['RoiAlign']} RoiAlign: the parser inserts TensorRT's own plugin")
    return texts


def _lint_model(model: onnx.ModelProto) -> List[Finding]:
    found = []
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > OPSET:
            text = f"operator set {opset.version}, TensorRT 10.0 takes up to {OPSET}"
            found.append(Finding("the graph", text))
    for value in model.graph.input:
        kind = value.type.tensor_type
        if kind.elem_type == onnx.TensorProto.INT64:
            found.append(Finding(f"input {value.name}", "int64; use int32"))
        if any(not size.HasField("dim_value") for size in kind.shape.dim[1:]):
            found.append(Finding(f"input {value.name}", "a size other than the batch is dynamic"))
    for value in model.graph.output:
        kind = value.type.tensor_type
        if any(not size.HasField("dim_value") for size in kind.shape.dim[1:]):
            found.append(Finding(f"output {value.name}", "a size other than the batch varies"))
    return found + _lint_uint8(model.graph)


def _lint_uint8(graph: onnx.GraphProto) -> List[Finding]:
    """uint8 may be an input that is cast, and nothing else."""
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    bytes_in = {name for name, kind in kinds.items() if kind == onnx.TensorProto.UINT8}
    found = []
    for node in graph.node:
        if node.op_type == "Cast":
            to = next(attribute.i for attribute in node.attribute if attribute.name == "to")
            if to == onnx.TensorProto.UINT8:
                found.append(Finding(_name(node), "makes uint8, which only an input may be"))
        elif bytes_in & set(node.input):
            found.append(Finding(_name(node), "reads uint8, which only Cast may"))
    return found


def _lint_node(node: onnx.NodeProto, constants: Dict[str, np.ndarray]) -> List[str]:
    """Texts about one node, which hold for it alone."""
    kind = node.op_type
    if node.domain not in ("", "ai.onnx"):
        return [f"{node.domain}.{kind} is no standard operator"]
    if kind in _CONTROL or "Sequence" in kind or kind.startswith("Optional"):
        return [f"{kind}: control flow and sequences are slow or refused"]
    if kind in _BY_DATA:
        return [f"{kind}: the size of its result depends on data"]
    if kind in REPORTED:
        return [f"{kind}: {REPORTED[kind]}"]
    check = _CHECKS.get(kind)
    return check(node, constants) if check else []


def _lint_top_k(node, constants) -> List[str]:
    k = constants.get(node.input[1])
    if k is None:
        return ["TopK: k is not constant"]
    return [] if k.item() < TOP_K else [f"TopK: k is {k.item()}, must be under {TOP_K}"]


def _lint_quantisation(node, constants) -> List[str]:
    if len(node.input) < 3 or not node.input[2]:
        # without a zero point QuantizeLinear gives uint8
        return [f"{node.op_type}: no zero point"] if node.op_type == "QuantizeLinear" else []
    zero = constants.get(node.input[2])
    if zero is None:
        return [f"{node.op_type}: the zero point is not constant"]
    if zero.dtype == np.uint8:
        return [f"{node.op_type}: to or from uint8, must be int8"]
    return [f"{node.op_type}: the zero point is not 0"] if zero.any() else []


def _lint_roi_align(node, _) -> List[str]:
    if any(attribute.name == "sampling_ratio" for attribute in node.attribute):
        return []
    return ["RoiAlign: no sampling_ratio, which importers read in different ways"]


_CHECKS: Dict[str, Callable[[onnx.NodeProto, Dict], List[str]]] = {
    "TopK": _lint_top_k,
    "QuantizeLinear": _lint_quantisation,
    "DequantizeLinear": _lint_quantisation,
    "RoiAlign": _lint_roi_align,
}


def _lint_sizes(model: onnx.ModelProto) -> List[Finding]:
    """Infer all shapes anew with a fixed batch: what stays unknown depends on data."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for value in fixed.graph.input:
        for size in value.type.tensor_type.shape.dim[:1]:
            size.dim_value = size.dim_value or BATCH
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        graph = onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        return [Finding("the graph", f"shapes cannot be inferred: {' '.join(str(error).split())}")]
    values = (*graph.input, *graph.value_info, *graph.output)
    shapes = {value.name: value.type.tensor_type for value in values}
    unknown = {
        name
        for node in graph.node
        for name in node.output
        if name and not _is_constant(shapes.get(name))
    }
    crowded = [
        Finding(_name(node), f"NonMaxSuppression of over {NMS_BOXES} boxes per image")
        for node in graph.node
        if node.op_type == "NonMaxSuppression"
        and node.input[0] in shapes
        and shapes[node.input[0]].shape.dim[1].dim_value > NMS_BOXES
    ]
    # the first ones only: what follows from them would be a flood
    return crowded + [
        Finding(_name(node), f"{node.op_type}: the size of its result is not constant")
        for node in graph.node
        if unknown & set(node.output) and not unknown & set(node.input)
        if node.op_type not in _BY_DATA  # already named
    ]


def _is_constant(kind: Optional[onnx.TypeProto.Tensor]) -> bool:
    if kind is None or not kind.HasField("shape"):
        return False
    return all(size.HasField("dim_value") for size in kind.shape.dim)


def _constants(graph: onnx.GraphProto) -> Dict[str, np.ndarray]:
    """Small initializers and results of Constant nodes."""
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer if np.prod(t.dims) < 1e5}
    for node in graph.node:
        if node.op_type == "Constant":
            value = onnx.helper.get_attribute_value(node.attribute[0])
            is_tensor = isinstance(value, onnx.TensorProto)
            values[node.output[0]] = numpy_helper.to_array(value) if is_tensor else np.array(value)
    return values


def _name(node: onnx.NodeProto) -> str:
    return node.name or (f"the node that makes {node.output[0]}" if node.output else node.op_type)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.trt_lint",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="an .onnx file")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _run(argv: Optional[Sequence[str]]) -> int:
    args = build_parser().parse_args(argv)
    _, model = load_graph(args.model)
    found = lint(model)
    for line in [*found, *(f"note: {text}" for text in notes(model))]:
        print(line)
    if found:
        raise ParityError(f"{args.model}: {len(found)} findings; not for TensorRT as it is")
    print(f"{args.model}: nothing found")
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    """The command; returns its exit code."""
    return run_main(_run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
