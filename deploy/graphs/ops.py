"""The two data-dependent steps of a detector as custom ops with results of fixed shape.

Eager kernels use torchvision, so a module built on them runs, can be tested and is the oracle of
its own graph. `TRANSLATIONS` goes to `torch.onnx.export(custom_translation_table=...)`.
"""

from typing import Any, Dict, List

import torch
import torchvision
from onnxscript import opset18 as op

INVALID = -1.0e30  # score of a row that is not there; finite, so that no operator meets inf or NaN
IS_VALID = 0.5 * INVALID


@torch.library.custom_op("fgd::select_nms", mutates_args=())
def select_nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    groups: torch.Tensor,
    iou: float,
    num_groups: int,
    k: int,
) -> torch.Tensor:
    """Non-maximum suppression inside each group, then the k best of all groups.

    Args:
        boxes: (B, N, 4) xyxy.  scores: (B, N); `INVALID` and NaN rows are never selected.
        groups: (B, N) int64 in [0, num_groups): the class or the pyramid level.
        iou: a box is dropped when it overlaps a better one of its group by more than this.
    Returns:
        (B, k) int64 rows in descending score order, -1 where there are fewer than k.
    """
    index = torch.full((len(boxes), k), -1, dtype=torch.int64, device=boxes.device)
    for image in range(len(boxes)):
        keep = scores.new_full(scores.shape[1:], INVALID)
        for group in range(num_groups):
            rows = ((groups[image] == group) & (scores[image] > IS_VALID)).nonzero()[:, 0]
            rows = rows[torchvision.ops.nms(boxes[image, rows], scores[image, rows], iou)]
            keep[rows] = scores[image, rows]
        order = keep.argsort(descending=True, stable=True)[:k]
        order = order[keep[order] > IS_VALID]
        index[image, : len(order)] = order
    return index


@select_nms.register_fake
def _(boxes, scores, groups, iou, num_groups, k):
    return boxes.new_empty((boxes.shape[0], k), dtype=torch.int64)


@torch.library.custom_op("fgd::pyramid_roi_align", mutates_args=())
def pyramid_roi_align(
    features: List[torch.Tensor],
    rois: torch.Tensor,
    level: torch.Tensor,
    scales: List[float],
    size: int,
    ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """RoIAlign of every box on its own pyramid level.

    Args:
        features: per level (B, C, Hl, Wl), all with the same C.
        rois: (B, R, 4) xyxy in canvas pixels.  level: (B, R) int64 index into `features`.
        scales: 1 / stride of each level.  size: cells per side of the result.
        ratio: samples per cell side, 0 = as many as the box has cells.
        aligned: True for Detectron2's ROIAlignV2 (half-pixel), False for ROIAlign.
    Returns:
        (B * R, C, size, size), image-major.
    """
    batch, per_image = level.shape
    image = torch.arange(batch, device=rois.device).repeat_interleave(per_image)
    flat = torch.cat([image[:, None].to(rois.dtype), rois.flatten(0, 1)], dim=1)
    out = features[0].new_zeros((batch * per_image, features[0].shape[1], size, size))
    for i, (feature, scale) in enumerate(zip(features, scales)):
        rows = (level.flatten() == i).nonzero()[:, 0]
        boxes = flat[rows].to(feature.dtype)
        out[rows] = torchvision.ops.roi_align(feature, boxes, (size, size), scale, ratio, aligned)
    return out


@pyramid_roi_align.register_fake
def _(features, rois, level, scales, size, ratio, aligned):
    rows = rois.shape[0] * rois.shape[1]
    return features[0].new_empty((rows, features[0].shape[1], size, size))


def ints(*values: int):
    return op.Constant(value_ints=list(values))


def _select_nms_onnx(boxes, scores, groups, iou, num_groups, k):
    """NonMaxSuppression -> scatter the kept scores into a (B, N) map -> TopK.

    However many rows are selected, the shapes stay fixed. One NMS "class" per group (no class
    offsets added to the boxes, whose rounding would move IoU decisions).
    """
    group_ids = op.Constant(value_ints=list(range(num_groups)))
    in_group = op.Equal(op.Unsqueeze(groups, ints(1)), op.Unsqueeze(group_ids, ints(0, 2)))
    invalid = op.Constant(value_float=INVALID)
    selected = op.NonMaxSuppression(
        boxes,
        op.Where(in_group, op.Unsqueeze(scores, ints(1)), invalid),  # (B, num_groups, N)
        ints(k),
        op.Constant(value_floats=[iou]),
        op.Constant(value_floats=[IS_VALID]),
    )
    rows = op.Gather(selected, ints(0, 2), axis=1)  # (image, row) of (image, group, row)
    nothing = op.Expand(invalid, op.Shape(scores))
    keep = op.ScatterND(nothing, rows, op.GatherND(scores, rows))
    # k more empty columns: TopK may ask for more rows than there are
    padded = op.Pad(keep, ints(0, 0, 0, k), invalid)
    best, order = op.TopK(padded, ints(k), axis=1)
    return op.Where(op.Greater(best, op.Constant(value_float=IS_VALID)), order, ints(-1))


def roi_align_attributes(scale: float, size: int, ratio: int, aligned: bool) -> Dict[str, Any]:
    """Of RoiAlign, as torchvision's `roi_align` means them."""
    return {
        "coordinate_transformation_mode": "half_pixel" if aligned else "output_half_pixel",
        "mode": "avg",
        "output_height": size,
        "output_width": size,
        "sampling_ratio": ratio,  # written even when 0: some importers read a missing one as 1
        "spatial_scale": scale,
    }


def _pyramid_roi_align_onnx(features, rois, level, scales, size, ratio, aligned):
    """Per level: rows of that level -> RoiAlign; then one Gather puts them back in order."""
    flat = op.Reshape(rois, ints(-1, 4))
    flat_level = op.Reshape(level, ints(-1))
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    batch = op.Range(zero, op.Squeeze(op.Shape(level, start=0, end=1)), one)
    image = op.Reshape(op.Expand(op.Unsqueeze(batch, ints(1)), op.Shape(level)), ints(-1))
    order, pooled = [], []
    for i, (feature, scale) in enumerate(zip(features, scales)):
        rows = op.Squeeze(op.NonZero(op.Equal(flat_level, op.Constant(value_int=i))), ints(0))
        order.append(rows)
        pooled.append(
            op.RoiAlign(
                feature,
                op.Gather(flat, rows, axis=0),
                op.Gather(image, rows, axis=0),
                **roi_align_attributes(scale, size, ratio, aligned),
            )
        )
    order = op.Concat(*order, axis=0)
    count = op.Range(zero, op.Size(order), one)
    position = op.ScatterElements(order, order, count, axis=0)  # inverse permutation
    return op.Gather(op.Concat(*pooled, axis=0), position, axis=0)


TRANSLATIONS = {
    torch.ops.fgd.select_nms.default: _select_nms_onnx,
    torch.ops.fgd.pyramid_roi_align.default: _pyramid_roi_align_onnx,
}
