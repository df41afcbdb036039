"""Whether a detector is right as often as it is sure: what a student of its scores would learn.

Detection ECE after Küppers et al. (Multivariate Confidence Calibration for Object Detection, CVPRW
2020), of confidence alone.
"""

from typing import NamedTuple, Sequence

import numpy as np
from detectron2.structures import Instances

from .findings import OK, Finding
from .scoring import judge

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


def expected_error(scores: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Sum over equal bins of [0, 1] of n_bin / n · |share that is right - mean score|."""
    number = np.minimum((scores * bins).astype(int), bins - 1)
    gaps = np.bincount(number, right - scores, bins)  # n_bin times the difference
    return float(np.abs(gaps).sum() / len(scores))


def calibration(
    truth: Sequence[Instances], found: Sequence[Instances], by_class: bool
) -> Calibration:
    """Over all detections of all images; NaN where there is none."""
    scores, right = judge(truth, found, by_class)
    if not len(scores):
        return Calibration(0, *[float("nan")] * 4)
    sure = np.clip(scores, _CLOSEST, 1 - _CLOSEST)
    losses = -np.where(right, np.log(sure), np.log1p(-sure))
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
