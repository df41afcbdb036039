"""Inconsistent Knowledge Distillation: the teacher's maps of adversarial images (ACM MM 2023).

Source: IKD, arXiv 2209.09841, and its authors' code. A teacher is misled by changes of an image
that nobody sees; what it looks at there, its features that are not robust, is knowledge too. So
beside another method, which distils what both see of the image, the student learns the teacher's
maps of the adversarial one. Its other part, augmentation by what an image shows, is the data's:
INPUT.SAMPLE_SPECIFIC.

With S, T: (N, C, H, W) maps of the second images on one level, S after a 1x1 convolution where
channels differ, and alpha = ADVERSARIAL_WEIGHT, a level's term is alpha times

    "mse"  1/N sum (S - T)^2
    "l1"   1/N sum |S - T|
    "cwd"  tau^2/(C N) sum_{n,c} KL(softmax(T_nc / tau) || softmax(S_nc / tau))

where the softmax of "cwd" is over the H W cells of a channel. Gradients flow into the student and
the convolution. Boxes play no part: an image without objects counts like any. Without second
images, which is from INPUT.PLAIN_FROM on, there is no term, and nothing is computed for it.

Published (IKD): up to +1.0 AP over the method it is added to; RepPoints R-50 with MGD 42.3 → 43.0.

What we follow: the authors' code, where each level is summed over all but images. Maps are those
that heads read, after the norms of the pyramid, as in their code, also where the other method
distils those before (MODEL.DISTILLER.FEATURES). Their clean pass comes last, ours first, which only
changes the order in which live batch norms see the images.

Cost: a second forward of both backbones, a second backward of the student's and the memory of its
activations (`fgd.distillation.second_view`); of the term itself one map of the student's size from
forward to backward, with "cwd" two.
"""

from typing import Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from .batch import Batch, Level
from .method import METHOD_REGISTRY, Method, Table
from .parts import align_conv, small_dtype

DISTANCES = ("mse", "l1", "cwd")


def distance_of_maps(
    student: Tensor, teacher: Tensor, distance: str, temperature: float = 1.0
) -> Tensor:
    """The term of one level before its weight, in float32, or float64 if a map is.

    Args:
        student, teacher: (N, C, H, W), N at least 1. distance: of `DISTANCES`.
        temperature: tau of "cwd", > 0.
    Raises:
        ValueError: the maps differ in shape, or there is no image.
    """
    if student.shape != teacher.shape or not len(student):
        raise ValueError(
            f"student map {tuple(student.shape)} and teacher map {tuple(teacher.shape)} need the "
            "same shape and at least one image"
        )
    dtype = small_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    if distance == "mse":  # not F.mse_loss, which keeps both maps for its backward
        return (student - teacher).square().sum() / len(student)
    if distance == "l1":
        return (student - teacher).abs().sum() / len(student)
    channels = student.shape[0] * student.shape[1]
    own, taught = (
        (x.reshape(channels, -1) / temperature).log_softmax(dim=1) for x in (student, teacher)
    )
    divergence = F.kl_div(own, taught, reduction="sum", log_target=True)
    return temperature**2 * divergence / channels


@METHOD_REGISTRY.register()
class IKD(Method):
    """L_adv = alpha sum over levels of a distance of the second images' maps.

    Args:
        levels: names and channels. weight: alpha, >= 0. distance: of `DISTANCES`.
        temperature: of "cwd", > 0.
    """

    terms = ("adversarial",)
    needs = frozenset({"teacher", "maps", "second_view"})

    def __init__(
        self,
        levels: Sequence[Level],
        weight: float,
        distance: str = "mse",
        temperature: float = 1.0,
    ):
        super().__init__(levels, {"adversarial": weight})
        self.distance, self.temperature = distance, temperature
        convolutions = {x.name: align_conv(x.student_channels, x.teacher_channels) for x in levels}
        self.align = nn.ModuleDict(
            {k: conv for k, conv in convolutions.items() if conv is not None}
        )

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # alpha, no unit: a sum over cells and channels divided by the images per GPU, so it belongs
        # to the input size. The authors' for dense detectors; 2.5e-7 for Mask R-CNN.
        node.ADVERSARIAL_WEIGHT = 1e-5
        # "mse", which the paper uses; "l1"; or "cwd", of each channel's softmax over its cells.
        node.DISTANCE = "mse"
        # Of that softmax; the other distances have none.
        node.TEMPERATURE = 1.0

    @classmethod
    def check_config(cls, node: CfgNode, cfg: CfgNode) -> None:
        key = "MODEL.DISTILLER.IKD"
        if node.DISTANCE not in DISTANCES:
            known = ", ".join(DISTANCES)
            raise UserError(f"{key}.DISTANCE: {node.DISTANCE!r} is not one of {known}")
        if not 0 < node.TEMPERATURE < float("inf"):
            raise UserError(f"{key}.TEMPERATURE: {node.TEMPERATURE} is not a finite number above 0")

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[Level]) -> "IKD":
        node = cls.node(cfg)
        return cls(levels, node.ADVERSARIAL_WEIGHT, node.DISTANCE, node.TEMPERATURE)

    def forward(self, batch: Batch) -> Table:
        """Level → the weighted term; {} for a batch without second images.

        Raises:
            ValueError: the maps of a level differ in shape; names the level.
        """
        found: Table = {}
        if batch.second_view is None:
            return found
        for level in self.distilled:
            own, taught = (
                x[level.name] for x in (batch.second_view.student, batch.second_view.teacher)
            )
            if level.name in self.align:
                conv = self.align[level.name]
                own = conv(own.to(torch.promote_types(own.dtype, conv.weight.dtype)))
            try:
                value = distance_of_maps(own, taught, self.distance, self.temperature)
            except ValueError as error:
                raise ValueError(f"IKD level {level.name!r}: {error}") from None
            found[level.name] = self.weigh({"adversarial": value})
        return found
