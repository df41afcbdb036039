"""Metrics equal Detectron2's evaluator on the same detections, and hand-computed cases."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from deploy.coco_ap import METRICS, coco_metrics
from deploy.coco_data import load_dataset
from deploy.serving.paste import encode_rle

from .coco_files import SIZES, write_dataset
from .fake_graph import CLASSES, FRACTIONS

NOTHING = (np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


def perfect(size):
    height, width = size
    boxes = (np.array(FRACTIONS) * [width, height, width, height]).astype(np.float32)
    return boxes, np.array([0.9, 0.8, 0.7], np.float32), np.arange(3)


def noisy(size, seed):
    """Perfect boxes moved by up to 6 pixels, with false ones and wrong classes among them."""
    generator = np.random.default_rng(seed)
    boxes, _, labels = perfect(size)
    boxes = np.concatenate([boxes + generator.uniform(-6, 6, boxes.shape), boxes + 3, boxes / 2])
    labels = np.concatenate([labels, generator.integers(0, 3, 6)])
    order = np.argsort(-generator.random(9))
    scores = np.sort(generator.random(9))[::-1].astype(np.float32)
    return boxes.astype(np.float32)[order], scores, labels[order]


@pytest.fixture
def data(tmp_path):
    return load_dataset(str(write_dataset(tmp_path)))


def test_perfect_detections_score_100(data):
    metrics = coco_metrics(data, CLASSES, map(perfect, SIZES))
    assert metrics["AP"] == metrics["AP50"] == metrics["AP75"] == pytest.approx(100)
    assert metrics["per_class"] == {name: pytest.approx(100) for name in CLASSES}
    assert math.isnan(metrics["APl"])  # no box of 96 x 96 pixels: not 0


def test_a_missing_class_costs_a_third(data):
    results = [[part[:2] for part in perfect(size)] for size in SIZES]
    metrics = coco_metrics(data, CLASSES, results)
    assert metrics["AP"] == pytest.approx(200 / 3)
    assert metrics["per_class"] == pytest.approx({"circle": 100, "square": 100, "triangle": 0})


def test_no_detection_at_all_is_zero(data):
    metrics = coco_metrics(data, CLASSES, [NOTHING] * 3)
    assert metrics["AP"] == metrics["AP50"] == 0.0


def test_ground_truth_is_not_changed(data):
    before = json.dumps(data.truth)
    coco_metrics(data, CLASSES, map(perfect, SIZES))
    assert json.dumps(data.truth) == before


def test_a_result_per_image_is_demanded(data):
    with pytest.raises(ValueError, match="shorter"):
        coco_metrics(data, CLASSES, [NOTHING] * 2)


def bitmap(box, size):
    """The lower right half of a box, cut along its diagonal."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    across, down = (x - box[0]) / (box[2] - box[0]), (y - box[1]) / (box[3] - box[1])
    return (across + down > 1) & (across < 1) & (down < 1)


def add_masks(data):
    """The same shape as polygons, given to every true box."""
    for annotation in data.truth["annotations"]:
        x, y, width, height = annotation["bbox"]
        corners = [x + width, y, x + width, y + height, x, y + height]
        annotation |= {"segmentation": [corners], "area": width * height / 2}
    assert data.with_masks


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_equals_detectron2s_evaluator(data, tmp_path, kind):
    """Its class order is by category id: square 3, circle 7, triangle 12."""
    add_masks(data)
    by_id = [CLASSES.index(name) for name in ("square", "circle", "triangle")]
    path = tmp_path / "complete.json"
    path.write_text(json.dumps(data.truth))
    register_coco_instances("serve_ap", {}, str(path), str(tmp_path / "images"))
    try:
        DatasetCatalog.get("serve_ap")  # sets the metadata's table of category ids
        evaluator = COCOEvaluator("serve_ap", [kind], use_fast_impl=False, distributed=False)
        evaluator.reset()
        results, with_masks = [noisy(size, seed) for seed, size in enumerate(SIZES)], []
        for record, (boxes, scores, labels) in zip(data.images, results, strict=True):
            instances = Instances((record["height"], record["width"]))
            instances.pred_boxes = Boxes(torch.from_numpy(boxes))
            instances.scores = torch.from_numpy(scores)
            instances.pred_classes = torch.tensor([by_id.index(label) for label in labels])
            masks = [bitmap(box, instances.image_size) for box in boxes]
            instances.pred_masks = torch.from_numpy(np.stack(masks))
            with_masks.append((boxes, scores, labels, [encode_rle(mask) for mask in masks]))
            evaluator.process([{"image_id": record["id"]}], [{"instances": instances}])
        expected = evaluator.evaluate()[kind]
    finally:
        DatasetCatalog.remove("serve_ap")
        MetadataCatalog.remove("serve_ap")
    actual = coco_metrics(data, CLASSES, with_masks)
    assert coco_metrics(data, CLASSES, results)["AP"] == actual["AP"] != actual["masks"]["AP"]
    actual = actual["masks"] if kind == "segm" else actual
    assert 5 < expected["AP"] < 95
    for name in METRICS:
        assert actual[name] == pytest.approx(expected[name], abs=1e-9, nan_ok=True)
    for name in CLASSES:
        assert actual["per_class"][name] == pytest.approx(expected[f"AP-{name}"], abs=1e-9)
