"""The parts of R-CNN around its heads: anchors to proposals, and boxes to pooled features."""

from typing import List

import torch
from torch import Tensor
from torch.nn.functional import pad

from deploy.graphs.common import anchors_at, clip, decode, dense, nonempty, take
from deploy.graphs.ops import INVALID, IS_VALID, pyramid_roi_align, select_nms


def propose(
    rpn,
    objectness: List[Tensor],
    deltas: List[Tensor],
    image_sizes: Tensor,
    level_by_level: bool = False,
) -> Tensor:
    """Detectron2's `RPN.predict_proposals` with a fixed number of rows.

    Args:
        rpn: Detectron2's `RPN`.
        objectness: per level (B, A, H, W).  deltas: per level (B, A * 4, H, W).
        level_by_level: one NMS per level instead of one with levels as groups. The same result;
            for `static_ops`, whose cost grows with the square of the boxes in one NMS.
    Returns:
        (B, R, 4) proposals in descending order of objectness, then rows of zeros. R is the config's
        number, or that of all candidates where it is known and smaller.
    """
    parts = [_best_anchors(rpn, i, *x) for i, x in enumerate(zip(objectness, deltas))]
    best, anchors, scores, level = (torch.cat(tensors, dim=1) for tensors in zip(*parts))
    boxes = decode(best, anchors, rpn.box2box_transform)
    valid = torch.isfinite(boxes).all(dim=-1) & torch.isfinite(scores)
    boxes = clip(boxes, image_sizes)
    valid = valid & nonempty(boxes, rpn.min_box_size)
    scores = torch.where(valid, scores, INVALID)
    most, candidates = rpn.post_nms_topk[False], scores.shape[1]
    if isinstance(candidates, int):  # not a symbol: rows of zeros would cost as much as boxes
        most = min(most, candidates)
    if level_by_level:
        sizes = [part[0].shape[1] for part in parts]
        return _nms_per_level(boxes.split(sizes, 1), scores.split(sizes, 1), rpn.nms_thresh, most)
    index = select_nms(boxes, scores, level, rpn.nms_thresh, len(parts), most)
    return torch.where((index >= 0)[..., None], take(boxes, index.clamp(min=0)), 0.0)


def _nms_per_level(boxes, scores, iou: float, most: int) -> Tensor:
    """The `most` best boxes (B, most, 4) that NMS in each level keeps, then zeros.

    Levels go through one NMS as if they were images.

    Args:
        boxes: per level (B, k, 4).  scores: per level (B, k).
    """
    batch, rows = scores[0].shape[0], max(level.shape[1] for level in scores)
    boxes = torch.stack([pad(x, (0, 0, 0, rows - x.shape[1])) for x in boxes], dim=1)
    boxes = boxes.reshape(-1, rows, 4)  # (B * levels, rows, 4)
    scores = [pad(x, (0, rows - x.shape[1]), value=INVALID) for x in scores]
    scores = torch.stack(scores, dim=1).reshape(-1, rows)
    group = torch.zeros_like(scores, dtype=torch.int64)
    index = select_nms(boxes, scores, group, iou, 1, min(most, rows))
    row = index.clamp(min=0)
    scores = torch.where(index >= 0, scores.gather(1, row), INVALID).reshape(batch, -1)
    best, index = scores.topk(min(most, scores.shape[1]), dim=1)
    boxes = take(take(boxes, row).reshape(batch, -1, 4), index)
    return torch.where((best > IS_VALID)[..., None], boxes, 0.0)


def _best_anchors(rpn, i: int, objectness: Tensor, deltas: Tensor):
    """Deltas, anchors (B, k, 4), logits and level number (B, k) of a level's best anchors."""
    width = objectness.shape[-1]
    logits = dense(objectness, 1).flatten(1)
    best, anchor = logits.topk(torch.sym_min(rpn.pre_nms_topk[False], logits.shape[1]))
    generator = rpn.anchor_generator
    anchors = anchors_at(
        anchor, width, list(generator.cell_anchors)[i], generator.strides[i], generator.offset
    )
    return take(dense(deltas, 4), anchor), anchors, best, torch.full_like(anchor, i)


def pool(pooler, features: List[Tensor], rois: Tensor) -> Tensor:
    """(B * R, C, size, size): every box pooled on the level that its size belongs to.

    Level bounds are compared as sizes: the graph's logarithm is not Detectron2's to the last
    bit, and boxes of exactly 112 or 224 pixels occur (a whole image, for one).

    Args:
        pooler: Detectron2's `ROIPooler` of `ROIAlign` levels.
        features: per level of the pooler (B, C, H, W).  rois: (B, R, 4) in pixels.
    """
    align = pooler.level_poolers[0]
    size = rois[..., 2:] - rois[..., :2]
    ratio = (size[..., 0] * size[..., 1]).sqrt() / pooler.canonical_box_size + 1e-8
    level = torch.zeros_like(ratio, dtype=torch.int64)
    for upper in range(pooler.min_level + 1, pooler.max_level + 1):
        level = level + (ratio >= 2.0 ** (upper - pooler.canonical_level)).to(torch.int64)
    scales, cells = [p.spatial_scale for p in pooler.level_poolers], pooler.output_size[0]
    return pyramid_roi_align(
        features, rois, level, scales, cells, align.sampling_ratio, align.aligned
    )
