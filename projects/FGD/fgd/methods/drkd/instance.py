"""The instance terms of DRKD: RoIAlign features of ground-truth boxes, and how they relate."""

import math
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from .pixel import distance

SIDE = 3  # cells of a region's features, each way
Filter = Tuple[Tensor, Tensor]  # weight (R, 9C) and bias (R) of the layer that makes a mask


def relation_matrix(theta: Tensor, phi: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """(R, R) ψ: softmax over each row of w_ij θ_i·φ_j; rows sum to 1, R may be 0.

    Args:
        theta, phi: (R, D). mask: (R, R) logits; w is the softmax over its rows. None: w = 1.
    """
    logits = theta @ phi.T
    if mask is not None:
        logits = mask.softmax(dim=1) * logits
    return logits.softmax(dim=1)


def region_features(features: Tensor, boxes: Sequence[Tensor], scale: float) -> Tensor:
    """(R, C, 3, 3) of all images' boxes together, each cut from its own image's map.

    RoIAlign without the half-pixel shift, as many samples as a region has cells. A box is at least
    one cell wide and high, an inverted one too; what lies outside the map counts as 0.

    Args:
        features: (N, C, H, W). boxes: of each image (R_n, 4) XYXY in pixels, finite.
        scale: cells per pixel.
    """
    own = [x.to(features.dtype) for x in boxes]
    return roi_align(features, own, SIDE, scale, sampling_ratio=-1, aligned=False)


def random_filter(regions: int, width: int, generator: torch.Generator, dtype) -> Filter:
    """A new linear layer from ``width`` numbers to one for each region, as PyTorch begins one."""
    device = generator.device
    drawn = torch.rand(regions, width + 1, generator=generator, device=device, dtype=dtype)
    drawn = (2 * drawn - 1) / math.sqrt(width)
    return drawn[:, :-1], drawn[:, -1]


class RegionRelation(nn.Module):
    """How one network's regions of an image relate; (R, 9C) flat features of all images → list.

    Each image's element is ψ (R_n, R_n) in form "paper", z (R_n, 9C) in form "code". The filter:
    "trained", our reconstruction, its mask logits being a(r) b(r)ᵀ with a, b linear from 9C to
    ``filter_width``; "random", the released two-stage code's, given at each call; "none", the
    released one-stage code's.

    Args:
        width: of θ, φ and g; 0 = half of 9C, as published.
    """

    def __init__(
        self, channels: int, form: str, filtered: str, width: int = 0, filter_width: int = 64
    ):
        super().__init__()
        size = channels * SIDE**2
        width = width or size // 2
        self.form, self.filtered = form, filtered
        self.theta, self.phi = nn.Linear(size, width), nn.Linear(size, width)
        if form == "code":
            self.g, self.W = nn.Linear(size, width), nn.Linear(width, size)
        if filtered == "trained":
            self.rows, self.columns = (nn.Linear(size, filter_width) for _ in range(2))

    def forward(
        self, regions: Tensor, counts: List[int], filters: Sequence[Filter] = ()
    ) -> List[Tensor]:
        """
        Args:
            counts: regions of each image. filters: of each image, if the filter is "random".
        """
        images = regions.split(counts)
        vectors = zip(self.theta(regions).split(counts), self.phi(regions).split(counts))
        masks = self._masks(images, regions, counts, filters)
        matrices = [relation_matrix(*pair, mask) for pair, mask in zip(vectors, masks, strict=True)]
        if self.form == "paper":
            return matrices
        carried = self.g(regions).split(counts)
        return [r + self.W(m @ g) for r, m, g in zip(images, matrices, carried, strict=True)]

    def _masks(self, images, regions, counts, filters) -> Sequence[Optional[Tensor]]:
        if self.filtered == "none":
            return [None] * len(counts)
        if self.filtered == "random":
            return [F.linear(r, *own) for r, own in zip(images, filters, strict=True)]
        sides = zip(self.rows(regions).split(counts), self.columns(regions).split(counts))
        return [rows @ columns.T for rows, columns in sides]


class InstanceTerms(nn.Module):
    """The two instance terms of one level, before their weights."""

    def __init__(self, student: int, teacher: int, form: str, filtered: str, *widths: int):
        super().__init__()
        self.form = form
        self.student = RegionRelation(student, form, filtered, *widths)
        self.teacher = RegionRelation(teacher, form, filtered, *widths)
        if form == "paper":
            self.adapt_relation = nn.Linear(1, 1)  # of each element: a·ψ + b
            nn.init.ones_(self.adapt_relation.weight)
            nn.init.zeros_(self.adapt_relation.bias)
        else:
            self.adapt_relation = nn.Conv2d(student, teacher, kernel_size=1)
        self.adapt_feature = nn.Conv2d(student, teacher, kernel_size=1)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        counts: List[int],
        filters: Tuple[Sequence[Filter], Sequence[Filter]] = ((), ()),
    ) -> Dict[str, Tensor]:
        """
        Args:
            student, teacher: (R, C, 3, 3) of all images' regions, `region_features`.
            counts: regions of each image. filters: the student's and the teacher's, if random.
        """
        own = self.student(student.flatten(1), counts, filters[0])
        taught = self.teacher(teacher.flatten(1), counts, filters[1])
        adapted = self.adapt_feature(student).split(counts)
        features = [self._distance(*x) for x in zip(adapted, teacher.split(counts), strict=True)]
        relations = [self._distance(*x) for x in zip(map(self._adapt, own), taught, strict=True)]
        if self.form == "paper":
            features = [x / max(count, 1) for x, count in zip(features, counts, strict=True)]
        images = len(counts) if self.form == "paper" else 1
        return {
            "instance_relation": sum(relations) / images,
            "instance_feature": sum(features) / images,
        }

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return distance(student, teacher, self.form)

    def _adapt(self, relation: Tensor) -> Tensor:
        if self.form == "paper":
            return self.adapt_relation(relation[..., None])[..., 0]
        regions = relation.unflatten(1, (-1, SIDE, SIDE))
        return self.adapt_relation(regions).flatten(1)
