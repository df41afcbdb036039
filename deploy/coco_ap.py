"""COCO box and mask AP from detections, as pycocotools measures it."""

import contextlib
import copy
import io
import math
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

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


class Outcomes(NamedTuple):
    """Of one class in all images: which boxes are right at IoU 0.5, as COCO matches them.

    scores (R,) and hits (R,) bool of the boxes; objects: how many there are. Boxes on crowd regions
    are neither right nor wrong, and left out.
    """

    scores: np.ndarray
    hits: np.ndarray
    objects: int


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


def box_outcomes(
    data: CocoData, classes: Sequence[str], results: Iterable[Result]
) -> Tuple[float, Dict[str, Outcomes]]:
    """AP50 in points of 100, and of each class which boxes are right; `results` as above."""
    category_ids = data.category_ids(classes)
    rows: List[Dict[str, Any]] = []
    for record, result in zip(data.images, results, strict=True):
        rows += _coco_rows(record["id"], result, category_ids)
    evaluation = _run(data, rows, "bbox")
    # by class in the order of catIds, then area (the first: any), then image
    images, areas = len(evaluation.params.imgIds), len(evaluation.params.areaRng)
    found = {}
    for name, category in zip(classes, category_ids, strict=True):
        start = evaluation.params.catIds.index(category) * areas * images
        found[name] = _outcomes(evaluation.evalImgs[start : start + images])
    return _points(evaluation.stats[1]), found


def _outcomes(of_images: Sequence[Optional[Dict[str, Any]]]) -> Outcomes:
    scores, hits, objects = [np.zeros(0)], [np.zeros(0, bool)], 0
    for image in of_images:
        if image is not None:
            counted = image["dtIgnore"][0] == 0  # at the first IoU, 0.5
            scores.append(np.array(image["dtScores"])[counted])
            hits.append(image["dtMatches"][0][counted] > 0)
            objects += int((np.array(image["gtIgnore"]) == 0).sum())
    return Outcomes(np.concatenate(scores), np.concatenate(hits), objects)


def _evaluate(data: CocoData, rows: List[Dict], kind: str, classes, category_ids) -> Dict[str, Any]:
    """The metrics of `coco_metrics` for boxes ("bbox") or masks ("segm")."""
    evaluation = _run(data, rows, kind)
    metrics = {name: _points(evaluation.stats[i]) for i, name in enumerate(METRICS)}
    # precision (IoU, recall, class in the order of catIds, area, detections per image)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    position = {category: i for i, category in enumerate(evaluation.params.catIds)}
    metrics["per_class"] = {
        name: _mean_points(precision[:, :, position[category]])
        for name, category in zip(classes, category_ids, strict=True)
    }
    return metrics


def _run(data: CocoData, rows: List[Dict], kind: str) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it works
        truth = _index(data.truth)
        found = truth.loadRes(rows) if rows else _index({**data.truth, "annotations": []})
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


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
