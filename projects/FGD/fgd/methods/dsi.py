"""DSI: the student's deepest map points, cell by cell, where the teacher's does.

The deep semantic injector of RT-DETRv4 (arXiv 2510.25257), whose teacher is DINOv3, a vision
transformer that is no detector. It knows neither boxes nor classes, so any teacher with a map
will do (MODEL.DISTILLER.TEACHER.TIMM), and images without objects teach as well as others.

Published, COCO box AP without and with it, for that paper's own students: S 49.0 → 49.8, M 52.7 →
53.7, L 54.7 → 55.4, X 56.5 → 57.0 (the code's page; the paper has 49.7 and 53.5 for S and M).

We follow the authors' code. Ours differs where detectors with a pyramid do: the authors take the
map after the transformer layer of their encoder and before any fusion, here it is the last output
of the bottom-up network; and their images are square, ours are padded, see `DSI`. Images at half
their size, as their teacher sees them, are MODEL.DISTILLER.TEACHER.TIMM_STRIDE 32. Their adaptive
weight is MODEL.DISTILLER.ADAPT, for any method.
"""

from typing import Dict, List, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from .batch import Batch, Level
from .method import METHOD_REGISTRY, Method, Picture, Table
from .parts import small_dtype


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - s·t / (|s| |t|) of each cell, from 0 (the same direction) to 2 (the opposite one).

    The authors divide both maps by their lengths first, which gives the same and keeps two more
    maps for backward.

    Args:
        student: (N, D, H, W), receives gradient. teacher: of the same shape.
    Returns:
        (N, H, W). A cell in which either is exactly 0 has no direction: 1, without gradient.
    """
    dot = (student * teacher).sum(dim=1)
    lengths = student.norm(dim=1) * teacher.norm(dim=1)
    directed = lengths > 0
    cosine = dot / torch.where(directed, lengths, torch.ones_like(lengths))
    return 1 - torch.where(directed, cosine, torch.zeros_like(cosine))


def to_grid(teacher: Tensor, like: Tensor) -> Tensor:
    """The teacher's map on the student's grid, bilinearly, without aligned corners.

    Of a grid twice as fine each cell becomes the mean of 2x2.
    """
    if teacher.shape[-2:] == like.shape[-2:]:
        return teacher
    return F.interpolate(teacher, like.shape[-2:], mode="bilinear", align_corners=False)


@METHOD_REGISTRY.register()
class DSI(Method):
    """L = w · mean over images and cells of (1 - cos(P s, t)), summed over levels.

    s: the student's map (N, C, H, W), t: the teacher's (N, D, h, w), brought to H x W by `to_grid`;
    P: a 1x1 convolution from C to D channels with bias, which the authors have as a linear layer
    of each cell, also where C = D. Gradients flow into s and P, never into t. In float32 or better.

    Every cell counts the same, whether there is an object or not. So do the cells of padding, as
    both networks see the same padding there; the authors' images have none.

    Beside the step: the teacher's forward, most of it, and for backward P s and t, that is 2 D / C
    of the student's map: more than twice that map only where it is narrower than the teacher's, and
    the deepest one is small.
    """

    terms = ("cosine",)
    boxless = terms
    same_grid = False

    def __init__(self, levels: Sequence[Level], weights: Mapping[str, float]):
        super().__init__(levels, weights)
        self.project = nn.ModuleDict(
            {x.name: nn.Conv2d(x.student_channels, x.teacher_channels, 1) for x in levels}
        )

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # The authors' for their students S and M; 15 for L, 20 for X.
        node.COSINE_WEIGHT = 5.0

    @classmethod
    def choose_levels(cls, head: Sequence[str], stages: Sequence[str]) -> List[str]:
        """The deepest stage; of a backbone without stages the coarsest level of the head."""
        return list(stages or head)[-1:]

    def forward(self, batch: Batch) -> Table:
        """Level → "cosine", weighted."""
        return {
            name: self.weigh({"cosine": self.distances(batch, name).mean()})
            for name in self.project
        }

    def distances(self, batch: Batch, level: str) -> Tensor:
        """(N, H, W): 0 where student and teacher agree, up to 2."""
        student, teacher = batch.student[level], batch.teacher[level]
        dtype = small_dtype(student, teacher)
        teacher = to_grid(teacher.detach().to(dtype), student)
        return cosine_distance(self.project[level](student.to(dtype)), teacher)

    @torch.no_grad()
    def pictures(self, batch: Batch, image: int) -> Dict[str, Dict[str, Picture]]:
        """Where maps respond, and how far apart they point, from 0 to 2."""
        found = super().pictures(batch, image)
        for level, own in found.items():
            own["cosine distance"] = Picture(self.distances(batch, level)[image].cpu().numpy())
        return found
