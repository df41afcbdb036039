"""What a file really stores is read from its graph, not from what it says."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.errors import UserError
from deploy.reduced.layers import check_precision, weighted_layers


def graph(nodes, weights):
    """A model of these nodes; only names and initializers matter here."""
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    return helper.make_model(helper.make_graph(nodes, "g", [], [], initializers))


def conv(x="x", weight="w", y="y", **attributes):
    return helper.make_node("Conv", [x, weight], [y], name=y, **attributes)


def only(nodes, **weights):
    (layer,) = weighted_layers(graph(nodes, weights))
    return layer


ones = np.ones
CAST = helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT)


@pytest.mark.parametrize(
    ("node", "weight", "work"),
    [
        (conv(), ones((8, 4, 3, 3)), 288 / 12),  # per position: 4 in, 8 out
        (conv(strides=[2, 2]), ones((8, 4, 3, 3)), 288 / (16 + 8)),
        (conv(group=8), ones((8, 1, 3, 3)), 72 / 16),  # depthwise
        (helper.make_node("Gemm", ["x", "w"], ["y"], name="y"), ones((16, 48)), 768 / 64),
        (helper.make_node("MatMul", ["x", "w"], ["y"], name="y"), ones((16, 48)), 768 / 64),
        (
            helper.make_node("ConvTranspose", ["x", "w"], ["y"], name="y", strides=[2, 2]),
            ones((6, 5, 2, 2)),
            120 / (6 + 20),
        ),
    ],
)
def test_work_is_counted_per_value_moved(node, weight, work):
    layer = only([node], w=weight.astype(np.float32))
    assert layer.work == pytest.approx(work)
    assert (layer.node, layer.weight, layer.values) == ("y", "w", weight.size)


def test_heavy_layers_and_why_others_are_not():
    pool = helper.make_node("GlobalAveragePool", ["x"], ["p"])
    squeeze = [conv("p", "w", "s"), helper.make_node("Relu", ["s"], ["r"]), conv("r", "w", "e")]
    gate = helper.make_node("Mul", ["x", "e"], ["scaled"])
    transposed = helper.make_node("ConvTranspose", ["x", "w"], ["t"], name="t")
    nodes = [pool, *squeeze, gate, conv("scaled", "w", "after"), conv("x", "thin", "thin_y")]
    weights = {"w": ones((64, 64, 1, 1), np.float32), "thin": ones((64, 8, 1, 1), np.float32)}
    layers = {x.node: x for x in weighted_layers(graph([*nodes, transposed], weights))}
    assert {name for name, layer in layers.items() if layer.heavy} == {"after"}
    assert layers["s"].why_light() == layers["e"].why_light() == "one value per channel"
    assert layers["thin_y"].why_light().startswith("7.1 multiply-accumulates")
    assert "ConvTranspose" in layers["t"].why_light()


def dequantize(name, y):
    return helper.make_node("DequantizeLinear", [name, "scale"], [y])


@pytest.mark.parametrize(
    ("nodes", "weight", "stored"),
    [
        ([conv()], np.float16, "fp16"),
        ([conv()], np.float32, "fp32"),
        # stored in half of the bytes, computed in float32
        ([CAST, conv("x", "f")], np.float16, "fp32"),
        ([helper.make_node("Transpose", ["w"], ["t"]), conv("x", "t")], np.float16, "fp16"),
        ([dequantize("q", "x"), dequantize("w", "d"), conv("x", "d")], np.int8, "int8"),
        ([dequantize("w", "d"), conv("x", "d")], np.int8, "fp32"),  # its input is float
        ([dequantize("q", "x"), dequantize("w", "d"), conv("x", "d")], np.uint8, "fp32"),
    ],
)
def test_stored_is_what_the_layer_computes_in(nodes, weight, stored):
    assert only(nodes, w=ones((64, 64, 1, 1), weight)).stored == stored


def test_products_of_two_activations_are_no_layers():
    nodes = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    assert weighted_layers(graph(nodes, {})) == []


def model_of(single, half):
    """Two layers of `single` and `half` values, each heavy."""
    nodes = [conv("x", "a", "y1"), conv("y1", "b", "y2")]
    weights = {"a": ones((single, 64, 1, 1), np.float32), "b": ones((half, 64, 1, 1), np.float16)}
    return graph(nodes, weights)


def test_claims_hold_from_99_percent():
    assert check_precision(model_of(1, 99), "fp16", "m")["fp16"] == pytest.approx(0.99)
    with pytest.raises(UserError, match=r"m claims fp16, but .* 98\.9% are"):
        check_precision(model_of(11, 989), "fp16", "m")


@pytest.mark.parametrize("claim", ["fp16", "int8"])
def test_a_float32_graph_that_claims_less_is_refused(claim, tiny):
    model = onnx.load(tiny("RetinaNet").path)
    assert check_precision(model, "fp32", "m") == {"fp32": 1.0, "fp16": 0.0, "int8": 0.0}
    with pytest.raises(UserError, match=f"claims {claim}"):
        check_precision(model, claim, "m")


def test_without_weights_only_fp32_can_be_claimed():
    empty = graph([], {})
    assert check_precision(empty, "fp32", "m") == {}
    for claim in ("fp16", "int8"):
        with pytest.raises(UserError, match="claims"):
            check_precision(empty, claim, "m")
