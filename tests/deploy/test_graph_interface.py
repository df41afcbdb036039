"""What a file says of itself, as the onnx package reads it; damage is one line."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from deploy.errors import UserError
from deploy.serving.graph_interface import read_interface

from .fake_graph import write_fake_graph
from .test_bounded_run import endless  # noqa: F401  a fixture


def as_onnx_reads_it(values):
    return {
        v.name: (
            np.dtype(helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)).name,
            [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
        )
        for v in values
    }


def nodes(graph):
    for node in graph.node:
        yield node.op_type, len(node.input)
        for attribute in node.attribute:
            yield from nodes(attribute.g)


@pytest.mark.parametrize("which", ["fake", "endless", "dynamic_retinanet", "agnostic_rcnn"])
def test_it_is_what_the_onnx_package_reads(request, which, tmp_path):
    path = tmp_path / "fake.onnx"
    if which == "fake":
        write_fake_graph(path)
    else:
        made = request.getfixturevalue(which)
        path = getattr(made, "path", made)
    model, found = onnx.load(path), read_interface(path.read_bytes(), "x")
    assert found.metadata == {entry.key: entry.value for entry in model.metadata_props}
    assert found.inputs == as_onnx_reads_it(model.graph.input) and len(found.inputs) == 2
    assert list(found.outputs.items()) == list(as_onnx_reads_it(model.graph.output).items())
    # of each type the node with the fewest inputs
    assert found.operators == dict(sorted(nodes(model.graph), reverse=True))
    assert len(found.operators) > 5
    assert ("Loop" in found.operators, "Identity" in found.operators) == (which == "endless",) * 2


def test_weights_are_no_inputs_and_what_has_no_shape_has_none():
    nameless = helper.make_tensor_value_info("y", TensorProto.DOUBLE, [None, 3])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "w")]
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [1])
    graph = helper.make_graph([], "g", inputs, [nameless, sequence], [weight])
    found = read_interface(helper.make_model(graph).SerializeToString(), "x")
    assert found.inputs == {"x": ("float32", [1])}
    assert found.outputs == {"y": ("float64", [None, 3]), "s": ("unknown", [])}


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "m.onnx"
    write_fake_graph(path)
    return path.read_bytes()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damage_is_a_user_error_or_read(content, data):
    changed = bytearray(content[: data.draw(st.integers(0, len(content)))])
    for place in data.draw(st.lists(st.integers(0, max(0, len(changed) - 1)), max_size=4)):
        if changed:
            changed[place] = data.draw(st.integers(0, 255))
    try:
        read_interface(bytes(changed), "m.onnx")
    except UserError as error:
        assert str(error) == "m.onnx is no ONNX model, or damaged"
