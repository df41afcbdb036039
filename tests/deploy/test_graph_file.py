"""Weights in other files are found wherever in a graph, as the onnx package defines them."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploy import benchmark, evaluate, predict, trt_lint
from deploy.errors import UserError
from deploy.serving import graph_file
from deploy.serving.graph_file import load_graph, read_graph_file
from deploy.triton_repository import main as write_repository

from .coco_files import write_dataset
from .fake_graph import write_fake_graph


def inline():
    return numpy_helper.from_array(np.ones(3, np.float32), "w")


def outside():
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3])
    tensor.external_data.add(key="location", value="model.data")
    tensor.data_location = TensorProto.EXTERNAL
    return tensor


def body(**parts):
    return helper.make_graph([], "body", [], [], **parts)


def sparse(values, indices):
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[3])


def node(**attributes):
    return helper.make_node("Any", [], ["x"], **attributes)


PLACES = {
    "initializer": lambda w: body(initializer=[w]),
    "sparse values": lambda w: body(sparse_initializer=[sparse(w, inline())]),
    "sparse indices": lambda w: body(sparse_initializer=[sparse(inline(), w)]),
    "constant": lambda w: helper.make_graph([node(value=w)], "g", [], []),
    "constants": lambda w: helper.make_graph([node(values=[inline(), w])], "g", [], []),
    "branch": lambda w: helper.make_graph([node(then_branch=PLACES["constant"](w))], "g", [], []),
    "branches": lambda w: helper.make_graph(
        [node(bodies=[body(), PLACES["initializer"](w)])], "g", [], []
    ),
    "sparse constant": lambda w: helper.make_graph(
        [node(sparse_value=sparse(w, inline()))], "g", [], []
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_external_data_is_found_in_every_place(tmp_path, place):
    for tensor, complete in ((inline(), True), (outside(), False)):
        model = helper.make_model(PLACES[place](tensor))
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        if complete:
            assert load_graph(tmp_path / "m.onnx")[1] == model
            continue
        with pytest.raises(UserError, match=r"m\.onnx keeps weights in other files"):
            read_graph_file(tmp_path / "m.onnx")


def test_functions_are_searched_too(tmp_path):
    function = helper.make_function("d", "F", [], ["x"], [node(value=outside())], [])
    model = helper.make_model(body(), functions=[function])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="keeps weights in other files"):
        read_graph_file(tmp_path / "m.onnx")


def test_the_table_has_every_way_to_a_tensor_that_onnx_has():
    """From ModelProto down, by the package's own description of the format."""
    descriptors = {"ModelProto": onnx.ModelProto.DESCRIPTOR}
    waiting = list(descriptors.values())
    while waiting:
        for field in waiting.pop().fields:
            inside = field.message_type
            if inside and inside.name not in descriptors:
                descriptors[inside.name] = inside
                waiting.append(inside)
    leads = {"TensorProto"}
    for _ in descriptors:  # as many rounds as there can be levels
        leads |= {
            name
            for name, d in descriptors.items()
            if any(f.message_type and f.message_type.name in leads for f in d.fields)
        }
    expected = {
        name: {
            field.number: field.message_type.name
            for field in descriptors[name].fields
            if field.message_type and field.message_type.name in leads
        }
        for name in leads
    }
    assert graph_file._INSIDE == expected
    numbers = {f.name: f.number for f in TensorProto.DESCRIPTOR.fields}
    assert numbers["external_data"] == graph_file._EXTERNAL_DATA
    assert numbers["data_location"] == graph_file._DATA_LOCATION


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "m.onnx"
    write_fake_graph(path)
    return path.read_bytes()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_read_or_refused(content, tmp_path_factory, data):
    damaged = bytearray(content[: data.draw(st.integers(0, len(content)))])
    places = st.integers(0, max(len(damaged) - 1, 0))
    for place in data.draw(st.lists(places, max_size=4)) if damaged else ():
        damaged[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(damaged)
    try:
        load_graph(path)
    except UserError as error:
        assert str(error).startswith(f"{path} ")


@pytest.mark.parametrize(
    "command",
    [
        lambda model, folder: predict.main([model, folder + "/images", "--output", "out"]),
        lambda model, folder: evaluate.main([model, "--dataset", folder + "/test.json"]),
        lambda model, folder: benchmark.main([model]),
        lambda model, folder: write_repository([model, folder + "/repository"]),
        lambda model, folder: trt_lint.main([model]),
    ],
    ids=["predict", "evaluate", "benchmark", "triton", "trt_lint"],
)
def test_every_command_refuses_them(tmp_path, monkeypatch, capsys, command):
    """Although the weights lie beside the graph and in the folder that it is started in."""
    write_dataset(tmp_path)
    write_fake_graph(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    external = {"save_as_external_data": True, "location": "m.data", "size_threshold": 0}
    onnx.save(model, tmp_path / "m.onnx", **external)
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert command(str(tmp_path / "m.onnx"), str(tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: {tmp_path / 'm.onnx'} keeps weights in other files, which deploy/export.py never "
        "does: export it again"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == before
