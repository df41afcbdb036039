"""float16: the network alone, made of the float32 graph's weights."""

import copy
import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from deploy.checks.tiny import CANVAS, conditioned, scenes, tiny_cfg
from deploy.errors import ParityError
from deploy.graphs import exportable
from deploy.reduced.half import _take_weights, half_model, make_half, network_parts
from deploy.reduced.layers import weighted_layers
from deploy.reduced.precision_gates import verify_reduced

PARTS = {
    "RetinaNet": ["FPN", "RetinaNetHead"],
    "Faster R-CNN": ["FPN", "StandardRPNHead", "FastRCNNConvFCHead", "FastRCNNOutputLayers"],
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_hold_all_the_weights_of_the_network(name):
    detector = exportable(conditioned(tiny_cfg(name)))
    parts = network_parts(detector)
    assert [type(part).__name__ for part in parts] == PARTS[name]
    inside = {id(p) for part in parts for p in part.parameters()}
    assert inside == {id(p) for p in detector.student.parameters()}


@pytest.mark.parametrize("name", PARTS)
def test_everything_around_the_network_keeps_float32(name):
    """Raw predictions are float32 and nearly the same; so is what RoIAlign reads."""
    model = conditioned(tiny_cfg(name))
    images, sizes = scenes(1), torch.tensor([CANVAS])
    single, half = exportable(model), make_half(exportable(model))
    with torch.no_grad():
        expected = single.network(images, sizes)
        given = {key: expected[key] for key in half.selections}
        actual = half.network(images, sizes, **given)
        features, _ = half.on_maps(images, sizes)
    assert {x.dtype for x in features.values()} == {torch.float32}
    assert half.student.pixel_mean.dtype == torch.float32
    assert next(half.student.backbone.parameters()).dtype == torch.float16
    for key, value in actual.items():
        assert value.dtype == torch.float32
        error = (value - expected[key]).abs().max() / expected[key].abs().max()
        assert 0 < error < 0.01 or key in given


@pytest.fixture(scope="module")
def half(tiny):
    """Exported RetinaNet, its float16 graph and that one's spec."""
    made = tiny("RetinaNet")
    spec = dataclasses.replace(made.spec, precision="fp16")
    model = half_model(exportable(made.model), spec, onnx.load(made.path))
    return made, model, spec


def test_graph_is_half_as_large_and_keeps_its_gates(half, tmp_path):
    made, model, spec = half
    assert {layer.stored for layer in weighted_layers(model)} == {"fp16"}
    single = {t.name: numpy_helper.to_array(t) for t in onnx.load(made.path).graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            expected = single[tensor.name].astype(np.float16)
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), expected)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    assert types["boxes"] == types["scores"] == onnx.TensorProto.FLOAT
    assert not [node for node in model.graph.node if node.domain]
    onnx.save(model, tmp_path / "m.onnx")
    report = verify_reduced(made.model, tmp_path / "m.onnx", spec, None, None, 1.0)
    assert report.passed and report.gates[0].value >= 0.99
    assert report.tally.matched > 100 and 1e-4 < report.tally.box_error < 0.5


def test_a_fault_in_the_half_graph_is_found(half, tmp_path):
    """One output layer 5 % off: far too much for rounding."""
    made, model, spec = half
    wrong = copy.deepcopy(model)
    tensor = next(t for t in wrong.graph.initializer if t.name.endswith("bbox_pred.weight"))
    values = numpy_helper.to_array(tensor) * np.float16(1.05)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(wrong, tmp_path / "m.onnx")
    report = verify_reduced(made.model, tmp_path / "m.onnx", spec, None, None, 1.0)
    assert report.verdict == "too much is lost" and report.gates[0].value < 0.9


def test_weights_over_the_range_of_float16_are_refused(half):
    made, model, _ = half
    single = onnx.load(made.path)
    tensor = next(t for t in single.graph.initializer if t.name.endswith("bbox_pred.weight"))
    values = numpy_helper.to_array(tensor) * 1e6
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(ParityError, match="bbox_pred.weight has values over 65504"):
        _take_weights(copy.deepcopy(model), single)
