"""Ground-truth boxes → foreground and background weights of the cells of one feature map.

Pure functions. Nothing here carries a gradient, loops over boxes or makes the host wait for a GPU.
"""

from typing import Sequence, Tuple

import torch
from torch import Tensor

from ..boxes import stack_boxes

Size = Tuple[int, int]  # height, width

# Boxes per matrix product in `_first_cover`: sums of powers up to 2**47 are exact in float64.
_BLOCK = 48


def cell_weights(
    boxes: Sequence[Tensor], map_size: Size, image_sizes: Sequence[Size], dtype=torch.float32
) -> Tuple[Tensor, Tensor]:
    """Foreground and background weights of one level, each (N, H, W); see the two masks below.

    Args:
        boxes: N tensors (R_i, 4), XYXY in pixels of the network input; R_i may be 0.
        map_size: (H, W) of the level.
        image_sizes: N sizes in pixels that the map is taken to span. The padded batch's size N
            times puts boxes on the cells that really see them (``mask_reference="padded"``);
            each image's size before padding is the authors' scaling (``"image"``), which
            stretches the masks of padded images.
    """
    foreground = foreground_mask(*boxes_in_cells(boxes, map_size, image_sizes), map_size, dtype)
    return foreground, background_mask(foreground)


def boxes_in_cells(
    boxes: Sequence[Tensor], map_size: Size, image_sizes: Sequence[Size]
) -> Tuple[Tensor, Tensor]:
    """Stack the boxes of a batch and scale them from pixels to cells.

    Returns:
        (N, R, 4) float64 XYXY, R = max R_i, and (N, R) bool, False where an image has no box.
        float64, because floor and ceil follow: a stride that is a power of two stays exact.
    """
    rows, valid = stack_boxes(boxes)
    height, width = map_size
    scale = torch.tensor([[width / w, height / h] * 2 for h, w in image_sizes], dtype=torch.float64)
    return rows * scale.to(rows.device, non_blocking=True)[:, None], valid


def foreground_mask(boxes: Tensor, valid: Tensor, map_size: Size, dtype=torch.float32) -> Tensor:
    """Weight of every cell under the boxes: 1 / number of cells of the smallest box that owns it.

    A box owns the cells from the floor of its start to the ceil of its end, inclusive on both
    ends, although a box that ends on the grid covers nothing of the last one: the paper writes
    1/(H_r*W_r), the authors' code does this, and so do we.

    Args:
        boxes: (N, R, 4) XYXY in cells. A zero-size box owns at least one cell; an inverted one or
            one with a NaN or infinite edge owns none. What lies outside the map is cut off but
            counts as area, as in the authors' code.
        valid: (N, R) bool, False for rows that are no box.
        map_size: (H, W).
    Returns:
        (N, H, W) in [0, 1], all zero for an image without boxes (FGD paper, scale mask, and its
        rule that the smaller box wins an overlap).
    """
    start, end = boxes[..., :2].floor(), boxes[..., 2:].ceil()
    usable = valid & boxes.isfinite().all(-1) & (end >= start).all(-1)
    area = (end + 1 - start).prod(-1).where(usable, torch.inf)
    order = area.argsort(dim=1)  # the smallest box first
    area, usable = area.gather(1, order), usable.gather(1, order)

    def owned(axis: int) -> Tensor:  # (N, R, cells of this axis)
        position = torch.arange(map_size[1 - axis], device=boxes.device)
        first, last = (edge[..., axis].gather(1, order)[..., None] for edge in (start, end))
        return (position >= first) & (position <= last) & usable[..., None]

    return _first_cover(owned(axis=1), owned(axis=0), 1 / area).to(dtype)


def _first_cover(rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """At each cell the value of the first box that owns its row and its column, 0 if none does.

    Box i of a block adds 2**(size-1-i) to its cells, all boxes in one matrix product; the largest
    power in a cell's sum then names its first box. So no (N, R, H, W) tensor is made.

    Args:
        rows: (N, R, H) bool. columns: (N, R, W) bool. values: (N, R) float64; R may be 0.
    Returns:
        (N, H, W) float64.
    """
    n, count, height = rows.shape
    best = values.new_zeros(n, height, columns.shape[2])
    for start in reversed(range(0, count, _BLOCK)):  # earlier boxes overwrite later ones
        block = slice(start, min(start + _BLOCK, count))
        size = block.stop - block.start
        powers = torch.arange(size - 1, -1, -1, device=rows.device).double().exp2()
        coded = (rows[:, block] * powers[:, None]).transpose(1, 2) @ columns[:, block].double()
        first = (size - torch.frexp(coded).exponent).clamp(max=size - 1)  # frexp(0) has exponent 0
        value = values[:, block].gather(1, first.flatten(1).long()).view_as(best)
        best = value.where(coded > 0, best)
    return best


def background_mask(foreground: Tensor) -> Tensor:
    """(N, H, W) weights of the cells that no box owns: 1 / their number, so that they sum to 1.

    All zero for an image that boxes cover completely (FGD paper, scale mask outside boxes).
    """
    background = (foreground == 0).to(foreground.dtype)
    return background / background.sum(dim=(1, 2), keepdim=True).clamp(min=1)
