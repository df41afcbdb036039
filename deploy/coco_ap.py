"""COCO box and mask AP from detections, as pycocotools measures it."""

import contextlib
import copy
import io
import math
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from deploy.coco_data import CocoData

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the order of COCOeval.stats


class Result(NamedTuple):
    """Detections of one image."""

    boxes: np.ndarray  # (R, 4) xyxy in pixels
    scores: np.ndarray  # (R,)
    labels: np.ndarray  # (R,) into the classes
    masks: Optional[Sequence[Dict]] = None  # COCO's compressed RLE of each


def coco_metrics(
    data: CocoData, classes: Sequence[str], results: Iterable[Sequence]
) -> Dict[str, Any]:
    """COCO's box metrics of one result per image of `data.images`, in that order.

    Args:
        results: `Result`, or the same as a tuple.
    Returns:
        AP, AP50, AP75, APs, APm, APl in points of 100 (NaN where there is nothing to find), and
        "per_class" {class name: AP}. No detection at all gives 0. Where results have masks, the
        same of the masks as "masks"; all true boxes must then have one.
    """
    category_ids = data.category_ids(classes)
    rows: List[Dict[str, Any]] = []
    with_masks = False
    for record, values in zip(data.images, results, strict=True):
        result = Result(*values)
        with_masks |= result.masks is not None
        rows += _coco_rows(record["id"], result, category_ids)
    metrics = _evaluate(data, rows, "bbox", classes, category_ids)
    if with_masks:
        # with a box in them, pycocotools would take the area of the box for that of the mask
        rows = [{key: row[key] for key in row if key != "bbox"} for row in rows]
        metrics["masks"] = _evaluate(data, rows, "segm", classes, category_ids)
    return metrics


def _evaluate(data: CocoData, rows: List[Dict], kind: str, classes, category_ids) -> Dict[str, Any]:
    """The metrics of `coco_metrics` for boxes ("bbox") or masks ("segm")."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it works
        truth = _index(data.truth)
        found = truth.loadRes(rows) if rows else _index({**data.truth, "annotations": []})
        evaluation = COCOeval(truth, found, kind)
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
    boxes = np.concatenate([result.boxes[:, :2], result.boxes[:, 2:] - result.boxes[:, :2]], axis=1)
    rows = [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": box,
            "score": score,
        }
        for box, score, label in zip(
            boxes.tolist(), result.scores.tolist(), result.labels.tolist(), strict=True
        )
    ]
    for row, mask in zip(rows, result.masks or ()):
        row["segmentation"] = mask
    return rows


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
