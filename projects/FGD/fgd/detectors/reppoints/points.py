"""Points of a location -> box, pure functions and the module that owns their one parameter.

Nine points have 18 channels: (y, x) of the first, of the second, ..., in units of cells, relative
to the location. A location is the top left corner of its cell.
"""

import math

import torch
from torch import Tensor, nn

__all__ = ["POINTS", "MomentTransform", "at_least_float32", "moment_boxes", "scale_gradient"]

POINTS = 9
_MOMENT_GRADIENT = 0.01  # of what the gradient to the two moment parameters would be


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32, others as they are: positions need more than 8 or 11 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The same values; the gradient to `x` is `factor` times what it would be."""
    return x.detach() + factor * (x - x.detach()) if x.requires_grad else x


def moment_boxes(points: Tensor, factors: Tensor) -> Tensor:
    """Boxes around the mean of nine points, as large as their deviation says.

    Args:
        points: (..., 18), float32 or float64.
        factors: (2,) half the width and half the height in standard deviations.
    Returns:
        (..., 4) xyxy in the units of the points; mean -+ factors * standard deviation, the
        unbiased one. Nine equal points give an empty box, and a gradient of 0 to its size.
    """
    pairs = points.unflatten(-1, (POINTS, 2))
    mean = pairs.mean(dim=-2, keepdim=True)
    # a norm, whose gradient at 0 is 0; that of a square root would be NaN
    deviation = torch.linalg.vector_norm(pairs - mean, dim=-2) / math.sqrt(POINTS - 1)
    center = mean.squeeze(-2).flip(-1)
    half = deviation.flip(-1) * factors.to(points.dtype)
    return torch.cat((center - half, center + half), dim=-1)


class MomentTransform(nn.Module):
    """`moment_boxes` with its trained parameter, and from cells to pixels.

    `apply_deltas` has the signature that Detectron2's `DenseDetector` calls.
    """

    def __init__(self):
        super().__init__()
        self.moment = nn.Parameter(torch.zeros(2))  # logarithms of the factors

    def forward(self, points: Tensor) -> Tensor:
        """(..., 18) -> (..., 4) xyxy in cells around the location."""
        return moment_boxes(at_least_float32(points), self.factors())

    def factors(self) -> Tensor:
        """(2,) half the width and half the height of a box in standard deviations."""
        return scale_gradient(self.moment, _MOMENT_GRADIENT).exp()

    def apply_deltas(self, points: Tensor, anchors: Tensor) -> Tensor:
        """Boxes in pixels.

        Args:
            points: (..., 18).
            anchors: (..., 4) xyxy, squares of one stride around the locations.
        """
        stride = anchors[..., 2:3] - anchors[..., :1]
        center = 0.5 * (anchors[..., :2] + anchors[..., 2:])
        return torch.cat((center, center), dim=-1) + stride * self(points)
