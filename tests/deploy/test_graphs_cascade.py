import numpy as np
import onnx
import pytest
import torch
from detectron2.modeling import build_model
from onnx import numpy_helper

from deploy.checks.oracle import detectron2_detections
from deploy.checks.tiny import CANVAS, conditioned, scenes, tiny_cfg
from deploy.checks.verification import verify
from deploy.checks.verify_images import Batch
from deploy.errors import UserError
from deploy.graphs import exportable

from .conftest import (
    SIZES,
    assert_equal_detections,
    assert_equal_masks,
    detectron2_outputs,
    ort_outputs,
)
from .test_verification import change


@pytest.fixture(scope="module")
def model():
    return conditioned(tiny_cfg("Cascade R-CNN"))


@pytest.mark.parametrize("pooler", ["ROIAlignV2", "ROIAlign"])
def test_module_equals_detectron2_on_a_ragged_batch(pooler):
    cfg = tiny_cfg("Cascade R-CNN")
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = pooler
    model, images = conditioned(cfg), scenes(3, seed=2)
    outputs = exportable(model)(images, torch.tensor(SIZES, dtype=torch.int32))
    assert_equal_detections(outputs[:4], detectron2_outputs(model, images, SIZES))


def test_every_stage_matters(model):
    """Or the comparison above would say nothing about them."""
    images, sizes = scenes(1), torch.tensor([CANVAS], dtype=torch.int32)
    detector = exportable(model)
    raw = detector.network(images, sizes)
    rois = [raw[f"rois{suffix}"] for suffix in ("", ".stage2", ".stage3")]
    for before, after in zip(rois, rois[1:]):
        moved = (before - after).abs().amax(dim=-1)
        assert moved.median() > 0.1 and after.shape == before.shape
    logits = [raw[f"class_logits{suffix}"] for suffix in ("", ".stage2", ".stage3")]
    mean = sum(x.softmax(-1) for x in logits)[:, :-1] / 3
    torch.testing.assert_close(detector._pair_scores(raw), mean.reshape(1, -1))


def test_proposals_that_are_not_there_stay_out_of_every_stage(model):
    """NaN deltas, and rows without proposal, reach no RoIAlign and no detection."""
    detector = exportable(model)
    rois = torch.tensor([[[0.0, 0, 40, 40], [9, 9, 30, 30], [0, 0, 0, 0]]])
    deltas = torch.full((3, 4), 0.5)
    deltas[1, 2] = float("nan")
    raw = {"rois": rois, "box_deltas": deltas}
    refined = detector._refine(0, raw, torch.tensor([CANVAS]))
    assert refined[0, 0].tolist() != [0] * 4 and not refined[0, 1:].any()


@pytest.mark.parametrize("stages", [2, 4])
def test_other_numbers_of_stages_are_refused(stages):
    cfg = tiny_cfg("Cascade R-CNN")
    node = cfg.MODEL.ROI_BOX_CASCADE_HEAD
    node.IOUS = (*node.IOUS, 0.8)[:stages]
    node.BBOX_REG_WEIGHTS = (*node.BBOX_REG_WEIGHTS, (40.0, 40.0, 20.0, 20.0))[:stages]
    with pytest.raises(UserError, match=f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS: {stages} stages"):
        exportable(build_model(cfg))


def test_onnx_with_masks_equals_detectron2(tiny):
    made, images = tiny("Cascade Mask R-CNN"), scenes(3, seed=4)
    expected = detectron2_detections(made.model, Batch(images.numpy(), np.array(SIZES, np.int32)))
    assert_equal_masks(ort_outputs(made.path, images, SIZES), expected)
    for node in onnx.load(made.path).graph.node:
        assert not node.metadata_props and not node.doc_string


def test_onnx_nan_image_gives_no_detection_and_leaves_its_neighbour_alone(tiny):
    images = torch.stack([torch.full((3, *CANVAS), float("nan")), scenes(1)[0]])
    outputs = ort_outputs(tiny("Cascade Mask R-CNN").path, images, [CANVAS] * 2)
    assert outputs[0][0] == 0 and outputs[0][1] > 5 and not outputs[4][0].any()


def wrong_transform(model):
    """The second stage's deltas decoded with the first stage's weights."""
    first, second = np.float32([10, 10, 5, 5]), np.float32([20, 20, 10, 10])
    (name,) = [
        tensor.name
        for tensor in model.graph.initializer
        if np.array_equal(numpy_helper.to_array(tensor), second)
    ]
    change(model, name, lambda _: first)


def last_stage_alone(model):
    """Scores of the third stage instead of the mean: the others' logits without effect."""
    for stage in (0, 1):
        name = f"student.roi_heads.box_predictor.{stage}.cls_score"
        change(model, f"{name}.weight", np.zeros_like)


@pytest.mark.parametrize("fault", [wrong_transform, last_stage_alone])
def test_planted_faults_fail(fault, tiny, tmp_path):
    made = tiny("Cascade Mask R-CNN")
    model = onnx.load(made.path)
    fault(model)
    onnx.save(model, tmp_path / "faulty.onnx")
    report = verify(made.model, tmp_path / "faulty.onnx", made.spec)
    assert report.verdict == "the graph differs" and report.tally.unmatched > 0
