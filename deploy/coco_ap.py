"""COCO box AP from detections, as pycocotools measures it."""

import contextlib
import copy
import io
import math
from typing import Any, Dict, Iterable, List, Sequence, Tuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from deploy.coco_data import CocoData

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the order of COCOeval.stats

Result = Tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes (R, 4), scores (R,), labels (R,)


def coco_metrics(
    data: CocoData, classes: Sequence[str], results: Iterable[Result]
) -> Dict[str, Any]:
    """COCO's box metrics of one result per image of `data.images`, in that order.

    Args:
        results: boxes (R, 4) xyxy in pixels of the image, scores (R,), labels (R,) into `classes`.
    Returns:
        AP, AP50, AP75, APs, APm, APl in points of 100 (NaN where there is nothing to find), and
        "per_class" {class name: AP}. No detection at all gives 0.
    """
    category_ids = data.category_ids(classes)
    rows: List[Dict[str, Any]] = []
    for record, result in zip(data.images, results, strict=True):
        rows += _coco_rows(record["id"], result, category_ids)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it works
        truth = _index(data.truth)
        found = truth.loadRes(rows) if rows else _index({**data.truth, "annotations": []})
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = {name: _points(evaluation.stats[i]) for i, name in enumerate(METRICS)}
    # precision (IoU, recall, class in the order of catIds, area, detections per image)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    position = {category: i for i, category in enumerate(evaluation.params.catIds)}
    metrics["per_class"] = {
        name: _mean_points(precision[:, :, position[category]])
        for name, category in zip(classes, category_ids, strict=True)
    }
    return metrics


def _coco_rows(image_id, result: Result, category_ids: Sequence[int]) -> List[Dict[str, Any]]:
    """COCO result dicts: boxes as x, y, width, height; the dataset's own category ids."""
    boxes, scores, labels = result
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": box,
            "score": score,
        }
        for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
    ]


def _index(content: Dict[str, Any]) -> COCO:
    """pycocotools reads files only; this is its documented dict of the same content."""
    coco = COCO()
    coco.dataset = copy.deepcopy(content)  # it adds keys
    coco.dataset.setdefault("info", {})
    coco.createIndex()
    return coco


def _points(value: float) -> float:
    """0..1 to 0..100; pycocotools says -1 for "nothing to find"."""
    return 100.0 * float(value) if value >= 0 else math.nan


def _mean_points(precision: np.ndarray) -> float:
    valid = precision[precision > -1]
    return _points(valid.mean() if valid.size else -1)
