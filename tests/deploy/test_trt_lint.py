"""Every violation is planted in a small graph and must be named."""

import copy

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.trt_lint import lint, main, notes

F, I32, I64, U8 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8


def constant(name, values, dtype=np.int64):
    return numpy_helper.from_array(np.array(values, dtype), name)


def graph_of(nodes, inputs, outputs, constants=(), opset=18):
    values = [helper.make_tensor_value_info(*value) for value in inputs]
    results = [helper.make_tensor_value_info(*value) for value in outputs]
    graph = helper.make_graph(nodes, "g", values, results, list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def good():
    """uint8 pixels -> float -> int8 and back -> the best 5 of a row; a RoIAlign beside it."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["x"], "cast", to=F),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], "dequantize"),
        helper.make_node("ReduceMax", ["y", "axes"], ["row"], "reduce", keepdims=0),
        helper.make_node("TopK", ["row", "k"], ["best", "index"], "top", axis=1),
        helper.make_node("RoiAlign", ["y", "rois", "image"], ["pooled"], "align", sampling_ratio=0),
    ]
    constants = [
        constant("scale", 0.5, np.float32),
        constant("zero", 0, np.int8),
        constant("axes", [1, 2]),
        constant("k", [5]),
        constant("image", [0]),
        constant("rois", [[0, 0, 4, 4]], np.float32),
    ]
    inputs = [("pixels", U8, ["batch", 3, 8, 8])]
    outputs = [("best", F, ["batch", 5]), ("pooled", F, [1, 3, 1, 1])]
    return graph_of(nodes, inputs, outputs, constants)


def node(model, name):
    return next(node for node in model.graph.node if node.name == name)


def set_constant(model, name, values, dtype=np.int64):
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(constant(name, values, dtype))


def add(model, kind, inputs, outputs=("new",), **attributes):
    """A node called "planted"."""
    model.graph.node.append(helper.make_node(kind, inputs, outputs, "planted", **attributes))


def newer_opset(model):
    model.opset_import[0].version = 21


def large_k(model):
    set_constant(model, "k", [3840])
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 4000


def computed_k(model):
    add(model, "Identity", ["k"], ["k2"])
    model.graph.node.insert(0, model.graph.node.pop())
    node(model, "top").input[1] = "k2"


def unsigned_zero_point(model):
    set_constant(model, "zero", 0, np.uint8)


def no_zero_point(model):
    del node(model, "quantize").input[2]


def nonzero_zero_point(model):
    set_constant(model, "zero", 3, np.int8)


def if_node(model):
    branch = helper.make_graph(
        [helper.make_node("Identity", ["best"], ["z"])],
        "b",
        [],
        [helper.make_tensor_value_info("z", F, None)],
    )
    model.graph.initializer.append(constant("yes", True, bool))
    add(model, "If", ["yes"], then_branch=branch, else_branch=copy.deepcopy(branch))


def sequence(model):
    add(model, "SequenceConstruct", ["best"])


def nonzero(model):
    add(model, "NonZero", ["best"])


def nms(model):
    model.graph.initializer.append(constant("boxes", np.zeros((1, 5001, 4)), np.float32))
    model.graph.initializer.append(constant("scores", np.zeros((1, 1, 5001)), np.float32))
    model.graph.input.append(helper.make_tensor_value_info("boxes", F, [1, 5001, 4]))
    add(model, "NonMaxSuppression", ["boxes", "scores"])


def uint8_inside(model):
    add(model, "Cast", ["best"], to=U8)


def uint8_not_cast(model):
    add(model, "Transpose", ["pixels"])


def no_sampling_ratio(model):
    del node(model, "align").attribute[:]


def int64_input(model):
    model.graph.input.append(helper.make_tensor_value_info("sizes", I64, ["batch", 2]))


def dynamic_canvas(model):
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"


def output_of_any_size(model):
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "count"


def size_from_a_value(model):
    model.graph.input.append(helper.make_tensor_value_info("count", I32, [1]))
    add(model, "Cast", ["count"], ["count64"], to=I64)
    add(model, "ConstantOfShape", ["count64"])


def foreign_operator(model):
    add(model, "EfficientNMS_TRT", ["best"], domain="trt")
    model.opset_import.append(helper.make_opsetid("trt", 1))


def sampling(model):
    model.graph.initializer.append(constant("grid", np.zeros((1, 2, 2, 2)), np.float32))
    add(model, "GridSample", ["y", "grid"])


def remainder(model):
    add(model, "Mod", ["k", "k"])


def running_sum(model):
    add(model, "CumSum", ["row", "k"])


def group_norm(model):
    for name in ("weight", "bias"):
        model.graph.initializer.append(constant(name, [1], np.float32))
    add(model, "GroupNormalization", ["y", "weight", "bias"], num_groups=1)


def either(model):
    model.graph.initializer.append(constant("no", False, bool))
    add(model, "Or", ["no", "no"])


WRONG = "wrong values without an error in TensorRT"
PLANTED = {
    newer_opset: ("the graph", "operator set 21"),
    large_k: ("top", "k is 3840"),
    computed_k: ("top", "k is not constant"),
    unsigned_zero_point: ("quantize", "uint8"),
    no_zero_point: ("quantize", "no zero point"),
    nonzero_zero_point: ("dequantize", "zero point is not 0"),
    if_node: ("planted", "If"),
    sequence: ("planted", "SequenceConstruct"),
    nonzero: ("planted", "NonZero: the size of its result depends on data"),
    nms: ("planted", "over 5000 boxes"),
    uint8_inside: ("planted", "makes uint8"),
    uint8_not_cast: ("planted", "reads uint8"),
    no_sampling_ratio: ("align", "sampling_ratio"),
    int64_input: ("input sizes", "int64"),
    dynamic_canvas: ("input pixels", "dynamic"),
    output_of_any_size: ("output best", "varies"),
    size_from_a_value: ("planted", "ConstantOfShape: the size of its result is not constant"),
    foreign_operator: ("planted", "trt.EfficientNMS_TRT"),
    sampling: (
        "planted",
        f"GridSample: {WRONG} 10.13 to 11.1 (NVIDIA/TensorRT#4813, #4646); export again with "
        "--target tensorrt",
    ),
    remainder: ("planted", f"Mod: {WRONG} 10.7 (NVIDIA/TensorRT#4702); export again with"),
    running_sum: ("planted", f"CumSum: {WRONG} since 10.8 (NVIDIA/TensorRT#4551, #4513)"),
    group_norm: ("planted", f"GroupNormalization: {WRONG} 10.16 (NVIDIA/TensorRT#4756)"),
    either: ("planted", f"Or: {WRONG} (NVIDIA/TensorRT#4512)"),
}


def test_a_good_graph_has_no_findings():
    onnx.checker.check_model(good(), full_check=True)
    assert lint(good()) == []


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_every_violation_is_named(plant):
    model, (where, text) = good(), PLANTED[plant]
    plant(model)
    found = lint(model)
    assert any(item.where == where and text in item.text for item in found), found


def test_the_graph_for_onnx_runtime_is_refused(exported):
    found = [str(finding) for finding in lint(onnx.load(exported("GeneralizedRCNN").path))]
    for operator in ("NonMaxSuppression", "NonZero"):
        assert any(f"{operator}: the size of its result depends" in text for text in found)


def test_notes_are_no_findings():
    model = good()
    add(model, "DeformConv", ["y", "y", "y"])
    assert notes(model) == [
        "1 DeformConv: TensorRT 10.1 or later",
        "1 RoiAlign: the parser inserts TensorRT's own plugin",
    ]


def test_command(tmp_path, capsys):
    onnx.save(good(), tmp_path / "good.onnx")
    assert main([str(tmp_path / "good.onnx")]) == 0
    assert "nothing found" in capsys.readouterr().out
    model = good()
    nonzero(model)
    onnx.save(model, tmp_path / "bad.onnx")
    assert main([str(tmp_path / "bad.onnx")]) == 4
    captured = capsys.readouterr()
    assert captured.out.startswith("planted: NonZero") and "1 findings" in captured.err
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    assert main([str(tmp_path / "junk.onnx")]) == 2
    assert main([str(tmp_path / "missing.onnx")]) == 2
