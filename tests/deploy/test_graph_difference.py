import copy

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.checks.graph_difference import compare_initializers, structure_difference

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
    found = compare_initializers(graph(), graph())
    assert (found.equal, found.rounded, found.total) == (2, 0, 2)
    assert not found.differences and not found.missing and not found.extra
    assert structure_difference(graph(), graph()) is None


@pytest.mark.parametrize(
    "weight,changed,note",
    [
        (WEIGHT * np.float32(1.01), 6, "times 1.01"),
        (WEIGHT[[1, 0, 2]], 4, "at index 0, 1 of its first axis; the same values in another order"),
        (WEIGHT + [[0, 0], [0, 0.25], [0, 0]], 1, "at index 1 of its first axis; times 1.0625"),
        (WEIGHT * [[np.nan, 1]], 3, "NaN or infinity"),
        (WEIGHT + [[0, 1], [2, 4], [8, 16]], 5, ""),
    ],
)
def test_what_changed_is_described(weight, changed, note):
    found = compare_initializers(graph(weight.astype(np.float32)), graph())
    (difference,) = found.differences
    assert (difference.name, difference.changed, difference.values) == ("w", changed, 6)
    assert difference.note == note and difference.scale == 6 and found.equal == 1
    assert difference.text().startswith("w, read by Gemm last as B (its batch norm folded in): ")


def test_shape_dtype_and_names():
    found = compare_initializers(graph(WEIGHT[:2], extra=[1.0]), graph(lost=[1.0]))
    (difference,) = found.differences
    assert difference.text().endswith("it is float32 [2, 2], not float32 [3, 2]")
    assert (found.extra, found.missing) == (["extra"], ["lost"])
    found = compare_initializers(graph(WEIGHT.astype(np.float16)), graph())
    assert found.differences[0].note == "it is float16 [3, 2], not float32 [3, 2]"


def test_readers_of_unknown_operators_are_named_by_position():
    (difference,) = compare_initializers(graph(WEIGHT * 2, op="Strange"), graph()).differences
    assert difference.readers.startswith("Strange last as input 1")


def test_rounding_is_no_difference_but_a_little_more_is():
    for factor, rounded in ((1 + 1e-6, 1), (1 + 3e-6, 0)):
        found = compare_initializers(graph((WEIGHT * factor).astype(np.float32)), graph())
        assert (found.rounded, len(found.differences)) == (rounded, 1 - rounded)
    half = WEIGHT.astype(np.float16)
    for other, rounded in ((np.nextafter(half, np.float16(9)), 1), (half * np.float16(1.01), 0)):
        found = compare_initializers(graph(other), graph(half))
        assert (found.rounded, len(found.differences)) == (rounded, 1 - rounded)
    # the bias from a folded batch norm may have lost digits by cancellation
    bias = np.array([1, 1e-3, 0], np.float32)
    found = compare_initializers(graph(bias=bias + np.float32(1e-6)), graph(bias=bias))
    assert (found.rounded, found.equal) == (1, 1)
    found = compare_initializers(graph(counts=np.array([4])), graph(counts=np.array([5])))
    assert found.differences[0].note == "4, not 5"


def test_many_differences_are_other_weights():
    tensors = {f"t{i}": np.float32(i) for i in range(30)}
    for changed, expected in ((9, False), (10, True)):
        others = {f"t{i}": np.float32(i + 1) for i in range(changed)}
        found = compare_initializers(graph(**{**tensors, **others}), graph(**tensors))
        assert len(found.differences) == changed and found.other_weights is expected


def test_nodes_attributes_and_signature():
    assert structure_difference(graph(alpha=2.0), graph()) == (
        "node 0, Gemm last: alpha is 2.0, not 1.0"
    )
    other = graph()
    del other.graph.node[0].attribute[:]
    assert structure_difference(graph(), other) == "node 0, Gemm last: alpha is 1.0, not absent"
    other = graph()
    other.graph.node[0].input[2] = ""
    assert structure_difference(other, graph()) == "node 0, Gemm last, reads or makes other tensors"
    other = graph()
    other.graph.node[0].op_type = "MatMul"
    assert structure_difference(other, graph()) == "node 0 is MatMul last, not Gemm last"
    other = copy.deepcopy(graph())
    other.graph.node.append(helper.make_node("Relu", ["y"], ["z"]))
    assert structure_difference(other, graph()) == "2 nodes, not 1"
    other = graph()
    other.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4
    assert structure_difference(other, graph()) == "the graph's outputs are not the reference's"


def test_equal_tensors_that_are_stored_once_are_compared_where_they_are_read():
    shared = graph(WEIGHT, np.ones(3, np.float32))
    shared.graph.node[0].input[2] = "ones"
    shared.graph.initializer[1].name = "ones"
    other = graph(WEIGHT, np.full(3, 2, np.float32))
    assert structure_difference(shared, other) is None
    found = compare_initializers(shared, other, by_position=True)
    assert [x.name for x in found.differences] == ["w_bias"] and found.equal == 1
    assert found.missing == found.extra == []
