"""Matches detections to true objects once, and gives COCO's AP of any resampled set of images."""

import contextlib
import copy
import io
from typing import Callable, Dict, List, NamedTuple, Sequence

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


Classes = Dict[str, ClassMatches]  # by name, in the order of category ids


class Matches(NamedTuple):
    """Of one model on the test images."""

    classes: Classes
    sizes: Dict[str, Classes]  # "small", "medium" and "large": objects of that size alone


def index_truth(content: dict) -> COCO:
    """pycocotools' index of a COCO dict, without its printing."""
    coco = COCO()
    coco.dataset = {"info": {}, **copy.deepcopy(content)}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def match(truth: COCO, detections: List[dict], kind: str) -> Matches:
    """COCO's own matching on every image and class, of objects of all sizes and of each.

    Args:
        detections: COCO results, as Detectron2 saves them. kind: "bbox" or "segm".
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, _results(truth, detections), kind)
        params = evaluation.params
        sizes = dict(zip(params.areaRngLbl[1:], params.areaRng[1:], strict=True))
        params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
        evaluation.evaluate()
    whole = evaluation.evalImgs
    of_size = {
        name: _by_class(evaluation, [cell and _at_size(evaluation, cell, x) for cell in whole])
        for name, x in sizes.items()
    }
    return Matches(_by_class(evaluation, whole), of_size)


def _by_class(evaluation: COCOeval, cells: list) -> Classes:
    """Args: cells: what pycocotools has of every class and image, in this order."""
    params, count = evaluation.params, len(evaluation.params.imgIds)
    return {
        evaluation.cocoGt.cats[category]["name"]: _of_class(
            cells[k * count : (k + 1) * count], len(params.iouThrs)
        )
        for k, category in enumerate(params.catIds)
    }


def _at_size(evaluation: COCOeval, cell: dict, bounds: Sequence[float]) -> dict:
    """What pycocotools has of one class and image where objects of other sizes are left out.

    Its loops are slow, and few cells need them again: an object can lose its detection to another
    one only where one of them counts and the other does not.

    Args:
        cell: of all sizes. bounds: least and greatest area, in pixels.
    """

    def outside(anns: dict, ids: Sequence[int]) -> np.ndarray:
        areas = np.array([anns[x]["area"] for x in ids], float)
        return (areas < bounds[0]) | (areas > bounds[1])

    left_out = outside(evaluation.cocoGt.anns, cell["gtIds"])
    mixed = len(set(left_out.tolist())) > 1 or np.any(cell["gtIgnore"])
    if mixed or 0 in cell["gtIds"]:  # pycocotools does not count a match with the object 0 as one
        ids = cell["image_id"], cell["category_id"]
        return evaluation.evaluateImg(*ids, bounds, cell["maxDet"])
    found = cell["dtMatches"] > 0
    ignored = np.where(found, left_out.any(), outside(evaluation.cocoDt.anns, cell["dtIds"]))
    return {**cell, "gtIgnore": left_out, "dtIgnore": ignored}


def _results(truth: COCO, detections: List[dict]) -> COCO:
    if detections:
        return truth.loadRes([dict(x) for x in detections])  # it adds keys
    return index_truth({**truth.dataset, "annotations": []})  # it cannot read an empty list


def _of_class(cells: list, thresholds: int) -> ClassMatches:
    """From the dicts that pycocotools has per image; None where there is nothing at all."""
    truths = np.array([0 if c is None else np.sum(c["gtIgnore"] == 0) for c in cells], int)
    filled = [(i, c) for i, c in enumerate(cells) if c is not None]
    scores = np.concatenate([[], *(c["dtScores"] for _, c in filled)])
    order = np.argsort(-scores, kind="mergesort")  # stable, as COCOeval's
    image = np.concatenate([[], *(np.full(len(c["dtScores"]), i) for i, c in filled)])
    none = np.zeros((thresholds, 0))
    matched = np.concatenate([none, *(c["dtMatches"] for _, c in filled)], axis=1)[:, order] > 0
    ignored = np.concatenate([none, *(c["dtIgnore"] for _, c in filled)], axis=1)[:, order] > 0
    return ClassMatches(image[order].astype(int), matched & ~ignored, ~matched & ~ignored, truths)


def average_precision(classes: Classes, weights: np.ndarray) -> np.ndarray:
    """COCO's AP of every class on B sets of images.

    Args:
        weights: (B, I) how often each set contains each image, in the order of their ids.
    Returns:
        (B, K) in percent; NaN where a set has no true object of the class. COCO's AP of all
        classes is the mean over those that are not NaN (`overall`). The same as COCOeval gives on
        a set with its images repeated under new ids, as long as scores within a class differ.
    """
    columns = [_class_ap(m, weights.astype(int)) for m in classes.values()]
    return 100.0 * np.stack(columns, axis=1)


def overall(per_class: np.ndarray) -> np.ndarray:
    """(..., K) → (...,): the mean over classes that have true objects, NaN if none has."""
    known = ~np.isnan(per_class)
    total = np.where(known, per_class, 0.0).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return total / known.sum(axis=-1)


def _class_ap(matches: ClassMatches, weights: np.ndarray) -> np.ndarray:
    """(B,) in 0..1 or NaN, in portions that fit into memory."""
    matches = _until_last_hit(matches)
    portion = max(1, _CELLS // max(1, len(matches.image)))
    parts = [weights[i : i + portion] for i in range(0, len(weights), portion)]
    return np.concatenate([_portion_ap(matches, part) for part in parts])


def _until_last_hit(matches: ClassMatches) -> ClassMatches:
    """Without what has no bearing on AP: the end of the list, and what counts at no threshold."""
    used = matches.hit.any(axis=0)
    kept = (used | matches.miss.any(axis=0)) & (used[::-1].cumsum()[::-1] > 0)
    return ClassMatches(
        matches.image[kept], matches.hit[:, kept], matches.miss[:, kept], matches.truths
    )


def _portion_ap(matches: ClassMatches, weights: np.ndarray) -> np.ndarray:
    truths = weights @ matches.truths  # (B,)
    if not len(matches.image):
        return np.where(truths > 0, 0.0, np.nan)
    # Misses in a row, which are so at every threshold, are added up once: S rows are left of D.
    apart = ~matches.miss.all(axis=0)
    first = np.flatnonzero(apart | np.r_[True, apart[:-1]])
    copies = np.add.reduceat(weights.T[matches.image], first, axis=0)  # (S, B)
    recalls = _recalls_reached(truths)
    total = np.zeros(len(weights))
    for hit, miss in zip(matches.hit[:, first], matches.miss[:, first]):
        # The envelope of precision over recall has its corners at hits: only these are looked at.
        hits = np.cumsum(copies[hit], axis=0)
        counted = np.cumsum(copies * (hit | miss)[:, None], axis=0)[hit]
        precision = hits / (counted + np.spacing(1))
        best = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        reached = np.diff(recalls(hits), axis=0, prepend=0)
        total += np.einsum("sb,sb->b", best, reached) / len(RECALLS)
    return np.where(truths > 0, total / len(matches.hit), np.nan)


def _recalls_reached(truths: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """How many of the 101 recalls so many hits reach, of (B,) true objects: (S, B) → (S, B)."""
    numbers, row = np.unique(truths, return_inverse=True)
    hits = np.arange(truths.max() + 1)
    table = np.searchsorted(RECALLS, hits / np.maximum(1, numbers)[:, None], side="right")
    return lambda found: table.ravel()[row * len(hits) + found]
