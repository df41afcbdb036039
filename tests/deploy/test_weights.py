"""Initializers by name: what differs, by how much; rounding and half a step of int8 do not."""

import copy

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.checks.weights import compare_weights, other_nodes
from deploy.reduced.quantize import RECIPES, fold_batch_norms

from .test_quantize import int8, pictures  # noqa: F401  fixtures
from .test_verification import change

WEIGHT, BIAS = np.arange(1, 7, dtype=np.float32).reshape(3, 2), np.zeros(3, np.float32)


def graph(weight=WEIGHT, bias=BIAS, alpha=1.0, op="Gemm", **more):
    """y = op(x, w, b), with further initializers."""
    tensors = {"w": weight, "w_bias": bias, **more}
    node = helper.make_node(op, ["x", "w", "w_bias"], ["y"], "last", transB=1, alpha=alpha)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])
    values = [numpy_helper.from_array(np.asarray(v), name) for name, v in tensors.items()]
    made = helper.make_graph([node], "g", [x], [y], values)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])


def test_equal_graphs_have_no_difference():
    found = compare_weights(graph(), graph())
    assert (found.total, found.found()) == (2, []) and not found.differing
    assert other_nodes(graph(), graph(WEIGHT + 1)) is None


@pytest.mark.parametrize(
    "weight,said",
    [
        (WEIGHT * np.float32(1.01), "6 of 6 values differ, by up to 0.06 (largest value 6)"),
        (WEIGHT[[1, 0, 2]], "4 of 6 values differ, by up to 2 (largest value 6)"),
        (WEIGHT + [[0, 0], [0, 0.25], [0, 0]], "1 of 6 values differ, by up to 0.25 (largest "),
        (WEIGHT * [[np.nan, 1]], "3 of 6 values differ, by up to nan (largest value 6)"),
        (WEIGHT * [[np.inf, 1]], "3 of 6 values differ, by up to inf (largest value 6)"),
        (WEIGHT[:2], "it is float32 [2, 2], not float32 [3, 2]"),
    ],
)
def test_what_changed_is_described(weight, said):
    found = compare_weights(graph(weight.astype(np.float32)), graph())
    assert found.differing["w"].startswith(f"read by Gemm last: {said}") and found.total == 2
    assert found.found() == ["1 initializer differs from the checkpoint's: w"]


def test_dtype_names_and_single_values():
    found = compare_weights(graph(extra=[1.0]), graph(lost=[1.0]))
    assert (found.extra, found.missing) == (["extra"], ["lost"])
    found = compare_weights(graph(WEIGHT.astype(np.float16), n=4), graph(n=5))
    assert found.differing == {
        "w": "read by Gemm last: it is float16 [3, 2], not float32 [3, 2]",
        "n": "read by nothing: 4, not 5",
    }
    large = [np.array([2**63 - 1, i]) for i in (2**62, 2**62 + 1)]  # one number in float64
    assert list(compare_weights(graph(n=large[0]), graph(n=large[1])).differing) == ["n"]


def test_infinity_is_compared_too():
    constant = np.array([-np.inf, np.nan, 1.0], np.float32)
    assert not compare_weights(graph(c=constant), graph(c=constant)).differing
    for other in ([0.0, np.nan, 1.0], [-np.inf, 0.0, 1.0], [np.inf, np.nan, 1.0]):
        found = compare_weights(graph(c=np.array(other, np.float32)), graph(c=constant))
        assert list(found.differing) == ["c"]


def test_rounding_is_no_difference_but_a_little_more_is():
    for factor, rounded in ((1 + 1e-6, True), (1 + 3e-6, False)):
        found = compare_weights(graph((WEIGHT * factor).astype(np.float32)), graph())
        assert ("w" not in found.differing) is rounded
    half = WEIGHT.astype(np.float16)
    for other, rounded in ((np.nextafter(half, np.float16(9)), True), (half * 1.01, False)):
        found = compare_weights(graph(other.astype(np.float16)), graph(half))
        assert ("w" not in found.differing) is rounded
    # the bias from a folded batch norm may have lost digits by cancellation
    bias = np.array([1, 1e-3, 0], np.float32)
    found = compare_weights(graph(bias=bias + np.float32(1e-6)), graph(bias=bias))
    assert not found.differing


def test_many_differences_are_other_weights():
    tensors = {f"t{i}": np.float32(i) for i in range(30)}
    for changed, expected in (
        (9, "9 initializers differ from"),
        (10, "different weights: 10 of"),
    ):
        others = {f"t{i}": np.float32(i + 1) for i in range(changed)}
        found = compare_weights(graph(**{**tensors, **others}), graph(**tensors))
        assert found.found()[0].startswith(expected)


def test_nodes_attributes_and_signature():
    assert other_nodes(graph(alpha=2.0), graph()) == (
        "node 0, Gemm last, has other inputs, outputs or attributes"
    )
    other = graph()
    other.graph.node[0].op_type = "MatMul"
    assert other_nodes(other, graph()) == "node 0 is MatMul last, not Gemm last"
    other = copy.deepcopy(graph())
    other.graph.node.append(helper.make_node("Relu", ["y"], ["z"]))
    assert other_nodes(other, graph()) == "2 nodes, not 1"
    for change_it in (
        lambda model: model.graph.output.pop(),
        lambda model: model.opset_import.add(domain="other", version=1),
        lambda model: model.functions.add(name="Gemm"),
    ):
        change_it(other := graph())
        assert other_nodes(other, graph()) == "other inputs, outputs, types or operator sets"


def compare(model, single):
    return compare_weights(model, fold_batch_norms(single))


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_int8_graph_holds_the_checkpoints_weights(recipe, int8, dynamic_retinanet):  # noqa: F811
    found = compare(int8[recipe], onnx.load(dynamic_retinanet.path))
    assert found.found() == [] and found.total > 60


@pytest.mark.parametrize("recipe", RECIPES)
def test_changed_scales_values_and_other_weights_are_named(recipe, int8, dynamic_retinanet):  # noqa: F811
    single = onnx.load(dynamic_retinanet.path)
    name = "student.head.cls_score.weight"
    for tensor, function in (
        (f"{name}_scale", lambda scale: scale * np.float32(1.01)),
        (f"{name}_quantized", lambda values: np.where(values > 100, values - 2, values)),
    ):
        model = copy.deepcopy(int8[recipe])
        change(model, tensor, function)
        ((found, text),) = compare(model, single).differing.items()
        assert found == name and text.startswith("read by DequantizeLinear ")
    change(single, "student.backbone.bottom_up.stages.1.weight", lambda weight: weight * 1.01)
    names = list(compare(int8[recipe], single).differing)
    assert names == ["student.backbone.bottom_up.stages.1.weight"]


def test_copies_of_a_shared_bias_are_compared_each(int8, dynamic_retinanet):  # noqa: F811
    single, name = onnx.load(dynamic_retinanet.path), "student.head.cls_score.bias"
    model = copy.deepcopy(int8["onnx"])
    change(model, f"{name}1_quantized", lambda values: values + 2)
    assert list(compare(model, single).differing) == [name]
    model = copy.deepcopy(int8["tensorrt"])  # where biases stay float
    change(model, f"{name}1", lambda values: values * 1.01)
    assert list(compare(model, single).differing) == [name]


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (2, 2), ()])
def test_a_scale_that_fits_nothing_leaves_its_weight_unknown(shape):
    """Only a scale of one value fits any; all end without a traceback."""
    model = graph(w_quantized=np.ones((2, 2), np.int8), scale=np.ones(shape, np.float32))
    inputs = ["w_quantized", "scale"]
    model.graph.node.append(helper.make_node("DequantizeLinear", inputs, ["d"], axis=7))
    found = compare_weights(model, graph())
    assert ("w" in found.differing) or found.extra == ["w_quantized"]
