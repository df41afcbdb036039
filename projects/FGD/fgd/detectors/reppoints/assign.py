"""Which location answers for which ground-truth box: pure functions, same result on every run."""

import math
from typing import Sequence, Tuple

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

__all__ = ["BACKGROUND", "IGNORED", "assign_by_iou", "assign_points"]

BACKGROUND, IGNORED = -1, -2  # in place of the index of a box
_SMALLEST_SIDE = 1e-6  # pixels


@torch.no_grad()
def assign_points(
    boxes: Tensor, shapes: Sequence[Tuple[int, int]], strides: Sequence[int], scale: int = 4
) -> Tensor:
    """First stage: one location for each box, the nearest on the level of the box's size.

    A level of stride s takes boxes whose sides' geometric mean is `scale` * s or more and less than
    twice that; the finest and the coarsest take what is beyond. Distance counts in box widths and
    heights. Where two boxes want the same location, the nearer one gets it, the earlier one on a
    tie, and the other goes without.

    Args:
        boxes: (G, 4) xyxy in pixels, G may be 0; sides may be 0.
        shapes: (height, width) in cells of every level.
        strides: powers of two, ascending, each twice the one before.
    Returns:
        (R,) int64 over the locations of all levels, row by row: index of a box, or `BACKGROUND`.
    """
    counts = boxes.new_tensor([h * w for h, w in shapes], dtype=torch.int64)
    assigned = counts.new_full((int(counts.sum()),), BACKGROUND)
    if len(boxes) == 0:
        return assigned
    boxes = boxes.double()  # so that a side of 64 has a logarithm of 6, not of 5.9999
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=_SMALLEST_SIDE)
    center = 0.5 * (boxes[:, :2] + boxes[:, 2:])
    level = _levels(size, strides, scale)
    limits = counts.new_tensor([(w - 1, h - 1) for h, w in shapes])[level]
    stride = counts.new_tensor(list(strides))[level, None]
    # the nearest location of a grid is the nearest column and the nearest row; the first on a tie
    cell = torch.ceil(center / stride - 0.5).long()
    cell = torch.minimum(cell.clamp(min=0), limits)
    distance = ((cell * stride - center) / size).square().sum(dim=1)
    first = counts.cumsum(0)[level] - counts[level]
    location = first + cell[:, 1] * (limits[:, 0] + 1) + cell[:, 0]
    # by location, then distance, then order of the boxes: the first of each location has it
    order = distance.argsort(stable=True)
    order = order[location[order].argsort(stable=True)]
    sorted_location = location[order]
    wins = torch.ones_like(sorted_location, dtype=torch.bool)
    wins[1:] = sorted_location[1:] != sorted_location[:-1]
    assigned[sorted_location[wins]] = order[wins]
    return assigned


def _levels(size: Tensor, strides: Sequence[int], scale: int) -> Tensor:
    """(G,) index of the level for sides (G, 2)."""
    mean = ((size[:, 0] / scale).log2() + (size[:, 1] / scale).log2()) / 2
    lowest = int(math.log2(strides[0]))
    return (mean.trunc().long() - lowest).clamp(0, len(strides) - 1)


@torch.no_grad()
def assign_by_iou(candidates: Tensor, boxes: Tensor, low: float = 0.4, high: float = 0.5) -> Tensor:
    """Second stage: by the overlap of what the first stage predicts with the boxes.

    A candidate belongs to the box it overlaps most, if by `high` or more; between `low` and `high`
    it is ignored. Beyond that, each box takes the candidates that overlap it most, however little,
    the last box where several take the same; but not at 0, where that would be all of them.

    Args:
        candidates: (R, 4) xyxy.  boxes: (G, 4) xyxy, G may be 0.
    Returns:
        (R,) int64: index of a box, `BACKGROUND` or `IGNORED`.
    Note:
        As in the authors' code. Detectron2's `Matcher` labels the low matches as positive too, but
        leaves them to the box that they overlap most, and takes all at 0.
    """
    if len(boxes) == 0:
        return torch.full((len(candidates),), BACKGROUND, device=candidates.device)
    iou = pairwise_iou(Boxes(boxes), Boxes(candidates))  # (G, R)
    best, assigned = iou.max(dim=0)
    assigned[best < high] = IGNORED
    assigned[best < low] = BACKGROUND
    most = iou.max(dim=1, keepdim=True).values
    number = torch.arange(len(boxes), device=boxes.device)[:, None]
    low_match = torch.where((iou == most) & (most > 0), number, BACKGROUND).max(dim=0).values
    return torch.where(low_match >= 0, low_match, assigned)
