import numpy as np
import onnx
import pytest
import torch
from detectron2.modeling import build_model

from deploy.checks.oracle import detectron2_detections
from deploy.checks.tiny import CANVAS, CLASSES, conditioned, scenes, tiny_cfg
from deploy.checks.verification import verify
from deploy.checks.verify_images import Batch
from deploy.errors import UserError
from deploy.graphs import exportable
from deploy.graphs.masks import mask_probabilities

from .conftest import SIZES, assert_equal_masks, ort_outputs
from .test_verification import change, nodes


@pytest.mark.parametrize("agnostic", [False, True])
def test_module_equals_detectron2_on_a_ragged_batch(agnostic):
    cfg = tiny_cfg("Mask R-CNN")
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = agnostic
    model, images = conditioned(cfg), scenes(3, seed=2)
    sizes = torch.tensor(SIZES, dtype=torch.int32)
    outputs = exportable(model)(images, sizes)
    expected = detectron2_detections(model, Batch(images.numpy(), sizes.numpy()))
    assert outputs[4].shape == (3, 100, 14, 14) and len(expected[0].masks) > 5
    assert_equal_masks(outputs[:5], expected)


def test_masks_of_their_own_class_and_none_past_the_last():
    logits = torch.randn(2 * 3, 4, 5, 5)
    labels = torch.tensor([[2, 0, -1], [3, -1, -1]], dtype=torch.int32)
    masks = mask_probabilities(logits, labels)
    assert masks.shape == (2, 3, 5, 5)
    for row, label in ((0, 2), (1, 0), (3, 3)):
        torch.testing.assert_close(masks.flatten(0, 1)[row], logits[row, label].sigmoid())
    assert not masks[0, 2].any() and not masks[1, 1:].any()
    one = mask_probabilities(logits[:, :1], labels)
    torch.testing.assert_close(one[1, 0], logits[3, 0].sigmoid())


def test_other_mask_heads_are_refused():
    model = build_model(tiny_cfg("Mask R-CNN"))
    model.roi_heads.mask_head = torch.nn.Identity()
    with pytest.raises(UserError, match="MODEL.ROI_MASK_HEAD.NAME: Identity cannot be exported"):
        exportable(model)


@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_equals_detectron2(batch, tiny):
    made, images = tiny("Mask R-CNN"), scenes(3, seed=4)
    for start in range(0, 3, batch):
        part, sizes = images[start : start + batch], SIZES[start : start + batch]
        padded = Batch(part.numpy(), np.array(sizes, np.int32))
        expected = detectron2_detections(made.model, padded)
        assert_equal_masks(ort_outputs(made.path, part, sizes), expected)


def test_onnx_without_detections(tiny):
    images = torch.full((1, 3, *CANVAS), float("nan"))
    outputs = ort_outputs(tiny("Mask R-CNN").path, images, [CANVAS])
    assert outputs[4].shape == (1, 100, 14, 14) and not outputs[4].any() and outputs[0] == 0


def test_the_file_says_what_its_masks_are(tiny):
    spec = tiny("Mask R-CNN").spec
    assert (spec.task, spec.mask_size, spec.classes) == ("instance_segmentation", 14, CLASSES)
    model = onnx.load(tiny("Mask R-CNN").path)
    masks = model.graph.output[4]
    assert masks.name == "masks"
    dims = [d.dim_param or d.dim_value for d in masks.type.tensor_type.shape.dim]
    assert dims == ["batch", 100, 14, 14]
    for node in model.graph.node:
        assert not node.metadata_props and not node.doc_string


def class_off_by_one(model):
    """The mask of the next class; labels stay."""
    change(model, "student.roi_heads.mask_head.predictor.weight", lambda x: np.roll(x, 1, axis=0))
    change(model, "student.roi_heads.mask_head.predictor.bias", lambda x: np.roll(x, 1))


def logits_for_probabilities(model):
    """The last sigmoid forgotten."""
    sigmoid = nodes(model, "Sigmoid")[-1]
    sigmoid.op_type = "Identity"


@pytest.mark.parametrize("fault", [class_off_by_one, logits_for_probabilities])
def test_planted_mask_faults_fail(fault, tiny, tmp_path):
    made = tiny("Mask R-CNN")
    model = onnx.load(made.path)
    fault(model)
    onnx.save(model, tmp_path / "faulty.onnx")
    report = verify(made.model, tmp_path / "faulty.onnx", made.spec)
    assert not report.passed and report.tally.mask_error > 1e-3
    assert report.tally.box_error < 1e-3 and "mask error" in report.table()
