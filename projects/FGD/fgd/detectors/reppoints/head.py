"""The head that all levels share: classes and two sets of points."""

import math
from typing import List, Tuple

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from ..pyramids import group_norm
from .points import POINTS, at_least_float32, scale_gradient

__all__ = ["DeformConv", "RepPointsHead"]

_POINT_GRADIENT = 0.1  # of what flows back into the first points from where they are sampled
_STD = 0.01  # of all initial weights


class DeformConv(nn.Module):
    """3x3 deformable convolution without bias, computed in float32 also under autocast.

    Args of forward:
        x: (N, C, H, W).
        offsets: (N, 18, H, W) in cells, (y, x) of each tap, from the tap's regular place.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        values, weight = at_least_float32(x), at_least_float32(self.weight)
        return deform_conv2d(values, offsets.to(values.dtype), weight, padding=1).to(x.dtype)


class RepPointsHead(nn.Module):
    """Two towers of convolutions; points, from where they lie better points and the classes.

    Args:
        channels: of every level, kept throughout.
        num_convs: 3x3 convolutions of each tower.
        norm: of the towers, "GN" or "" (convolutions with bias). Not "BN": levels share the towers,
            and their statistics differ.
        prior_prob: score of every class before training.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        num_convs: int = 3,
        norm: str = "GN",
        prior_prob: float = 0.01,
    ):
        super().__init__()
        self.cls_subnet = _tower(channels, num_convs, norm)
        self.points_subnet = _tower(channels, num_convs, norm)
        self.init_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.init_points = nn.Conv2d(channels, 2 * POINTS, 1)
        self.cls_dcn = DeformConv(channels, channels)
        self.cls_score = nn.Conv2d(channels, num_classes, 1)
        self.refine_dcn = DeformConv(channels, channels)
        self.refine_points = nn.Conv2d(channels, 2 * POINTS, 1)
        for part in self.modules():
            if isinstance(part, (nn.Conv2d, DeformConv)):
                nn.init.normal_(part.weight, std=_STD)
                if getattr(part, "bias", None) is not None:
                    nn.init.zeros_(part.bias)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))
        self.register_buffer("regular", _regular_grid(), persistent=False)

    def forward(self, features: List[Tensor]) -> Tuple[List[Tensor], List[Tensor], List[Tensor]]:
        """Per level (N, C, H, W) -> logits (N, classes, H, W), first and refined points
        (N, 18, H, W), in cells from the location (see `points.py`), at least float32."""
        return tuple(map(list, zip(*(self._level(feature) for feature in features))))

    def _level(self, feature: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        points_feature = self.points_subnet(feature)
        first = self.init_points(F.relu(self.init_conv(points_feature)))
        first = at_least_float32(first)
        offsets = scale_gradient(first, _POINT_GRADIENT) - self.regular.to(first.dtype)
        logits = self.cls_score(F.relu(self.cls_dcn(self.cls_subnet(feature), offsets)))
        refined = self.refine_points(F.relu(self.refine_dcn(points_feature, offsets)))
        return logits, first, at_least_float32(refined) + first.detach()


def _tower(channels: int, num_convs: int, norm: str) -> nn.Sequential:
    return nn.Sequential(
        *(
            Conv2d(
                channels,
                channels,
                3,
                padding=1,
                bias=not norm,
                norm=group_norm(channels) if norm else None,
                activation=F.relu,
            )
            for _ in range(num_convs)
        )
    )


def _regular_grid() -> Tensor:
    """(1, 18, 1, 1): where the taps of a plain 3x3 convolution lie."""
    steps = torch.arange(-1.0, 2.0)
    return torch.cartesian_prod(steps, steps).reshape(1, 2 * POINTS, 1, 1)
