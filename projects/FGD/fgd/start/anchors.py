"""Anchors from the boxes: k-means by overlap, and how many boxes an anchor meets.

Boxes are x, y, width, height in pixels of the network's input.
"""

from typing import List, NamedTuple, Sequence, Tuple

import numpy as np

IOU = 0.5  # from which an anchor counts as meeting a box
_MOST = 5000  # boxes that are looked at, evenly spaced
_STARTS, _ROUNDS, _SEED = 5, 100, 0
_SIZES = 3  # of each level, as Detectron2's RetinaNet has
_AS_GOOD = 0.005  # of recall: fewer ratios are preferred to so little


class Anchors(NamedTuple):
    """MODEL.ANCHOR_GENERATOR: sizes of each level, ratios height / width of all; and recalls.

    Attributes:
        found: share of boxes that the k-means' anchors meet. default: that Detectron2's would.
    """

    sizes: List[List[float]]
    ratios: List[float]
    found: float
    default: float

    @property
    def kept(self) -> bool:
        """Whether these are Detectron2's."""
        return self.default >= self.found


def default_sizes(strides: Sequence[int], two_stage: bool) -> List[List[float]]:
    """Detectron2's: three thirds of an octave from 4 strides on, or one size of 8 strides."""
    if two_stage:
        return [[8.0 * stride] for stride in strides]
    return [[round(4 * stride * 2 ** (i / 3), 1) for i in range(3)] for stride in strides]


def choose(boxes: np.ndarray, strides: Sequence[int], two_stage: bool) -> Anchors:
    """Anchors from k-means, or Detectron2's where they meet as many boxes."""
    boxes = boxes[np.linspace(0, len(boxes) - 1, min(len(boxes), _MOST)).astype(int)]
    sizes = level_sizes(boxes[:, 2:], len(strides), _SIZES)
    scored = [(recall(boxes, sizes, strides, x), x) for x in _ratio_sets(boxes[:, 2:])]
    best = max(score for score, _ in scored)
    found, ratios = next(x for x in scored if x[0] >= best - _AS_GOOD)
    usual, shapes = default_sizes(strides, two_stage), [0.5, 1.0, 2.0]
    default = recall(boxes, usual, strides, shapes)
    if default >= found:
        return Anchors(usual, shapes, found, default)
    return Anchors(sizes, ratios, found, default)


def _ratio_sets(shapes: np.ndarray) -> List[List[float]]:
    """Candidates, fewest first: square, the median, quartiles, tenths with the median."""
    ratio = shapes[:, 1] / shapes[:, 0]
    sets = [[1.0]]
    sets += [np.percentile(ratio, x).tolist() for x in ([50], [25, 75], [10, 50, 90])]
    rounded = [sorted({float(f"{x:.2g}") for x in own}) for own in sets]
    return [own for i, own in enumerate(rounded) if own not in rounded[:i]]


def level_sizes(shapes: np.ndarray, levels: int, per_level: int) -> List[List[float]]:
    """Sizes of each level, finest first: the clusters by area, as many on each level.

    Where shapes are fewer than that, each level has one size, and neighbours may share it.
    """
    distinct = len(np.unique(shapes, axis=0))
    per_level = per_level if distinct >= levels * per_level else 1
    centres = kmeans(shapes, min(levels * per_level, distinct))
    sizes = np.sqrt(centres.prod(1))
    wanted = np.linspace(0, len(sizes) - 1, levels * per_level)
    sizes = np.interp(wanted, np.arange(len(sizes)), sizes).reshape(levels, per_level)
    return [[float(f"{x:.3g}") for x in own] for own in sizes]


def shape_iou(shapes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(R, K) overlap of widths and heights (R, 2) and (K, 2), centre on centre."""
    inside = np.minimum(shapes[:, None], others[None]).prod(2)
    return inside / (shapes.prod(1)[:, None] + others.prod(1)[None] - inside)


def kmeans(shapes: np.ndarray, count: int) -> np.ndarray:
    """(count, 2) centres by ascending area, distance 1 - IoU; the same for the same shapes.

    Args:
        shapes: (R, 2), at least ``count`` of them distinct.
    """
    generator = np.random.default_rng(_SEED)
    runs = [_one_run(shapes, count, generator) for _ in range(_STARTS)]
    centres = max(runs, key=lambda own: shape_iou(shapes, own).max(1).mean())
    return centres[np.argsort(centres.prod(1), kind="stable")]


def _one_run(shapes: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    centres = shapes[[generator.integers(len(shapes))]]
    while len(centres) < count:  # k-means++: far ones are likely to be the next
        apart = (1 - shape_iou(shapes, centres).max(1)).clip(0) ** 2
        chosen = generator.choice(len(shapes), p=apart / apart.sum())
        centres = np.concatenate([centres, shapes[[chosen]]])
    owner = None
    for _ in range(_ROUNDS):
        own = shape_iou(shapes, centres).argmax(1)
        if owner is not None and (own == owner).all():
            break
        owner = own
        members = [shapes[owner == k] for k in range(count)]
        centres = np.stack([m.mean(0) if len(m) else c for m, c in zip(members, centres)])
    return centres


def recall(
    boxes: np.ndarray,
    sizes: Sequence[Sequence[float]],
    strides: Sequence[int],
    ratios: Sequence[float],
) -> float:
    """Share of boxes (R, 4) that overlap an anchor by `IOU`, anchors where Detectron2 has them.

    Their centres are the multiples of a level's stride; the one nearest to a box meets it best.
    """
    centre, shape = boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]
    best = np.zeros(len(boxes))
    for stride, own in zip(strides, sizes, strict=True):
        offset = np.abs(centre - np.round(centre / stride) * stride)
        for anchor in _shapes(own, ratios):
            inside = np.minimum(np.minimum(shape, anchor), (shape + anchor) / 2 - offset)
            inside = inside.clip(0).prod(1)
            best = np.maximum(best, inside / (shape.prod(1) + anchor.prod() - inside))
    return float((best >= IOU).mean())


def _shapes(sizes: Sequence[float], ratios: Sequence[float]) -> List[np.ndarray]:
    """Width and height of each size in each ratio, as Detectron2 makes them."""
    pairs: List[Tuple[float, float]] = [(size, ratio) for size in sizes for ratio in ratios]
    return [np.array([size / ratio**0.5, size * ratio**0.5]) for size, ratio in pairs]
