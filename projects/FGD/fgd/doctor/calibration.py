"""Whether a detector is right as often as it is sure: what a student of its scores would learn.

Detection ECE after Küppers et al. (Multivariate Confidence Calibration for Object Detection, CVPRW
2020), of confidence alone.
"""

from typing import List, NamedTuple, Sequence

import numpy as np
from detectron2.structures import Instances, pairwise_iou

from .findings import OK, Finding

BINS = 10
_CLOSEST = 1e-6  # to 0 and 1 that a score counts in the logarithm


class Calibration(NamedTuple):
    """Of n detections: the mean score and the share that is right, both in [0, 1].

    Attributes:
        ece: expected calibration error in [0, 1]. log_loss: >= 0, in nats per detection.
    """

    detections: int
    score: float
    right: float
    ece: float
    log_loss: float


def right_ones(truth: Instances, found: Instances, by_class: bool) -> List[bool]:
    """Which detections of one image have found an object, in their order.

    Best scores first, each takes the free object that it overlaps most, with IoU >= 0.5 and, with
    ``by_class``, of its class; a second detection of an object is wrong.
    """
    overlaps = pairwise_iou(found.pred_boxes, truth.gt_boxes.to("cpu"))
    if by_class:
        overlaps *= found.pred_classes[:, None] == truth.gt_classes.cpu()[None]
    right = [False] * len(found)
    for i in found.scores.argsort(descending=True, stable=True).tolist() if len(truth) else ():
        best = int(overlaps[i].argmax())
        right[i] = bool(overlaps[i, best] >= 0.5)
        if right[i]:
            overlaps[:, best] = 0
    return right


def expected_error(scores: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Sum over equal bins of [0, 1] of n_bin / n · |share that is right - mean score|."""
    number = np.minimum((scores * bins).astype(int), bins - 1)
    gaps = np.bincount(number, right - scores, bins)  # n_bin times the difference
    return float(np.abs(gaps).sum() / len(scores))


def calibration(
    truth: Sequence[Instances], found: Sequence[Instances], by_class: bool
) -> Calibration:
    """Over all detections of all images; NaN where there is none."""
    scores = np.concatenate([[], *(x.scores.numpy() for x in found)])
    right = [right_ones(*pair, by_class) for pair in zip(truth, found, strict=True)]
    right = np.concatenate([[], *right]).astype(float)
    if not len(scores):
        return Calibration(0, *[float("nan")] * 4)
    sure = np.clip(scores, _CLOSEST, 1 - _CLOSEST)
    losses = -np.where(right > 0, np.log(sure), np.log1p(-sure))
    ece = expected_error(scores, right)
    return Calibration(len(scores), scores.mean(), right.mean(), ece, losses.mean())


def check_calibration(found: Calibration, images: int) -> Finding:
    """What is known of it; no fault, since methods of maps never see a score."""
    if not found.detections:
        return Finding("calibration", OK, f"the teacher detects nothing on {images} images")
    way = "sure too often" if found.score > found.right else "sure too seldom"
    text = (
        f"mean score {found.score:.2f}, {100 * found.right:.0f} % right of {found.detections} "
        f"detections on {images} training images: {way}; detection ECE {found.ece:.3f}, log-loss "
        f"{found.log_loss:.3f}"
    )
    return Finding("calibration", OK, text)
