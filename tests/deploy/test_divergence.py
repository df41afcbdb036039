import copy

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.checks.divergence import first_divergence
from deploy.errors import UserError

FEED = {"x": np.linspace(-1, 1, 6, dtype=np.float32).reshape(1, 6)}


def chain(length=100, **changes):
    """x -> Mul by s0 -> Mul by s1 -> ... -> Cast to int32; s2 goes through a Reshape first."""
    scales = {f"s{i}": np.array([1.0], np.float32) for i in range(length)}
    scales.update({name: np.array([value], np.float32) for name, value in changes.items()})
    tensors = {**scales, "flat": np.array([-1])}
    nodes = [helper.make_node("Reshape", ["s2", "flat"], ["r2"], "reshape")]
    for i in range(length):
        before, scale = (f"y{i - 1}" if i else "x"), "r2" if i == 2 else f"s{i}"
        nodes.append(helper.make_node("Mul", [before, scale], [f"y{i}"], f"mul{i}"))
    nodes.append(helper.make_node("Cast", [f"y{length - 1}"], ["z"], to=TensorProto.INT32))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6])
    z = helper.make_tensor_value_info("z", TensorProto.INT32, [1, 6])
    values = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "g", [x], [z], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 8
    return model


def test_equal_graphs_never_part():
    assert first_divergence(chain(), chain(), FEED) is None


@pytest.mark.parametrize("position", [0, 1, 63, 64, 99])
def test_the_first_of_all_diverging_tensors_is_named(position):
    """Also behind the first run's share of tensors."""
    found = first_divergence(chain(**{f"s{position}": 1.01}), chain(), FEED)
    assert (found.tensor, found.node) == (f"y{position}", f"Mul mul{position}")
    assert found.initializers == [f"s{position}"]
    assert found.largest == pytest.approx(0.01, rel=1e-4) and found.scale == 1.0
    assert found.text().endswith(f"Mul mul{position}, by 0.01 of 1; fed by s{position}")


def test_initializers_are_found_through_other_nodes():
    found = first_divergence(chain(s2=1.01), chain(), FEED)
    assert found.tensor == "r2" and found.initializers == ["s2", "flat"]


def test_rounding_counts_only_among_equal_weights():
    rounded = chain(s5=1 + 2e-7)
    assert first_divergence(rounded, chain(), FEED).tensor == "y5"
    assert first_divergence(rounded, chain(), FEED, exact=False) is None
    assert first_divergence(chain(s5=1 + 1e-4), chain(), FEED, exact=False).tensor == "y5"


def test_whole_numbers_nan_and_shapes():
    found = first_divergence(chain(s99=2.0), chain(s99=2.0), {"x": FEED["x"] * np.nan})
    assert found is None  # NaN on both sides
    other = copy.deepcopy(chain())
    other.graph.node[-1].attribute[0].i = TensorProto.INT64
    found = first_divergence(other, chain(), FEED)
    assert (
        found.tensor == "z" and found.largest is None and "by" not in found.text().split("Cast")[1]
    )
    assert first_divergence(chain(s1=np.nan), chain(), FEED).largest == np.inf


def test_a_graph_that_cannot_run_is_the_users_error():
    broken = chain()
    broken.graph.node[3].op_type = "NoSuchOperator"
    with pytest.raises(UserError, match="node by node"):
        first_divergence(broken, chain(), FEED)
