"""The three losses of RepPoints: pure functions over assigned locations."""

from typing import Tuple

import torch
from fvcore.nn import sigmoid_focal_loss, smooth_l1_loss
from torch import Tensor

from .assign import IGNORED

__all__ = ["box_loss", "class_loss", "class_targets", "normalizer"]


def normalizer(assigned: Tensor) -> Tensor:
    """Scalar: over images the sum of their positive locations, of which each has at least one.

    Args:
        assigned: (N, R) as of `fgd.detectors.reppoints.assign`.
    """
    return (assigned >= 0).sum(dim=1).clamp(min=1).sum()


def class_targets(assigned: Tensor, classes: Tensor, num_classes: int) -> Tuple[Tensor, Tensor]:
    """Of one image.

    Args:
        assigned: (R,).  classes: (G,) int64 of its boxes, G may be 0.
    Returns:
        (R, num_classes) of 0 and 1 in float32, and (R,) bool: False where ignored.
    """
    target = torch.zeros(len(assigned), num_classes, device=assigned.device)
    rows = (assigned >= 0).nonzero()[:, 0]
    target[rows, classes[assigned[rows]]] = 1.0
    return target, assigned != IGNORED


def class_loss(logits: Tensor, target: Tensor, counted: Tensor, alpha, gamma) -> Tensor:
    """Sigmoid focal loss, summed over counted locations and classes.

    Args:
        logits, target: (..., K).  counted: (...) bool.
    """
    losses = sigmoid_focal_loss(logits, target.to(logits.dtype), alpha, gamma, reduction="none")
    return (losses * counted[..., None]).sum()


def box_loss(boxes: Tensor, targets: Tensor, unit: Tensor, beta: float) -> Tensor:
    """Smooth L1 between boxes in units of their level, summed over everything.

    Args:
        boxes, targets: (P, 4) xyxy in pixels; P = 0 gives 0 with a gradient of 0.
        unit: (P, 1) pixels, the side of a typical box of the level.
        beta: where the loss turns from square to linear.
    """
    return smooth_l1_loss(boxes / unit, targets / unit, beta, reduction="sum")
