import pytest
import torch
from detectron2.structures import Boxes

from deploy.graphs import exportable, rcnn
from deploy.graphs.regions import pool

from .conftest import (
    CANVAS,
    SIZES,
    assert_equal_detections,
    conditioned,
    detectron2_outputs,
    ort_outputs,
    scenes,
    toy_cfg,
)


def make_cfg(agnostic=False):
    cfg = toy_cfg("GeneralizedRCNN")
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = agnostic
    return cfg


@pytest.fixture(scope="module")
def model():
    return conditioned(make_cfg())


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("pooler", ["ROIAlignV2", "ROIAlign"])
def test_module_equals_detectron2_on_a_ragged_batch(agnostic, pooler):
    cfg = make_cfg(agnostic)
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE, cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE = pooler, 2
    model, images = conditioned(cfg), scenes(3, seed=2)
    outputs = exportable(model)(images, torch.tensor(SIZES, dtype=torch.int32))
    assert_equal_detections(outputs[:4], detectron2_outputs(model, images, SIZES))


def test_proposals_are_detectron2s(model, monkeypatch):
    monkeypatch.setitem(model.proposal_generator.post_nms_topk, False, 400)  # more than are found
    detector, images = exportable(model), scenes(2, seed=3)
    sizes = torch.tensor([CANVAS] * 2, dtype=torch.int32)
    rois = detector.network(images, sizes)["rois"]
    batch = model.preprocess_image([{"image": image} for image in images])
    proposals, _ = model.proposal_generator(batch, model.backbone(batch.tensor), None)
    for image, expected in enumerate(proposals):
        count = len(expected)
        # 100 candidates of each of three levels, 36 and 12 are all that there are
        assert 100 < count < 348 == rois.shape[1] and not rois[image, count:].any()
        torch.testing.assert_close(rois[image, :count], expected.proposal_boxes.tensor)


def test_pooling_levels_are_detectron2s_at_the_exact_bounds(model):
    """Squares of 112, 224 and 448 pixels, one pixel less, the whole canvas, and nothing."""
    sides = torch.tensor([0.0, 30, 111, 112, 113, 223, 224, 225, 447, 448, 900])
    rois = torch.stack([sides * 0, sides * 0, sides, sides], dim=-1)[None]
    features = [torch.randn(1, 16, 1024 // s, 1024 // s) for s in (4, 8, 16, 32)]
    pooler = model.roi_heads.box_pooler
    expected = pooler(features, [Boxes(rois[0])])
    torch.testing.assert_close(pool(pooler, features, rois), expected)


def test_more_candidates_than_the_limit_are_reported(model, monkeypatch):
    images, sizes = scenes(1), torch.tensor([CANVAS], dtype=torch.int32)
    detector = exportable(model)
    detector.score_threshold.fill_(0.5)
    raw = detector.network(images, sizes)
    count = detector.detect(raw, sizes)[0]
    assert 0 < count < 100 and detector.cut_images(raw, count) == 0
    monkeypatch.setattr(rcnn, "MAX_CANDIDATES", 2)
    assert detector.cut_images(raw, count) == 1
    assert detector.cut_images(raw, torch.full_like(count, 100)) == 0  # a full list is exact


def test_onnx_dynamic_image_class_agnostic(agnostic_rcnn):
    made = agnostic_rcnn
    for shape in ((96, 128), (64, 224), (32, 32)):
        images = scenes(2, shape, seed=5)
        sizes = [shape, (shape[0] - 5, shape[1] - 7)]
        expected = detectron2_outputs(made.model, images, sizes)
        assert_equal_detections(ort_outputs(made.path, images, sizes), expected, at_least=2)
