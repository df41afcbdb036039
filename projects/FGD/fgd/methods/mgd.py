"""Masked generative distillation (MGD, ECCV 2022, arXiv 2205.01529).

Published, COCO box AP of the student without and with it: RetinaNet R-50 37.4 → 41.0, RepPoints
R-50 38.6 → 42.3, Faster R-CNN R-50 38.4 → 42.1; mask AP of Mask R-CNN R-50 35.4 → 38.1.
"""

from typing import Dict, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..errors import UserError
from .batch import Batch, Level
from .method import METHOD_REGISTRY, Method, Picture, Table
from .parts import align_conv, small_dtype


def draw_keep(student: Tensor, masked_ratio: float, generator: torch.Generator) -> Tensor:
    """A mask over the cells of a map: (N, 1, H, W), 0 masked and 1 kept, in float32.

    Each cell of each image is masked with probability ``masked_ratio``, in [0, 1], for all
    channels at once; 0 masks no cell and 1 masks all. What is kept is not scaled up.

    Args:
        student: (N, C, H, W), for its shape and device. generator: on that device; two maps of
            one shape get the same mask from equal generators, whatever their dtype.
    """
    shape = len(student), 1, *student.shape[-2:]
    drawn = torch.rand(shape, generator=generator, device=student.device)  # in [0, 1)
    return (drawn < 1 - masked_ratio).float()


def generation_term(generated: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of what was generated, 1/N * sum over n, c, h, w of (P - T)^2.

    All cells count, masked or not (MGD paper, L_dis). A scalar >= 0 that grows with C*H*W.

    Args:
        generated: P, (N, C, H, W). Receives the gradient. teacher: T, the same shape, without.
    """
    return (generated - teacher).square().sum() / len(teacher)


class MGDLevelLoss(nn.Module):
    """`generation_term` of one level, and the modules that are trained beside the student.

    P = G(keep * f(S)): f is a 1x1 convolution ``align`` to the teacher's C channels where the
    student's differ, else the identity; G, ``generation``, is a 3x3 convolution, ReLU and another
    3x3 convolution, all C → C with bias, PyTorch's default initialisation and zero padding. The
    mask comes after the bias of f, so masked cells are 0 for G. The ReLU works on a result of its
    own: in place on a student's map it would change what the student's heads read.

    Held for the backward pass beside what G's convolutions need: the error, as large as T.
    """

    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__()
        self.align = align_conv(student_channels, teacher_channels)
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=3, padding=1),
        )

    def forward(self, student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
        """
        Args:
            student: (N, C_s, H, W), N >= 1. teacher: (N, C, H, W), used without its gradient.
            keep: (N, 1, H, W), 0 for masked cells and 1 for others, see `draw_keep`.
        Raises:
            ValueError: N is 0, or the maps differ in N, H or W.
        """
        sizes = [(len(x), *x.shape[2:]) for x in (student, teacher)]
        if sizes[0] != sizes[1] or not len(student):
            raise ValueError(
                f"student map {tuple(student.shape)} and teacher map {tuple(teacher.shape)} need "
                "the same number of images, at least one, and the same height and width"
            )
        dtype = small_dtype(student, teacher)
        student = student.to(dtype)
        if self.align is not None:
            student = self.align(student)
        return generation_term(self.generation(student * keep.to(dtype)), teacher.detach())


@METHOD_REGISTRY.register()
class MGD(Method):
    """L = GENERATION_WEIGHT * sum over levels of `generation_term` of `MGDLevelLoss`.

    Asks for no boxes. The mask of a level is drawn from seed, iteration, rank and the level's
    place alone, so a resumed run masks what the uninterrupted one does, and the student's own
    random numbers stay as they are. The authors draw it from the global generator of the process.

    It trains 2 * (9*C*C + C) parameters a level, 1,180,160 for 256 channels. Its two convolutions
    cost as much as two of a dense head's on each level, and their backward pass.

    Args:
        levels: names and channels. weights: of the term, the paper's alpha.
        masked_ratio: probability of a cell to be masked, the paper's lambda, in [0, 1].
    """

    terms = ("generation",)
    boxless = terms

    def __init__(self, levels: Sequence[Level], weights: Mapping[str, float], masked_ratio: float):
        super().__init__(levels, weights)
        self.masked_ratio = masked_ratio
        self.levels = nn.ModuleDict(
            {x.name: MGDLevelLoss(x.student_channels, x.teacher_channels) for x in levels}
        )

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # alpha: the authors' 2e-5 is for dense detectors, 5e-7 for R-CNN. A sum over channels and
        # cells divided by the images per GPU, so it belongs to the input size.
        node.GENERATION_WEIGHT = 2e-5
        # lambda, the share of masked cells: the authors' 0.65 is for dense detectors, 0.45 for
        # R-CNN. 0 masks none.
        node.MASKED_RATIO = 0.65

    @classmethod
    def check_config(cls, node: CfgNode, cfg: CfgNode) -> None:
        if not 0 <= node.MASKED_RATIO <= 1:
            raise UserError(
                f"MODEL.DISTILLER.MGD.MASKED_RATIO: {node.MASKED_RATIO} is not between 0 and 1"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[Level]) -> "MGD":
        node = cls.node(cfg)
        return cls(levels, cls.weights_of(node), node.MASKED_RATIO)

    def keep(self, batch: Batch, level: str) -> Tensor:
        """The mask of this batch, (N, 1, H, W); the same at every call."""
        own = batch.student[level]
        place = list(self.levels).index(level)
        return draw_keep(own, self.masked_ratio, batch.generator(own.device, place))

    def forward(self, batch: Batch) -> Table:
        """
        Raises:
            ValueError: the grids of a level differ; names the level.
        """
        found: Table = {}
        for name, loss in self.levels.items():
            try:
                value = loss(batch.student[name], batch.teacher[name], self.keep(batch, name))
            except ValueError as error:
                raise ValueError(f"MGD level {name!r}: {error}") from None
            found[name] = self.weigh({"generation": value})
        return found

    def pictures(self, batch: Batch, image: int) -> Dict[str, Dict[str, Picture]]:
        """Where both sides respond, and the masked cells as 1."""
        found = super().pictures(batch, image)
        for name, pictures in found.items():
            pictures["masked"] = Picture(1 - self.keep(batch, name)[image, 0].cpu().numpy())
        return found
