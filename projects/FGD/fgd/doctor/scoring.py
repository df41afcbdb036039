"""How well a detector finds labelled objects: AP50, which detections are right, confidence."""

import contextlib
import io
from typing import List, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.structures import Instances, pairwise_iou
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn


@torch.no_grad()
def detect(
    detector: nn.Module, samples: Sequence[dict], flip_channels: bool
) -> Optional[List[Instances]]:
    """Detections on training samples, in pixels of the augmented image, on the CPU.

    One image at a time, with the detector's own normalisation, padding and thresholds.

    Args:
        detector: in eval mode. samples: mapped dataset dicts. flip_channels: reverse their order.
    Returns:
        None if it does not predict boxes.
    """
    found = []
    for sample in samples:
        image = sample["image"].flip(0) if flip_channels else sample["image"]
        # Without "height" and "width", which would scale boxes to the image file.
        result = detector([{"image": image}])[0].get("instances")
        if result is None or not result.has("pred_boxes"):
            return None
        found.append(result.to("cpu"))
    return found


def ap50(truth: Sequence[Instances], found: Sequence[Instances], by_class: bool) -> float:
    """COCO's AP at IoU 0.5 in percent; NaN without any labelled object.

    Args:
        truth: per image, with gt_boxes and gt_classes. found: with pred_boxes, pred_classes and
            scores. by_class: mean over the classes that occur, else boxes are all that counts.
    """
    if not any(len(x) for x in truth):
        return float("nan")
    if not any(len(x) for x in found):
        return 0.0
    evaluation = _evaluate(truth, found, by_class)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    precision = evaluation.eval["precision"]
    return 100 * float(precision[precision > -1].mean())  # -1: classes that do not occur


def judge(
    truth: Sequence[Instances], found: Sequence[Instances], by_class: bool
) -> Tuple[np.ndarray, np.ndarray]:
    """(D,) scores, and which of these detections have found an object.

    COCO's matching: best scores first, each takes the free object that it overlaps most, with
    IoU >= 0.5 and, with ``by_class``, of its class; a second detection of an object is wrong.
    """
    if not any(len(x) for x in found):
        return np.zeros(0), np.zeros(0, bool)
    cells = [cell for cell in _evaluate(truth, found, by_class).evalImgs if cell is not None]
    scores = np.concatenate([cell["dtScores"] for cell in cells])
    return scores, np.concatenate([cell["dtMatches"][0] > 0 for cell in cells])


def _evaluate(truth: Sequence[Instances], found: Sequence[Instances], by_class: bool) -> COCOeval:
    """Detections matched at IoU 0.5, image by image. At least one is needed."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        labels, results = COCO(), []
        labels.dataset = _as_coco(truth, found)
        labels.createIndex()
        for image, instances in enumerate(found):
            rows = _rows(image, instances.pred_boxes, instances.pred_classes)
            scores = instances.scores.tolist()
            results += [{**row, "score": score} for row, score in zip(rows, scores)]
        evaluation = COCOeval(labels, labels.loadRes(results), "bbox")
        params = evaluation.params
        params.iouThrs, params.useCats, params.maxDets = np.array([0.5]), int(by_class), [100]
        params.areaRng, params.areaRngLbl = [[0, float("inf")]], ["all"]
        evaluation.evaluate()
    return evaluation


def _as_coco(truth: Sequence[Instances], found: Sequence[Instances]) -> dict:
    """Of all classes that are labelled or detected."""
    annotations = [
        {**row, "iscrowd": 0}
        for image, instances in enumerate(truth)
        for row in _rows(image, instances.gt_boxes, instances.gt_classes)
    ]
    for number, annotation in enumerate(annotations, start=1):  # 0 would mean "not matched"
        annotation["id"] = number
    classes = {row["category_id"] for row in annotations}
    classes.update(*(x.pred_classes.tolist() for x in found))
    return {
        "images": [{"id": image} for image in range(len(truth))],
        "annotations": annotations,
        "categories": [{"id": number} for number in sorted(classes)],
    }


def _rows(image: int, boxes, classes) -> List[dict]:
    return [
        {
            "image_id": image,
            "category_id": label,
            "bbox": [x, y, right - x, bottom - y],
            "area": (right - x) * (bottom - y),
        }
        for (x, y, right, bottom), label in zip(boxes.tensor.tolist(), classes.tolist())
    ]


def object_confidence(
    truth: Sequence[Instances], found: Sequence[Instances], by_class: bool
) -> List[float]:
    """Per image with objects: the mean over them of the best score that found them, in [0, 1].

    A detection finds an object with IoU >= 0.5 and, with ``by_class``, its class; 0 if none does.
    """
    means = []
    for labelled, detected in zip(truth, found):
        if not len(labelled):
            continue
        hit = pairwise_iou(labelled.gt_boxes.to("cpu"), detected.pred_boxes) >= 0.5
        if by_class:
            hit &= labelled.gt_classes.cpu()[:, None] == detected.pred_classes[None]
        best = (hit * detected.scores[None]).max(dim=1).values if len(detected) else hit.sum(1)
        means.append(float(best.float().mean()))
    return means
