"""int8: what is quantised, how, and that folding batch norms changes nothing."""

import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from PIL import Image

from deploy.checks.verify_images import draw_scene
from deploy.graphs.convert import expose_raw
from deploy.reduced.calibrate import Reader
from deploy.reduced.layers import check_precision, weighted_layers
from deploy.reduced.quantize import RECIPES, fold_batch_norms, int8_model

from .conftest import CANVAS, scenes

INT8 = onnx.TensorProto.INT8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    paths = [folder / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.fromarray(draw_scene(rng, CANVAS)).save(path)
    return paths


@pytest.fixture(scope="module")
def int8(dynamic_retinanet, pictures):
    """recipe -> the int8 graph of RetinaNet with one batch norm per level."""
    spec = dataclasses.replace(dynamic_retinanet.spec, precision="int8")
    single = onnx.load(dynamic_retinanet.path)
    return {name: int8_model(single, spec, Reader(pictures, spec), name) for name in RECIPES}


def values_of(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def of_type(model, *kinds):
    return [node for node in model.graph.node if node.op_type in kinds]


def test_folding_batch_norms_changes_nothing_but_rounding(dynamic_retinanet):
    model = onnx.load(dynamic_retinanet.path)
    assert len(of_type(model, "BatchNormalization")) == 6
    folded = fold_batch_norms(model)
    assert not of_type(folded, "BatchNormalization")
    onnx.checker.check_model(folded, full_check=True)
    feed = {
        "images": scenes(2).numpy().astype(np.uint8),
        "image_sizes": np.array([CANVAS, (64, 100)], np.int32),
    }
    a, b = (
        ort.InferenceSession(
            expose_raw(m).SerializeToString(), providers=["CPUExecutionProvider"]
        ).run(None, feed)
        for m in (model, folded)
    )
    assert len(a) >= 4 + 6  # logits and deltas of three levels
    for expected, actual in zip(a[4:], b[4:], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_heavy_layers_and_nothing_else_are_quantised(recipe, int8, dynamic_retinanet):
    model = int8[recipe]
    folded = weighted_layers(fold_batch_norms(onnx.load(dynamic_retinanet.path)))
    expected = {layer.node: layer.heavy for layer in folded}
    assert {layer.node: layer.stored == "int8" for layer in weighted_layers(model)} == expected
    assert 0 < sum(expected.values()) < len(expected)
    assert check_precision(model, "int8", "m")["int8"] > 0.9
    # decoding and NMS read what DequantizeLinear gives, and hold no Q/DQ of their own
    selection = {"TopK", "NonMaxSuppression", "Exp", "Sigmoid", "GatherElements"}
    quantised = {name for node in of_type(model, "QuantizeLinear") for name in node.output}
    for node in of_type(model, *selection):
        assert not quantised & set(node.input)


@pytest.mark.parametrize(("recipe", "kind"), [("onnx", np.uint8), ("tensorrt", np.int8)])
def test_types_axes_and_zero_points(recipe, kind, int8):
    model = int8[recipe]
    values = values_of(model)
    activations = of_type(model, "QuantizeLinear")
    assert activations
    zero_points = {values[node.input[2]].item() for node in activations}
    assert {values[node.input[2]].dtype for node in activations} == {np.dtype(kind)}
    assert (zero_points == {0}) == (recipe == "tensorrt")
    weights = [node for node in of_type(model, "DequantizeLinear") if node.input[0] in values]
    for node in weights:
        tensor, scale = values[node.input[0]], values[node.input[1]]
        axis = next((a.i for a in node.attribute if a.name == "axis"), None)
        assert not values[node.input[2]].any()
        assert tensor.dtype == (np.int8 if tensor.ndim == 4 else np.int32)
        assert (axis, scale.shape) == (0, tensor.shape[:1])
        if tensor.ndim == 4:  # each channel uses its own full range
            assert (np.abs(tensor).max(axis=(1, 2, 3)) >= 126).all()
    biases = [node for node in weights if values[node.input[0]].ndim == 1]
    assert bool(biases) == (recipe == "onnx")  # TensorRT adds biases in float


def test_tensorrt_quantises_inputs_of_layers_only(int8):
    """No layer's output is rounded for itself: what follows can be fused with it."""
    model = int8["tensorrt"]
    for node in of_type(model, "QuantizeLinear"):
        (pair,) = [other for other in model.graph.node if node.output[0] in other.input]
        readers = [other for other in model.graph.node if pair.output[0] in other.input]
        assert "Conv" in {reader.op_type for reader in readers}


@pytest.mark.parametrize("recipe", RECIPES)
def test_raw_predictions_stay_close(recipe, int8, dynamic_retinanet):
    feed = {
        "images": scenes(2).numpy().astype(np.uint8),
        "image_sizes": np.array([CANVAS, CANVAS], np.int32),
    }
    models = (onnx.load(dynamic_retinanet.path), int8[recipe])
    names = [v.name for v in models[0].graph.value_info if v.name.startswith("raw.")]
    a, b = (
        ort.InferenceSession(
            expose_raw(m).SerializeToString(), providers=["CPUExecutionProvider"]
        ).run(names, feed)
        for m in models
    )
    for expected, actual in zip(a, b, strict=True):
        error = np.sqrt(np.square(expected - actual).mean() / np.square(expected).mean())
        assert 1e-4 < error < 0.1


def test_the_file_is_ours(int8, dynamic_retinanet):
    model = int8["onnx"]
    assert {p.key: p.value for p in model.metadata_props}["precision"] == "int8"
    assert model.opset_import == onnx.load(dynamic_retinanet.path).opset_import
    assert model.producer_name == "fgd"
    assert b".onnx" not in model.SerializeToString() and b"/tmp" not in model.SerializeToString()
