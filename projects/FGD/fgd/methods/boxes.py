"""Ground-truth boxes on the levels of a pyramid: whose level, and which cells."""

from typing import List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import UserError
from .batch import Level, Size

# Boxes of this size in pixels, the root of their area, are on the border of the first two levels.
_BORDER = 56.0


def stack_boxes(boxes: Sequence[Tensor]) -> Tuple[Tensor, Tensor]:
    """N tensors (R_i, 4) → (N, R, 4) float64 with R = max R_i, and (N, R) bool, False for no box.

    float64, because cells are whole numbers: division by a stride that is a power of two is exact.
    """
    rows = pad_sequence([b.reshape(-1, 4).double() for b in boxes], batch_first=True)
    counts = torch.tensor([len(b) for b in boxes])  # shapes: known on the host
    valid = torch.arange(rows.shape[1]) < counts[:, None]
    return rows, valid.to(rows.device, non_blocking=True)


def pyramid(levels: Sequence[Level]) -> List[Level]:
    """The levels that are no stages, finest first.

    Raises:
        UserError: one states no stride.
    """
    found = sorted((x for x in levels if not x.stage), key=lambda level: level.stride)
    if found and not found[0].stride:
        raise UserError(
            f"the student's {found[0].name!r} states no stride, so boxes cannot be laid over it; "
            "leave it out with MODEL.DISTILLER.LEVELS"
        )
    return found


def level_of_boxes(boxes: Tensor, count: int) -> Tensor:
    """(N, R, 4) XYXY in pixels → (N, R): the one of ``count`` levels, 0 the finest, of each box.

    floor(log2(sqrt((x2 - x1 + 1) (y2 - y1 + 1)) / 56 + 1e-6)), brought into 0..count-1.
    """
    sides = (boxes[..., 2:] - boxes[..., :2] + 1).clamp(min=0)
    level = (sides.prod(-1).sqrt() / _BORDER + 1e-6).log2().floor()
    return level.nan_to_num(0).clamp(0, count - 1).long()


class Cells(NamedTuple):
    """Rectangles of cells, half open: from ``start`` to before ``end``; empty where a box has none.

    Attributes:
        start, end: (N, R, 2) whole float64, x and y.
        thin: (N, R) bool, boxes without an inner, which have one cell.
    """

    start: Tensor
    end: Tensor
    thin: Tensor

    def along(self, axis: int, size: int) -> Tuple[Tensor, Tensor]:
        """(N, R, size): positions from the start on, and bool, whether they are in the box.

        Args:
            axis: 0 for x, 1 for y. size: of the map.
        """
        position = torch.arange(size, device=self.start.device, dtype=self.start.dtype)
        start, end = (edge[..., axis, None] for edge in (self.start, self.end))
        return position - start, (position >= start) & (position < end)


def cells_of_boxes(boxes: Tensor, valid: Tensor, stride: int, map_size: Size) -> Cells:
    """Boxes over the stride, truncated towards 0 and cut to the map.

    A box whose ends fall into one column or one row has the single cell where it starts (DeFeat:
    a thin tall box marks a cell, no column), on the right and lower border of the map the last
    one, where the authors' code stops with an error. A box has no cell if it is inverted, not
    finite or beyond the map.

    Args:
        boxes: (N, R, 4) XYXY in pixels of the padded batch. valid: (N, R) bool. map_size: (H, W).
    """
    size = torch.tensor(map_size[::-1], dtype=boxes.dtype)
    size = size.to(boxes.device, non_blocking=True)
    start = (boxes[..., :2] / stride).trunc().clamp(min=0)
    end = (boxes[..., 2:] / stride).trunc().minimum(size)
    usable = valid & boxes.isfinite().all(-1) & (boxes[..., 2:] >= boxes[..., :2]).all(-1)
    usable = usable & (start <= end).all(-1)
    thin = usable & (start == end).any(-1)
    start = torch.where(thin[..., None], start.minimum(size - 1), start)
    end = torch.where(thin[..., None], start + 1, end)
    return Cells(start, torch.where(usable[..., None], end, start), thin)


def cells_on_levels(
    boxes: Sequence[Tensor], strides: Sequence[int], sizes: Sequence[Size]
) -> List[Cells]:
    """Of each level of a pyramid the cells of the boxes that belong to it by their size.

    Args:
        boxes: of each image, (R_i, 4) XYXY in pixels of the padded batch. strides: of the levels,
            finest first. sizes: (H, W) of each.
    """
    stacked, valid = stack_boxes(boxes)
    level = level_of_boxes(stacked, len(strides))
    return [
        cells_of_boxes(stacked, valid & (level == i), stride, size)
        for i, (stride, size) in enumerate(zip(strides, sizes, strict=True))
    ]


def object_mask(cells: Cells, map_size: Size, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, H, W): 1 in the cells of any box, else 0."""
    height, width = map_size
    (_, columns), (_, rows) = cells.along(0, width), cells.along(1, height)
    counts = rows.transpose(1, 2).to(dtype) @ columns.to(dtype)
    return (counts > 0).to(dtype)


def half_mean_square(error: Tensor, mask: Tensor, channels: int) -> Tensor:
    """sum M e / max(1, 2 C sum M) over a batch: half the mean squared error under a mask.

    Args:
        error: (N, H, W) squared errors summed over the C ``channels``. mask: (N, H, W) >= 0; an
            all-zero mask gives exactly 0.
    """
    return (error * mask).sum() / (2 * channels * mask.sum()).clamp(min=1)
