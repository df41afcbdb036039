"""The verifier's own test: equal passes, each planted fault fails, nothing proves nothing."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from deploy.checks import oracle
from deploy.checks.verification import verify
from deploy.checks.verify_images import draw_scene, verification_batches
from deploy.serving.openvino_session import OpenVinoSession

from .conftest import ARCHITECTURES


def change(model, name, function):
    """Replace an initializer by `function(array)`."""
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    array = function(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))


def nodes(model, kind):
    return [node for node in model.graph.node if node.op_type == kind]


def swapped_channels(model):
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    (stem,) = [node.input[1] for node in nodes(model, "Conv") if shapes[node.input[1]][1] == 3]
    change(model, stem, lambda weight: weight[:, ::-1])


def mean_off_by_one(model):
    change(model, "student.pixel_mean", lambda mean: mean + 1)


def nms_threshold_off(model):
    change(model, nodes(model, "NonMaxSuppression")[-1].input[3], lambda iou: iou + 0.05)


def anchors_half_a_cell_off(model):
    generator = "student.anchor_generator"
    if nodes(model, "RoiAlign"):
        generator = "student.proposal_generator.anchor_generator"
    for i, stride in enumerate((4, 8, 16, 32, 64) if nodes(model, "RoiAlign") else (8, 16, 32)):
        change(model, f"{generator}.cell_anchors.{i}", lambda cell, s=stride: cell + s / 2)


def labels_off_by_one(model):
    """Modulo 3, empty rows untouched: only the meaning is wrong."""
    (last,) = [node for node in model.graph.node if "labels" in node.output]
    last.output[list(last.output).index("labels")] = "right"
    for name, value in (("one", 1), ("three", 3), ("nought", 0)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int32), name))
    model.graph.node.extend(
        [
            helper.make_node("Add", ["right", "one"], ["next"]),
            helper.make_node("Mod", ["next", "three"], ["wrong"]),
            helper.make_node("Less", ["right", "nought"], ["empty"]),
            helper.make_node("Where", ["empty", "right", "wrong"], ["labels"]),
        ]
    )


def wrong_sampling_ratio(model):
    """What importers that read a missing attribute as 1 would run."""
    for node in nodes(model, "RoiAlign"):
        (ratio,) = [a for a in node.attribute if a.name == "sampling_ratio"]
        ratio.i = 1


FAULTS = [
    swapped_channels,
    mean_off_by_one,
    nms_threshold_off,
    anchors_half_a_cell_off,
    labels_off_by_one,
]
CASES = [(arch, fault) for arch in ARCHITECTURES for fault in FAULTS]
CASES.append(("GeneralizedRCNN", wrong_sampling_ratio))


@pytest.mark.parametrize("arch,fault", CASES)
def test_every_planted_fault_fails(arch, fault, exported, tmp_path):
    made = exported(arch)
    model = onnx.load(made.path)
    fault(model)
    onnx.save(model, tmp_path / "faulty.onnx")
    report = verify(made.model, tmp_path / "faulty.onnx", made.spec)
    assert not report.passed and report.verdict == "the graph differs"
    assert "FAIL" in report.table()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_exported_graph_passes_with_room_to_spare(arch, exported):
    """On 20 more images of as many sizes."""
    made = exported(arch)
    sizes = [(96 - 3 * i, 128 - 5 * (i * 7 % 20)) for i in range(20)]
    images = [draw_scene(np.random.default_rng(i), size) for i, size in enumerate(sizes)]
    report = verify(made.model, made.path, made.spec, images)
    tally = report.tally
    assert report.passed and tally.thresholds == [0.05, pytest.approx(0.005)]
    assert tally.matched == tally.expected > 1.5 * report.at_threshold > 200
    assert tally.box_error < 2e-3 and tally.score_error < 5e-5
    assert report.images >= 40 and not report.broken and not report.warnings
    (other,) = report.others
    assert (report.engine.name, other.engine.name) == ("onnxruntime", "openvino")
    assert other.passed and other.tally.expected == tally.expected and not other.tally.unmatched
    assert other.tally.matched > 0.999 * tally.matched
    assert 0 < other.tally.box_error < 2e-3 and other.tally.score_error < 5e-5
    assert "FAIL" not in report.table() and "equal" in report.table()


def test_a_fault_of_one_engine_is_that_engines(exported, monkeypatch):
    """Boxes moved by a tenth of a pixel, in OpenVINO alone. Detectron2 is asked once for both."""
    made, asked = exported("RetinaNet"), []
    run, infer = OpenVinoSession.run, oracle.detectron2_detections

    def moved(self, feed):
        found = run(self, feed)
        return {**found, "boxes": found["boxes"] + np.float32(0.1) * (found["boxes"] > 1)}

    monkeypatch.setattr(OpenVinoSession, "run", moved)
    monkeypatch.setattr(
        oracle, "detectron2_detections", lambda *args: asked.append(1) or infer(*args)
    )
    report = verify(made.model, made.path, made.spec)
    batches = len(verification_batches(made.spec))
    assert len(asked) == 2 * batches and report.tally.thresholds == [0.05, 0.005]
    (passed,) = report.others
    assert not report.passed and passed.passed and passed.engine.name == "onnxruntime"
    assert report.explanation.startswith(f"in {OpenVinoSession.engine}, ")
    lines = report.table().splitlines()
    assert lines[0].startswith("ONNX Runtime ") and f"{report.verdict}: in OpenVINO" in lines[-1]
    report = verify(made.model, made.path, made.spec, engines=["onnxruntime"])
    where = f"in one engine, {passed.engine}"
    assert report.explanation == f"the graph gives Detectron2's detections, {where}"
    assert report.passed and report.engines == [passed.engine]


def test_a_broken_promise_fails(exported, tmp_path):
    """The padded label of empty rows is 0 instead of -1."""
    made = exported("RetinaNet")
    model = onnx.load(made.path)
    (last,) = [node for node in model.graph.node if "labels" in node.output]
    last.output[0] = "right"
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int32), "nought"))
    model.graph.node.append(helper.make_node("Max", ["right", "nought"], ["labels"]))
    onnx.save(model, tmp_path / "faulty.onnx")
    report = verify(made.model, tmp_path / "faulty.onnx", made.spec)
    assert report.verdict == "promise broken" and "rows past num_dets" in report.explanation


def shifted(made, tmp_path, scale, bias):
    """Model and graph with the same other class scores: logits * scale + bias."""
    model, graph = copy.deepcopy(made.model), onnx.load(made.path)
    layer = model.head.cls_score
    with torch.no_grad():
        layer.weight.mul_(scale), layer.bias.mul_(scale).add_(bias)
    for name in ("weight", "bias"):
        change(
            graph,
            f"student.head.cls_score.{name}",
            lambda _, n=name: getattr(layer, n).detach().numpy(),
        )
    onnx.save(graph, tmp_path / "shifted.onnx")
    return verify(model, tmp_path / "shifted.onnx", made.spec)


def test_without_detections_the_threshold_is_lowered_in_both(tiny, tmp_path):
    report = shifted(tiny("RetinaNet"), tmp_path, 1.0, -7.5)
    assert report.passed and report.at_threshold == 0
    assert report.tally.thresholds[-1] == 0 and report.tally.matched > 100


def test_an_untrained_model_proves_nothing(exported, tmp_path):
    report = shifted(exported("RetinaNet"), tmp_path, 1e-3, -4.6)
    assert report.verdict == "vacuous" and "Is the model trained?" in report.explanation
