import numpy as np
import onnx
import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch.fcos import FCOS

from deploy.checks.tiny import CANVAS, conditioned, scenes, tiny_cfg
from deploy.checks.verification import verify
from deploy.errors import UserError
from deploy.graphs import exportable

from .conftest import SIZES, assert_equal_detections, detectron2_outputs, ort_outputs
from .test_verification import change


@pytest.mark.parametrize("norm", ["GN", "BN", ""])
def test_module_equals_detectron2_on_a_ragged_batch(norm):
    cfg = tiny_cfg("FCOS")
    cfg.MODEL.FCOS.NORM = norm
    model, images = conditioned(cfg), scenes(3, seed=2)
    outputs = exportable(model)(images, torch.tensor(SIZES, dtype=torch.int32))
    assert_equal_detections(outputs[:4], detectron2_outputs(model, images, SIZES))


def test_few_candidates_and_places_are_detectron2s():
    cfg = tiny_cfg("FCOS")
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST, cfg.TEST.DETECTIONS_PER_IMAGE = 30, 7
    model, images = conditioned(cfg), scenes(2, seed=3)
    outputs = exportable(model)(images, torch.tensor([CANVAS] * 2, dtype=torch.int32))
    assert outputs[1].shape == (2, 7, 4)
    assert_equal_detections(outputs[:4], detectron2_outputs(model, images, [CANVAS] * 2))


def test_one_of_detectron2s_own_python_configs_is_exportable_too():
    """Not built from a yaml config: the class is Detectron2's, and distances are in pixels."""
    built = conditioned(tiny_cfg("FCOS"))
    with torch.no_grad():
        built.head.bbox_pred.weight.mul_(16), built.head.bbox_pred.bias.mul_(16)
    model = FCOS(
        backbone=built.backbone,
        head=built.head,
        head_in_features=built.head_in_features,
        box2box_transform=Box2BoxTransformLinear(normalize_by_size=False),
        num_classes=3,
        pixel_mean=[103.53, 116.28, 123.675],
        pixel_std=[1.0, 1.0, 1.0],
    ).eval()
    images = scenes(2, seed=3)
    outputs = exportable(model)(images, torch.tensor(SIZES[:2], dtype=torch.int32))
    assert_equal_detections(outputs[:4], detectron2_outputs(model, images, SIZES[:2]))


def test_other_heads_are_refused():
    model = conditioned(tiny_cfg("FCOS"))
    model.head = torch.nn.Identity()
    with pytest.raises(UserError, match="the FCOS head: Identity"):
        exportable(model)


@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_equals_detectron2(batch, tiny):
    made, images = tiny("FCOS"), scenes(3, seed=4)
    for start in range(0, 3, batch):
        part, sizes = images[start : start + batch], SIZES[start : start + batch]
        expected = detectron2_outputs(made.model, part, sizes)
        assert_equal_detections(ort_outputs(made.path, part, sizes), expected)
    for node in onnx.load(made.path).graph.node:
        assert not node.metadata_props and not node.doc_string
    assert (made.spec.architecture, made.spec.score_threshold) == ("FCOS", 0.2)


def test_onnx_nan_image_gives_no_detection_and_leaves_its_neighbour_alone(tiny):
    images = torch.stack([torch.full((3, *CANVAS), float("nan")), scenes(1)[0]])
    outputs = ort_outputs(tiny("FCOS").path, images, [CANVAS] * 2)
    assert outputs[0][0] == 0 and outputs[0][1] > 5 and (outputs[3][0] == -1).all()


def without_centerness(model):
    """It is 1 everywhere."""
    change(model, "student.head.ctrness.weight", np.zeros_like)
    change(model, "student.head.ctrness.bias", lambda bias: bias * 0 + 20)


def half_a_stride_off(model):
    for i, stride in enumerate((8, 16, 32)):
        name = f"student.anchor_generator.cell_anchors.{i}"
        change(model, name, lambda cell, s=stride: cell + np.float32(s / 2))


@pytest.mark.parametrize("fault", [without_centerness, half_a_stride_off])
def test_planted_faults_fail(fault, tiny, tmp_path):
    made = tiny("FCOS")
    model = onnx.load(made.path)
    fault(model)
    onnx.save(model, tmp_path / "faulty.onnx")
    report = verify(made.model, tmp_path / "faulty.onnx", made.spec)
    assert report.verdict == "the graph differs" and report.tally.unmatched > 0
