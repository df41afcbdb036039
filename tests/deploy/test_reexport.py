"""Planted faults are found, named and located, without Detectron2's inference."""

import copy
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from deploy.checks.weights import compare_weights
from deploy.errors import UserError
from deploy.graphs import exportable
from deploy.reexport import Reference, compare_graph, read_graph
from deploy.runtime import OrtDetector

from .conftest import ARCHITECTURES
from .test_verification import change, nodes, wrong_sampling_ratio

HEADS = {"RetinaNet": "student.head", "GeneralizedRCNN": "student.roi_heads.box_predictor"}


@pytest.fixture(scope="module")
def compare(exported):
    """Factory: architecture, what to do to the graph -> Differences.

    The reference is the session's export: exporting twice gives the same bytes, as another test
    holds.
    """
    made = {}

    def run(arch, fault=None, reference=None, **changes):
        if arch not in made:
            detector = exportable(exported(arch).model)
            made[arch] = read_graph(exported(arch).path), detector
        graph, detector = made[arch]
        given = replace(graph, model=copy.deepcopy(graph.model), path=Path("alone.onnx"))
        given = replace(given, **changes)
        if fault:
            fault(given.model)
        reference = reference or Reference(graph.spec, detector, graph.model, graph.model)
        return compare_graph(given, reference)

    return run


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_graph_itself_has_no_difference(arch, compare):
    result = compare(arch)
    assert result.found == result.notes == [] and result.comparable
    total = result.weights.total
    assert total > 80 and not result.weights.differing
    assert result.text() == f"weights: {total} of {total} initializers are the checkpoint's"


def one_percent(array):
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return np.zeros_like(array)
    if array.dtype.kind == "f" and array.any():
        return (array * 1.01).astype(array.dtype)
    return ~array if array.dtype == bool else array + np.ones(1, array.dtype)[0]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_any_initializer_changed_by_one_percent_is_named(arch, exported):
    """Zeros, whole numbers and truth values are changed otherwise."""
    reference = onnx.load(exported(arch).path)
    model, names = copy.deepcopy(reference), []
    for tensor in model.graph.initializer:
        if 0 not in tensor.dims:
            array = one_percent(numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            names.append(tensor.name)
    assert list(compare_weights(model, reference).differing) == names and len(names) > 80


def one_value(array):
    return array * np.array([1.01] + [1.0] * (len(array) - 1), np.float32)


def swapped_classes(array):
    return array[[1, 0, *range(2, len(array))]]


# fault -> the initializer that it changes, the operator that reads it, what is said about it
def faults(arch):
    head = HEADS[arch]
    layer = "Conv" if arch == "RetinaNet" else "Gemm"
    return {
        f"{head}.cls_score.weight": (swapped_classes, layer, " values differ, by up to "),
        f"{head}.cls_score.bias": (one_value, layer, ": 1 of "),
        f"{head}.bbox_pred.weight": (one_percent, layer, " values differ, by up to "),
        "student.pixel_mean": (lambda mean: mean + 1, "Sub", "3 of 3 values differ, by up to 1 "),
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_faults_are_located(arch, compare):
    for name, (function, operator, said) in faults(arch).items():
        result = compare(arch, partial(change, name=name, function=function))
        assert result.found == [f"1 initializer differs from the checkpoint's: {name}"]
        assert said in result.text() and f"{name}, read by {operator} " in result.text()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_changed_nms_threshold_is_found(arch, compare):
    def looser(model):
        change(model, nodes(model, "NonMaxSuppression")[-1].input[3], lambda iou: iou + 0.05)

    result = compare(arch, looser)
    assert len(result.found) == 1 and "0.55, not 0.5" in result.text()


def test_a_changed_score_threshold_is_found(compare):
    def lower(model):
        (tensor,) = [t for t in model.graph.initializer if t.name == "score_threshold"]
        tensor.CopyFrom(numpy_helper.from_array(np.array(0.04, np.float32), tensor.name))

    assert "score_threshold, read by Greater " in compare("RetinaNet", lower).text()
    assert compare("RetinaNet", lower).text().endswith(": 0.04, not 0.05")


def test_a_changed_attribute_is_found(compare):
    (found,) = compare("GeneralizedRCNN", wrong_sampling_ratio).found
    assert re.fullmatch(
        r"other nodes: node \d+, RoiAlign \w+, has other inputs, outputs or .*", found
    )


def test_another_training_is_called_different_weights(compare):
    rng = np.random.default_rng(0)

    def train(model):
        for tensor in model.graph.initializer:
            if tensor.name.endswith(("weight", "bias")):
                noise = rng.normal(0, 0.01, tensor.dims).astype(np.float32)
                change(model, tensor.name, noise.__add__)

    result = compare("RetinaNet", train)
    count, total = len(result.weights.differing), result.weights.total
    assert result.found == [f"different weights: {count} of {total} initializers differ"]
    assert count > 80 and f"and {count - 8} more" in result.text()


def add_a_tensor(model):
    tensor = numpy_helper.from_array(np.eye(9, dtype=np.float32) / 3, "teacher.weight")
    model.graph.initializer.append(tensor)


def test_a_tensor_of_somebody_else_is_named(compare):
    assert compare("RetinaNet", add_a_tensor).found == [
        "1 initializers in the graph, but not the checkpoint's: teacher.weight"
    ]


def rewrite(model):
    """As another exporter may: constants under other names, and a node more."""
    for tensor in model.graph.initializer:
        if not tensor.name.startswith("student.") and tensor.name != "score_threshold":
            old, tensor.name = tensor.name, f"other_{tensor.name}"
            for node in model.graph.node:
                node.input[:] = [tensor.name if name == old else name for name in node.input]
    model.graph.node.append(helper.make_node("Identity", ["boxes"], ["unused"]))


def test_another_exporters_nodes_may_differ_but_not_the_weights(compare, exported):
    spec = read_graph(exported("RetinaNet").path).spec
    here = spec.versions["torch"]
    spec = replace(spec, versions={**spec.versions, "torch": "2.9.0"})

    found = compare("RetinaNet", rewrite).found
    assert "initializers not in the graph" in found[0] and "other nodes: " in found[-1]
    result = compare("RetinaNet", rewrite, spec=spec)
    assert result.found == [] and result.notes[0] == (
        f"exported by other versions than those here: torch 2.9.0, not {here}"
    )
    assert result.notes[1].startswith("so nodes and constants were not compared: node ")
    assert len(compare("RetinaNet", spec=spec).notes) == 1  # the nodes happen to be equal

    def rewrite_and_change(model):
        rewrite(model)
        change(model, "student.head.cls_score.weight", one_percent)
        add_a_tensor(model)

    assert compare("RetinaNet", rewrite_and_change, spec=spec).found == [
        "1 initializer differs from the checkpoint's: student.head.cls_score.weight",
        "weights of somebody else: teacher.weight",
    ]


def test_the_spec_inside_is_compared_with_the_checkpoint(compare, exported):
    spec = replace(read_graph(exported("RetinaNet").path).spec, nms_threshold=0.6, min_size=64)
    assert compare("RetinaNet", spec=spec).found == [
        "the file's metadata, against the checkpoint: min_size is 64, not 96",
        "the file's metadata, against the checkpoint: nms_threshold is 0.6, not 0.5",
    ]


def test_another_architecture_cannot_be_judged_by_the_model(compare, exported):
    other = read_graph(exported("GeneralizedRCNN").path)
    result = compare("RetinaNet", reference=Reference(other.spec, None, other.model, other.model))
    assert not result.comparable
    assert "architecture is 'RetinaNet', not 'GeneralizedRCNN'" in result.found[0]


def test_a_sidecar_of_another_file_or_edited_is_found(compare, exported, tmp_path):
    source = exported("RetinaNet").folder
    shutil.copy(source / "model.json", tmp_path / "model.json")
    result = compare("RetinaNet", path=tmp_path / "model.onnx", sha256="0" * 64)
    assert "model.json belongs to another file" in result.found[0] and len(result.found) == 1
    values = json.loads((source / "model.json").read_text())
    values["classes"][0] = "cat"
    (tmp_path / "model.json").write_text(json.dumps(values))
    result = compare("RetinaNet", path=tmp_path / "model.onnx")
    assert result.found[0].startswith("model.json, against the file: classes is ['cat'")
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(UserError, match="model spec .*model.json is not JSON"):
        compare("RetinaNet", path=tmp_path / "model.onnx")


def test_files_that_are_not_ours_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read model"):
        read_graph(tmp_path / "nothing.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(UserError, match="is no ONNX model"):
        read_graph(tmp_path / "text.onnx")
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [x])
    onnx.save(helper.make_model(graph), tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="was not written by deploy/export.py"):
        read_graph(tmp_path / "foreign.onnx")


def test_weights_in_other_files_are_refused(exported, tmp_path):
    model = onnx.load(exported("RetinaNet").path)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=0)
    with pytest.raises(UserError, match="keeps weights in other files"):
        read_graph(path)
    with pytest.raises(UserError, match="keeps weights in other files"):
        OrtDetector(path)
