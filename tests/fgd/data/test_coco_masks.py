"""Masks of COCO files: polygons and RLE load, train and are evaluated; faults are named."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from fgd.data.datasets import register_from_config
from fgd.errors import UserError
from tests.conftest import make_tiny_cfg
from tests.fgd_inputs.coco_files import coco_dict, write_coco
from tests.fgd_inputs.test_coco import MASKS, POLYGON, masked, rle


def mask_cfg(folder, coco, mask_format="polygon"):
    cfg = make_tiny_cfg("GeneralizedRCNN")
    cfg.OUTPUT_DIR = str(folder / "output")
    cfg.DATASETS.JSON.TRAIN = cfg.DATASETS.JSON.TEST = write_coco(folder, coco)
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 7
    cfg.INPUT.MASK_FORMAT = mask_format
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.MIN_SIZE_TRAIN = (48,)
    return cfg


@pytest.mark.parametrize(
    "kind, mask_format",
    [("polygon", "polygon"), *[(kind, "bitmask") for kind in MASKS]],
    ids=str,
)
def test_masks_are_read_and_trained_on(kind, mask_format, tmp_path):
    cfg = register_from_config(mask_cfg(tmp_path, masked(MASKS[kind]), mask_format))
    mapper = DatasetMapper(cfg, True)
    batch = [mapper(record) for record in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])]
    masks = batch[0]["instances"].gt_masks
    boxes = masks.get_bounding_boxes().tensor
    torch.testing.assert_close(boxes, torch.tensor([[4.0, 6, 24, 16]]))
    model = build_model(cfg).train()
    with EventStorage():
        losses = model(batch)
    assert 0.3 < losses["loss_mask"].item() < 1.5  # ln 2 before training
    losses["loss_mask"].backward()
    gradient = model.roi_heads.mask_head.predictor.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("complete", [True, False])
def test_evaluation_knows_masks(kind, complete, tmp_path):
    """Segm AP 100 for the true masks; 0 for the left 40 % of them, while the boxes are right."""
    coco = masked(MASKS[kind])
    if not complete:  # then Detectron2 evaluates against the loaded dataset
        del coco["annotations"][0]["area"]
    (name,) = register_from_config(mask_cfg(tmp_path, coco), splits=("TEST",)).DATASETS.TEST
    records = DatasetCatalog.get(name)
    for share, expected in ((1.0, 100.0), (0.4, 0.0)):
        evaluator = COCOEvaluator(name, output_dir=str(tmp_path), use_fast_impl=False)
        evaluator.reset()
        for record in records:
            found = Instances((48, 64))
            found.pred_boxes = Boxes(torch.tensor([[4.0, 6, 24, 16]]))
            found.scores = torch.tensor([0.9])
            found.pred_classes = torch.tensor([record["annotations"][0]["category_id"]])
            found.pred_masks = torch.zeros(1, 48, 64, dtype=torch.bool)
            found.pred_masks[0, 6:16, 4 : 4 + int(20 * share)] = True
            evaluator.process([record], [{"instances": found}])
        results = evaluator.evaluate()
        assert results["bbox"]["AP"] == pytest.approx(100)
        assert results["segm"]["AP"] == pytest.approx(expected)


def test_what_is_said_to_be_dropped_is_dropped(tmp_path):
    coco = masked([POLYGON])
    coco["annotations"][1]["segmentation"] = [[4, 6, 24, 6]]
    cfg = register_from_config(mask_cfg(tmp_path, coco))
    (name,) = cfg.DATASETS.TRAIN
    assert [len(record["annotations"]) for record in DatasetCatalog.get(name)] == [1, 0, 1]
    report = json.loads((tmp_path / "output" / "data_report.json").read_text())
    assert [d["annotation"] for d in report[name]["dropped"]] == [101]


def test_masks_are_asked_for_by_the_config(tmp_path):
    cfg = mask_cfg(tmp_path, coco_dict())
    with pytest.raises(UserError, match="annotation 100 has no segmentation"):
        register_from_config(cfg)
    cfg.MODEL.MASK_ON = False
    register_from_config(cfg)
    cfg.MODEL.MASK_ON = True  # registered, but for boxes alone
    with pytest.raises(UserError, match="annotation 100 has no segmentation"):
        register_from_config(cfg)
    cfg.INPUT.MASK_FORMAT = "png"
    with pytest.raises(UserError, match="MASK_FORMAT: 'png' is neither"):
        register_from_config(cfg)


def test_rle_is_refused_for_training_with_polygons_and_fine_for_evaluation(tmp_path):
    cfg = mask_cfg(tmp_path, masked(rle(True)))
    with pytest.raises(UserError, match="annotation 100 .* set INPUT.MASK_FORMAT bitmask"):
        register_from_config(cfg)
    register_from_config(cfg, splits=("TEST",))


@pytest.mark.parametrize("mask_format, error", [("polygon", 0.02), ("bitmask", 1.5)])
def test_drawn_shapes_have_masks_that_agree_with_their_boxes(mask_format, error, tmp_path):
    """Flipped or not. Polygons are rounded to 0.01 px; bitmaps cover whole pixels."""
    cfg = make_tiny_cfg("GeneralizedRCNN")
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.DATASETS.SHAPES.TRAIN_IMAGES, cfg.DATASETS.SHAPES.TEST_IMAGES = 12, 1
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = True, mask_format
    cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    cfg = register_from_config(cfg)
    mapper, seen = DatasetMapper(cfg, True), 0
    for record in DatasetCatalog.get(cfg.DATASETS.TRAIN[0]):
        instances = mapper(record)["instances"]
        boxes = instances.gt_masks.get_bounding_boxes().tensor
        torch.testing.assert_close(boxes, instances.gt_boxes.tensor, atol=error, rtol=0)
        seen += len(instances)
    assert seen >= 12
