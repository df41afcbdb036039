"""Comparing two sets of detections of one image. Arrays only.

Never row by row: rows whose scores differ by rounding alone may swap places.
"""

from dataclasses import dataclass
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from deploy.graphs.common import TIE

MIN_IOU = 0.9  # two boxes above it, with one label, are one detection
MARGIN = 1e-3  # a decision closer than this to its threshold may fall either way
_CLIPPED = 0.1  # what clipping may take from an IoU: NMS may have seen the boxes before it


class Found(NamedTuple):
    """Detections of one image, best first: boxes (R, 4) xyxy, scores (R,), labels (R,), and of
    instance segmentation masks (R, M, M), probabilities inside the box."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: Optional[np.ndarray] = None


class Decisions(NamedTuple):
    """Where a detector draws its lines; `cuts` are `ExportableDetector.cut_scores` of the image."""

    score_threshold: float
    nms_threshold: float
    max_detections: int
    cuts: Sequence[float] = ()


@dataclass
class Matching:
    """pairs: (expected row, actual row); missing: other expected rows; extra: other actual rows."""

    pairs: List[Tuple[int, int]]
    missing: List[int]
    extra: List[int]


def match_detections(expected: Found, actual: Found) -> Matching:
    """Pair detections of equal label and IoU > `MIN_IOU`, best score first, each used once."""
    iou = np.where(
        expected.labels[:, None] == actual.labels[None, :],
        box_iou(expected.boxes, actual.boxes),
        0.0,
    )
    pairs = []
    for row in range(len(iou)):
        best = int(iou[row].argmax()) if iou.shape[1] else 0
        if iou.shape[1] and iou[row, best] > MIN_IOU:
            pairs.append((row, best))
            iou[:, best] = 0
    rows, columns = {i for i, _ in pairs}, {j for _, j in pairs}
    return Matching(
        pairs=pairs,
        missing=[i for i in range(iou.shape[0]) if i not in rows],
        extra=[j for j in range(iou.shape[1]) if j not in columns],
    )


def near_decision(row: int, own: Found, other: Found, lines: Decisions) -> bool:
    """Whether rounding may explain that `own[row]` is missing from `other`.

    True within `MARGIN` of the score threshold, of the last score of a full list, or of the IoU at
    which a better detection of its class, in either list, suppresses it. Also where the order of
    equal scores decides, which Detectron2's sort does not define: when a level's candidates were
    cut among that score, or the other list has a detection of the same class and score that it
    overlaps so much that NMS keeps either.
    """
    box, score, label = own.boxes[row : row + 1], own.scores[row], own.labels[row]
    if any(abs(score - cut) <= TIE for cut in lines.cuts):
        return True
    limits = [lines.score_threshold]
    limits += [x.scores[-1] for x in (own, other) if len(x.scores) == lines.max_detections]
    if np.abs(score - np.array(limits)).min() <= MARGIN:
        return True
    for found in (own, other):
        rivals = (found.labels == label) & (found.scores >= score - MARGIN)
        iou = box_iou(box, found.boxes[rivals])
        if (np.abs(iou - lines.nms_threshold) <= MARGIN).any():
            return True
    tied = (other.labels == label) & (np.abs(other.scores - score) <= TIE)
    return bool((box_iou(box, other.boxes[tied]) > lines.nms_threshold).any())


def excuse(
    matching: Matching, expected: Found, actual: Found, lines: Decisions
) -> List[Tuple[str, int, bool]]:
    """Every unmatched detection, best first, and whether rounding may explain it.

    That is so near a decision, and for what an excused one suppresses: where NMS keeps one box
    instead of another, other boxes disappear and appear beneath it.

    Returns:
        ("missing", row of expected, excused) and ("extra", row of actual, excused).
    """
    unmatched = [("missing", row, expected, actual) for row in matching.missing]
    unmatched += [("extra", row, actual, expected) for row in matching.extra]
    unmatched.sort(key=lambda item: -item[2].scores[item[1]])
    results, causes = [], []
    for side, row, own, other in unmatched:
        box, label = own.boxes[row : row + 1], own.labels[row]
        excused = near_decision(row, own, other, lines) or any(
            label == cause_label and box_iou(box, cause_box)[0, 0] > lines.nms_threshold - _CLIPPED
            for cause_box, cause_label in causes
        )
        if excused:
            causes.append((box, label))
        results.append((side, row, excused))
    return results


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, M) intersection over union of xyxy boxes (N, 4) and (M, 4); 0 for empty boxes."""
    a, b = a.astype(np.float64)[:, None], b.astype(np.float64)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    overlap = sides.clip(min=0).prod(axis=-1)
    area = [(x[..., 2:] - x[..., :2]).clip(min=0).prod(axis=-1) for x in (a, b)]
    union = area[0] + area[1] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
