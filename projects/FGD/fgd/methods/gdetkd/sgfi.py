"""SGFI, semantic-guided feature imitation: which of the student's levels a region learns on.

R regions of N images, L levels, C channels of the teacher, S x S cells (S = 7 as published). A
two-stage teacher gives each region one RoI feature T (C, S, S), from the level that its own head
assigns. The student offers its RoI features S^l of the same box on every level. With f_adap one
1x1 convolution for all levels and f_embed one small network for both sides,

    K^l = f_embed(f_adap(S^l)),  K_t = f_embed(T)
    a^l = softmax over l of (K^l . K_t / tau)
    L   = mean over R, C and cells of (sum_l a^l f_adap(S^l) - T)^2

Gradients flow into the student's maps, f_adap, f_embed (from both sides) and tau, not into T.
"""

from typing import List, Sequence

import torch
from detectron2.modeling.poolers import convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

from ...errors import UserError

WIDTHS = 128, 64  # of f_embed
BLOCK = 128  # regions that are computed at once


class SGFI(nn.Module):
    """L above; >= 0, and exactly 0 without a region.

    ``log_tau`` is what is trained instead of tau, which so stays above 0; it starts at 0, to which
    weight decay draws it, that is tau at 1.

    What all regions need, L R C S^2 numbers twice over (at R 1024, L 5, C 256 half a GiB), would
    be many times the student's maps. So regions go through in blocks, each of which the backward
    pass computes a second time; from forward to backward the maps alone are held, in float32, and
    at any time one block.

    Args:
        student, teacher: channels. cells: S, >= 7.
    """

    def __init__(self, student: int, teacher: int, cells: int):
        super().__init__()
        if cells < 7:
            raise UserError(
                f"G-DetKD: the teacher pools regions to {cells}x{cells} cells, and two 3x3 "
                "convolutions of stride 2 need 7x7; take a teacher with ROI_BOX_HEAD."
                "POOLER_RESOLUTION of at least 7, or set SGFI_WEIGHT 0"
            )
        self.cells = cells
        self.adapt = nn.Conv2d(student, teacher, kernel_size=1)
        self.embed = nn.Sequential(
            nn.Conv2d(teacher, WIDTHS[0], kernel_size=3, stride=2),
            nn.ReLU(),
            nn.Conv2d(WIDTHS[0], WIDTHS[1], kernel_size=3, stride=2),
            nn.Flatten(),
        )
        self.log_tau = nn.Parameter(torch.zeros(()))

    def forward(
        self, maps: Sequence[Tensor], strides: Sequence[int], boxes: List[Tensor], teacher: Tensor
    ) -> Tensor:
        """
        Args:
            maps: of L levels, (N, C_s, H, W). strides: of each, in pixels.
            boxes: of N images, (R_i, 4) XYXY in pixels. teacher: T, (R, C, S, S).
        """
        rows = convert_boxes_to_pooler_format([Boxes(x) for x in boxes]).to(teacher.dtype)
        total = teacher.new_zeros(())
        for own, taught in zip(rows.split(BLOCK), teacher.split(BLOCK), strict=True):
            given = self._error, own, taught, strides, *maps
            total = total + checkpoint(*given, use_reentrant=False, preserve_rng_state=False)
        return total / max(1, teacher.numel())

    def _error(self, rows: Tensor, teacher: Tensor, strides: Sequence[int], *maps: Tensor):
        """Summed squared error of a block; ``rows``: (R, 5), image and box."""
        offered = on_levels(maps, strides, rows, self.cells)
        levels, regions = offered.shape[:2]
        offered = self.adapt(offered.flatten(0, 1))
        keys = self.embed(offered).unflatten(0, (levels, regions))
        shares = level_shares(keys, self.embed(teacher), self.log_tau.exp())
        mixed = torch.einsum("lr,lrcyx->rcyx", shares, offered.unflatten(0, (levels, regions)))
        return (mixed - teacher).square().sum()


def on_levels(maps: Sequence[Tensor], strides: Sequence[int], rows: Tensor, cells: int) -> Tensor:
    """(L, R, C, S, S): RoIAlign of each region on every level, whatever its size.

    As Detectron2's ROIAlignV2 with sampling ratio 0. What lies outside the map counts as 0.

    Args:
        rows: (R, 5), the number of the image and XYXY in pixels.
    """
    pooled = [
        roi_align(x, rows, cells, 1 / stride, sampling_ratio=0, aligned=True)
        for x, stride in zip(maps, strides, strict=True)
    ]
    return torch.stack(pooled)


def level_shares(student: Tensor, teacher: Tensor, tau: Tensor) -> Tensor:
    """(L, R): a, how much each level counts for a region; sums to 1 over the levels.

    Args:
        student: K, (L, R, D). teacher: K_t, (R, D). tau: > 0.
    """
    return ((student * teacher).sum(dim=-1) / tau).softmax(dim=0)
