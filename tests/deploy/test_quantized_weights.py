import copy

import numpy as np
import onnx
import pytest

from deploy.checks.graph_difference import compare_initializers
from deploy.checks.quantized_weights import with_float_weights
from deploy.reduced.quantize import RECIPES, fold_batch_norms

from .test_quantize import int8, pictures  # noqa: F401  fixtures
from .test_verification import change


def compare(model, single):
    reference = fold_batch_norms(single)
    return compare_initializers(with_float_weights(model, reference), reference)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_int8_graph_holds_the_checkpoints_weights(recipe, int8, dynamic_retinanet):  # noqa: F811
    found = compare(int8[recipe], onnx.load(dynamic_retinanet.path))
    assert not found.differences and not found.missing and not found.extra
    assert found.equal > 60


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
        (difference,) = compare(model, single).differences
        assert difference.name == name and difference.readers.startswith("DequantizeLinear ")
    change(single, "student.backbone.bottom_up.stages.1.weight", lambda weight: weight * 1.01)
    names = [x.name for x in compare(int8[recipe], single).differences]
    assert names == ["student.backbone.bottom_up.stages.1.weight"]


def test_copies_of_a_shared_bias_are_compared_each(int8, dynamic_retinanet):  # noqa: F811
    single, name = onnx.load(dynamic_retinanet.path), "student.head.cls_score.bias"
    model = copy.deepcopy(int8["onnx"])
    change(model, f"{name}1_quantized", lambda values: values + 2)
    assert [x.name for x in compare(model, single).differences] == [name]
    model = copy.deepcopy(int8["tensorrt"])  # where biases stay float
    change(model, f"{name}1", lambda values: values * 1.01)
    assert compare(model, single).extra == [f"{name}1"]
