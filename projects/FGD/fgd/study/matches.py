"""Matches detections to true objects once, and gives COCO's AP of any resampled set of images."""

import contextlib
import copy
import io
from typing import Any, Dict, List, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

RECALLS = Params(iouType="bbox").recThrs  # 0, 0.01, ..., 1
_CELLS = 4_000_000  # resamples x detections that are held at a time; 32 MiB each array


class ClassMatches(NamedTuple):
    """Detections of one class on I images, best first; T IoU thresholds, 0.5 to 0.95.

    What is neither hit nor miss lies on a crowd, and COCO leaves it out.
    """

    image: np.ndarray  # (D,) index of the image
    hit: np.ndarray  # (T, D) bool: has found a true object
    miss: np.ndarray  # (T, D) bool: has found nothing
    truths: np.ndarray  # (I,) true objects of each image, without crowds


class Matches(NamedTuple):
    """Of one model on the test images."""

    image_ids: List[Any]
    classes: Dict[str, ClassMatches]  # by name, in the order of category ids


def index_truth(content: dict) -> COCO:
    """pycocotools' index of a COCO dict, without its printing."""
    coco = COCO()
    coco.dataset = {"info": {}, **copy.deepcopy(content)}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def match(truth: COCO, detections: List[dict], kind: str) -> Matches:
    """COCO's own matching on every image and class, at all object sizes.

    Args:
        detections: COCO results, as Detectron2 saves them. kind: "bbox" or "segm".
    """
    with contextlib.redirect_stdout(io.StringIO()):
        found = _results(truth, detections)
        evaluation = COCOeval(truth, found, kind)
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
        evaluation.evaluate()
    params = evaluation.params
    classes, count = {}, len(params.imgIds)
    for k, category in enumerate(params.catIds):
        cells = evaluation.evalImgs[k * count : (k + 1) * count]
        classes[truth.cats[category]["name"]] = _of_class(cells, len(params.iouThrs))
    return Matches(np.array(params.imgIds).tolist(), classes)


def _results(truth: COCO, detections: List[dict]) -> COCO:
    if detections:
        return truth.loadRes(copy.deepcopy(detections))  # it adds keys
    return index_truth({**truth.dataset, "annotations": []})  # it cannot read an empty list


def _of_class(cells: list, thresholds: int) -> ClassMatches:
    """From the dicts that pycocotools has per image; None where there is nothing at all."""
    truths = np.array([0 if c is None else np.sum(c["gtIgnore"] == 0) for c in cells], float)
    filled = [(i, c) for i, c in enumerate(cells) if c is not None]
    scores = np.concatenate([[], *(c["dtScores"] for _, c in filled)])
    order = np.argsort(-scores, kind="mergesort")  # stable, as COCOeval's
    image = np.concatenate([[], *(np.full(len(c["dtScores"]), i) for i, c in filled)])
    none = np.zeros((thresholds, 0))
    matched = np.concatenate([none, *(c["dtMatches"] for _, c in filled)], axis=1)[:, order] > 0
    ignored = np.concatenate([none, *(c["dtIgnore"] for _, c in filled)], axis=1)[:, order] > 0
    return ClassMatches(image[order].astype(int), matched & ~ignored, ~matched & ~ignored, truths)


def average_precision(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """COCO's AP of every class on B sets of images.

    Args:
        weights: (B, I) how often each set contains each image, in the order of ``image_ids``.
    Returns:
        (B, K) in percent; NaN where a set has no true object of the class. COCO's AP of all
        classes is the mean over those that are not NaN (`overall`). The same as COCOeval gives on
        a set with its images repeated under new ids, as long as scores within a class differ.
    """
    columns = [_class_ap(m, weights.astype(float)) for m in matches.classes.values()]
    return 100.0 * np.stack(columns, axis=1)


def overall(per_class: np.ndarray) -> np.ndarray:
    """(..., K) → (...,): the mean over classes that have true objects, NaN if none has."""
    known = ~np.isnan(per_class)
    total = np.where(known, per_class, 0.0).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return total / known.sum(axis=-1)


def _class_ap(matches: ClassMatches, weights: np.ndarray) -> np.ndarray:
    """(B,) in 0..1 or NaN, in portions that fit into memory."""
    portion = max(1, _CELLS // max(1, len(matches.image)))
    parts = [weights[i : i + portion] for i in range(0, len(weights), portion)]
    return np.concatenate([_portion_ap(matches, part) for part in parts])


def _portion_ap(matches: ClassMatches, weights: np.ndarray) -> np.ndarray:
    truths = weights @ matches.truths  # (B,)
    copies = weights[:, matches.image]  # (B, D)
    total = np.zeros(len(weights))
    for hit, miss in zip(matches.hit, matches.miss):
        # The envelope of precision over recall has its corners at hits: only these are looked at.
        hits = np.cumsum(copies[:, hit], axis=1)
        misses = np.cumsum(copies * miss, axis=1)[:, hit]
        precision = hits / (misses + hits + np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        total += [_mean_over_recalls(*row) for row in zip(hits, best, truths)]
    return np.where(truths > 0, total / len(matches.hit), np.nan)


def _mean_over_recalls(hits: np.ndarray, best: np.ndarray, truths: float) -> float:
    """Mean of the best precision at each of the 101 recalls or beyond; 0 where none reaches it."""
    if truths == 0 or not len(hits):
        return 0.0
    first = np.searchsorted(hits / truths, RECALLS, side="left")
    return best[first[first < len(hits)]].sum() / len(RECALLS)
