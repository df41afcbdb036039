"""The ops of `deploy.graphs.ops` for TensorRT: standard operators only, every size constant.

NonMaxSuppression and NonZero have results whose size depends on data. Instead, suppression is a
matrix applied a fixed number of times, and RoIAlign pools every box on every level. Two of
PyTorch's own operators are written without those that TensorRT is reported to compute wrongly
(`trt_lint.REPORTED`): sampling without GridSample, integer division without Mod.

Nor may a result depend on how NaN passes through Clip, Min or Cast, or on a Gather outside of its
table, where TensorRT differs from ONNX Runtime (NVIDIA/TensorRT#4773, #4758, #4775, #4774).
"""

import numpy as np
import torch
from onnxscript import ir
from onnxscript import opset18 as op

from deploy.errors import UserError
from deploy.graphs.ops import INVALID, IS_VALID, ints, roi_align_attributes
from deploy.graphs.tensorrt.nms_rounds import ROUND, ROUNDS, ROWS


def _select_nms_static(boxes, scores, groups, iou, num_groups, k):
    """Sort, N x N matrix of who suppresses whom, rounds of "kept unless a kept one suppresses it".

    A row is final once all better rows that overlap it are, so r rounds settle every chain of r
    suppressions; when a round changes nothing, the result is greedy NMS exactly. Of more than
    `ROWS` rows the best are taken: exact as long as `k` of them are kept.
    """
    rows = _static(boxes.shape[1], "the number of boxes that enter NMS")
    best, order = op.TopK(
        # NaN is not greater than anything
        op.Where(op.Greater(scores, _float(IS_VALID)), scores, _float(INVALID)),
        ints(min(rows, ROWS)),
        axis=1,
    )
    columns = op.Unsqueeze(order, ints(2))
    sorted_boxes = op.GatherElements(boxes, op.Tile(columns, ints(1, 1, 4)), axis=1)
    suppresses = _overlapping(sorted_boxes, iou)
    if num_groups > 1:
        group = op.GatherElements(groups, order, axis=1)
        same = op.Equal(op.Unsqueeze(group, ints(2)), op.Unsqueeze(group, ints(1)))
        suppresses = op.And(suppresses, same)
    # row i, column j: j is better than i and overlaps it
    matrix = op.Trilu(op.Cast(suppresses, to=1), op.Constant(value_int=-1), upper=0)
    valid = op.Cast(op.Greater(op.Unsqueeze(best, ints(2)), _float(IS_VALID)), to=1)
    # the same column twice: TensorRT 10.0 and 10.1 are inaccurate where a product with a single
    # column follows another one (NVIDIA/TensorRT#3969)
    valid = op.Concat(valid, valid, axis=2)
    keep, name = valid, scores.name
    keep.name = ROUND.format(name, 0)
    for number in range(1, ROUNDS + 1):  # 1 less the number of kept rows that suppress it
        keep = op.Relu(op.Sub(valid, op.MatMul(matrix, keep)))
        keep.name = ROUND.format(name, number)
    keep = op.Gather(keep, op.Constant(value_int=0), axis=2)
    found = min(k, rows, ROWS)
    kept = op.Where(op.Greater(keep, _float(0.5)), best, _float(INVALID))
    best, position = op.TopK(kept, ints(found), axis=1)
    index = op.GatherElements(order, position, axis=1)
    index = op.Where(op.Greater(best, _float(IS_VALID)), index, ints(-1))
    return op.Pad(index, ints(0, 0, 0, k - found), ints(-1)) if found < k else index


def _overlapping(boxes, iou):
    """(B, N, 4) -> (B, N, N) bool: IoU over the threshold, in torchvision's order of operations."""
    x1, y1, x2, y2 = op.Split(boxes, axis=2, num_outputs=4)

    def across(side):
        return op.Transpose(side, perm=[0, 2, 1])

    def length(low, high):
        shared = op.Sub(op.Min(high, across(high)), op.Max(low, across(low)))
        return op.Max(shared, _float(0.0))

    area = op.Mul(op.Sub(x2, x1), op.Sub(y2, y1))
    shared = op.Mul(length(x1, x2), length(y1, y2))
    union = op.Sub(op.Add(area, across(area)), shared)
    # the largest float32 that is not over the threshold: torchvision compares with a float64
    limit = np.float32(iou)
    limit = np.nextafter(limit, np.float32(0)) if float(limit) > iou else limit
    return op.Greater(op.Div(shared, op.Max(union, _float(1e-30))), _float(float(limit)))


def _pyramid_roi_align_static(features, rois, level, scales, size, ratio, aligned):
    """Every box on every level, then one of them selected.

    On a level that is not a box's own, a box of one cell takes its place, which costs one sample
    per bin, where a large box on a fine level would take hundreds.
    """
    count = _static(level.shape[1], "the number of boxes that are pooled")
    flat = op.Reshape(rois, ints(-1, 4))
    flat_level = op.Reshape(level, ints(-1))
    image = op.Reshape(op.Tile(_image_numbers(level), ints(1, count)), ints(-1))
    result = None
    for i, (feature, scale) in enumerate(zip(features, scales)):
        here = op.Equal(flat_level, op.Constant(value_int=i))
        cell = op.Constant(value_floats=[0.0, 0.0, 1.0 / scale, 1.0 / scale])
        pooled = op.RoiAlign(
            feature,
            op.Where(op.Unsqueeze(here, ints(1)), flat, cell),
            image,
            **roi_align_attributes(scale, size, ratio, aligned),
        )
        own = op.Unsqueeze(here, ints(1, 2, 3))
        result = pooled if result is None else op.Where(own, pooled, result)
    return result


def _image_numbers(rows):
    """(B, ...) -> (B, 1): 0, 1, 2, ... Not by Range, whose size depends on a value."""
    batch = op.Shape(rows, start=0, end=1)
    ones = op.Expand(_float(1.0), op.Concat(batch, batch, axis=0))
    before = op.Trilu(ones, op.Constant(value_int=-1), upper=0)
    return op.Cast(op.ReduceSum(before, ints(1), keepdims=1), to=7)


def _grid_sample_static(x, grid, mode, padding_mode, align_corners):
    """Bilinear sampling with zeros outside: of four rows of a table for each position.

    The table has a row for every cell of the map and of a border of zeros around it. A position
    farther out is moved onto that border, where it reads nothing either.
    """
    if mode or padding_mode or align_corners:
        raise UserError("--target tensorrt: grid_sample with other options than RepPoints has")
    channels, height, width = (_static(size, "the size of a sampled map") for size in x.shape[1:])
    lines, columns = (_static(size, "the number of sampled points") for size in grid.shape[1:3])
    pitch, cells = width + 2, (height + 2) * (width + 2)  # of the map with its border
    bordered = op.Pad(x, ints(0, 0, 1, 1, 0, 0, 1, 1))
    table = op.Reshape(op.Transpose(bordered, perm=[0, 2, 3, 1]), ints(-1, channels))
    before, share = _cells_before(grid, width, height)
    left, above = op.Split(before, axis=3, num_outputs=2)
    first = op.Add(left, op.Mul(above, ints(pitch)))
    # only NaN makes another number: its share is NaN, whatever it reads
    first = op.Clip(first, op.Constant(value_int=0), op.Constant(value_int=cells - pitch - 2))
    first = op.Add(first, op.Unsqueeze(op.Mul(_image_numbers(x), ints(cells)), ints(2, 3)))
    first = op.Reshape(first, ints(-1))
    right, below = op.Split(op.Reshape(share, ints(-1, 2)), axis=1, num_outputs=2)

    def between(offset):
        a, b = (op.Gather(table, op.Add(first, ints(offset + i)), axis=0) for i in (0, 1))
        return op.Add(a, op.Mul(op.Sub(b, a), right))

    upper = between(0)
    sampled = op.Add(upper, op.Mul(op.Sub(between(pitch), upper), below))
    return op.Transpose(op.Reshape(sampled, ints(-1, lines, columns, channels)), perm=[0, 3, 1, 2])


def _cells_before(grid, width, height):
    """Of positions (x, y), of which -1 to 1 is the map: the last column and row before each, where
    those of the border are 0, and the shares of the next ones, 0 to 1."""

    def both(*values):
        return op.Constant(value=ir.tensor(values, dtype=grid.dtype))

    place = op.Mul(op.Sub(op.Mul(op.Add(grid, both(1)), both(width, height)), both(1)), both(0.5))
    place = op.Max(op.Min(place, both(width, height)), both(-1))
    before = op.Min(op.Floor(place), both(width - 1, height - 1))  # so that there is a next one
    return op.Cast(op.Add(before, both(1)), to=7), op.Sub(place, before)


def _floor_divide_static(number, divisor):
    """Of numbers that are not negative, as all that graphs divide are: rows of a ranked list.

    Mod is only needed for the others, and wrong in TensorRT 10.7 (NVIDIA/TensorRT#4702).
    """
    return op.Div(number, divisor)


def _static(size, meaning: str) -> int:
    if not isinstance(size, int):
        raise UserError(f"--target tensorrt: {meaning} is not constant ({size})")
    return size


def _float(value: float):
    return op.Constant(value_float=value)


STATIC_TRANSLATIONS = {
    torch.ops.fgd.select_nms.default: _select_nms_static,
    torch.ops.fgd.pyramid_roi_align.default: _pyramid_roi_align_static,
    torch.ops.aten.grid_sampler.default: _grid_sample_static,
    torch.ops.aten.floor_divide.default: _floor_divide_static,
}
