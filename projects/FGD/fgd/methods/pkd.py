"""Pearson correlation distillation (PKD, NeurIPS 2022, arXiv 2207.02039).

Published, COCO box AP of the student without and with it: RetinaNet R-50 37.4 → 40.8, Faster R-CNN
R-50 38.4 → 40.3, RepPoints R-50 38.6 → 42.3; under teachers of another family RetinaNet R-50 1x
36.5 → 40.3 (FCOS) and 2x 37.4 → 41.5 (Mask R-CNN Swin). The authors' code is MMRazor's.
"""

from typing import List, Mapping, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..errors import UserError
from .batch import Batch, Level
from .method import METHOD_REGISTRY, Method, Table
from .parts import small_dtype

SIDES = ("student", "teacher")
PAIRINGS = ("stride", "index")
_EPSILON = 1e-6  # added to every deviation, as in the authors' code


def pearson_term(student: Tensor, teacher: Tensor, resize: str = "student") -> Tensor:
    """Half the mean squared difference of the maps after each channel is standardised.

    With m = N*H*W values of a channel c, over all images and cells, padded ones included, and std
    the unbiased deviation (divisor m-1),

        term = 1/(2*C*m) * sum over c and the m values of (S^_c - T^_c)^2,
        F^_c = (F_c - mean_c) / (std_c + 1e-6).

    That is (m-1)/m * mean_c(1 - rho_c) up to the 1e-6, rho_c being the Pearson correlation of
    channel c: a scalar in [0, 2] that no positive scale and no offset of a channel changes.

    A channel whose deviation is within rounding of its mean is constant. It has no correlation and
    counts 1/2 (two constant ones 0). A constant teacher channel passes on next to no gradient. A
    constant student channel gets gradient 0; the authors' is -T^_c / (C*m*1e-6) there, about 1e6
    times that of other channels, so that one dead channel would rule the step. One value in all
    (m = 1) is constant too, where the authors' code gives NaN.

    Nothing but the two maps and vectors of C is held for the backward pass.

    Args:
        student: (N, C, H, W), N >= 1. Receives the gradient.
        teacher: (N, C, H', W'), used without its gradient.
        resize: the side that is resized bilinearly (corners not aligned) where H, W differ from
            H', W'. The authors compare heights alone.
    Raises:
        ValueError: N is 0, or the maps differ in N or C.
    """
    if student.shape[:2] != teacher.shape[:2] or not len(student):
        raise ValueError(
            f"student map {tuple(student.shape)} and teacher map {tuple(teacher.shape)} need the "
            "same number of images, at least one, and of channels"
        )
    return _PearsonTerm.apply(student, teacher, resize)


def _prepare(student: Tensor, teacher: Tensor, resize: str) -> Tuple[Tensor, Tensor]:
    """Both maps in the dtype of sums and of one size."""
    dtype = small_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    if student.shape[-2:] == teacher.shape[-2:]:
        return student, teacher
    options = {"mode": "bilinear", "align_corners": False}
    if resize == "student":
        return F.interpolate(student, teacher.shape[-2:], **options), teacher
    return student, F.interpolate(teacher, student.shape[-2:], **options)


def _statistics(features: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Of each channel, (1, C, 1, 1): mean, unbiased deviation, and what to multiply F - mean by.

    The factor is 0 for a constant channel, whose standardised values are 0.
    """
    variance, mean = torch.var_mean(features, dim=(0, 2, 3), correction=0, keepdim=True)
    deviation = (variance * _unbiased(features)).sqrt()
    constant = deviation <= 4 * torch.finfo(mean.dtype).eps * mean.abs()
    return mean, deviation, torch.where(constant, 0, 1 / (deviation + _EPSILON))


def _unbiased(features: Tensor) -> float:
    """m / (m-1); 1 for a single value, which has a variance of 0."""
    count = features.numel() // features.shape[1]
    return count / max(count - 1, 1)


def _scaled(features: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return (features - mean).mul_(scale)


class _PearsonTerm(torch.autograd.Function):
    """`pearson_term`; standardises again in the backward pass instead of keeping maps.

    The gradient of a channel is what the student's does not explain of the teacher's:

        dterm/dS_c = (r_c S^_c - T^_c) / (C*m*(std_c + 1e-6)),

    with r_c = rho_c up to the 1e-6: with a = std/(std + 1e-6) of the student, b the teacher's and
    v the unbiased variance of S^_c - T^_c, which is a^2 + b^2 - 2ab*rho,
    r = b*rho + (1 - a) = (a^2 + b^2 - v) / (2a) + (1 - a).
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, resize: str) -> Tensor:
        own, other = _prepare(student, teacher, resize)
        (mean, std, scale), (mean_t, std_t, scale_t) = _statistics(own), _statistics(other)
        difference = _scaled(own, mean, scale).sub_(_scaled(other, mean_t, scale_t))
        error = difference.square_().mean(dim=(0, 2, 3), keepdim=True)  # its mean is 0

        a, b = std * scale, std_t * scale_t
        r = (a.square() + b.square() - error * _unbiased(own)) / (2 * a) + (1 - a)
        factor = scale / own.numel()
        weights = [torch.where(scale > 0, factor * x, 0) for x in (r * scale, scale_t)]
        ctx.save_for_backward(student, teacher, mean, mean_t, *weights)
        ctx.resize = resize
        return error.mean() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tuple[Tensor, None, None]:
        student, teacher, mean, mean_t, weight, weight_t = ctx.saved_tensors
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            own, other = _prepare(leaf, teacher, ctx.resize)
        found = _scaled(own.detach(), mean, weight).sub_(_scaled(other, mean_t, weight_t))
        return *torch.autograd.grad(own, leaf, found.mul_(gradient)), None, None


@METHOD_REGISTRY.register()
class PKD(Method):
    """L = PEARSON_WEIGHT * sum over levels of `pearson_term`.

    It asks for no boxes and no equal heads, has no parameters, and needs equal numbers of channels:
    as the authors' code it has no convolution that would align them.

    Beside the step it costs a few passes over the maps. The statistics are of the images of one
    GPU, as the authors'. The gradient of resizing is not reproducible bit by bit on a GPU.

    Args:
        levels: names and channels, equal on both sides.
        weights: of the term. resize: see `pearson_term`.
    """

    terms = ("pearson",)
    boxless = terms
    same_grid = False

    def __init__(self, levels: Sequence[Level], weights: Mapping[str, float], resize: str):
        super().__init__(levels, weights)
        self.resize = resize

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # The authors' is 10 for one-stage students, 6 for Faster R-CNN and for RetinaNet under
        # Mask R-CNN.
        node.PEARSON_WEIGHT = 10.0
        # Which levels meet: "stride", those of equal stride; "index", the finest of both sides,
        # then the next, as in the authors' code. They differ where the finest strides do:
        # RetinaNet's p3 learns from Mask R-CNN's p3 or from its p2.
        node.PAIRING = "stride"
        # Which side is resized where maps of a pair differ in size: "student" or "teacher".
        node.RESIZE = "student"

    @classmethod
    def check_config(cls, node: CfgNode, cfg: CfgNode) -> None:
        for key, allowed in (("PAIRING", PAIRINGS), ("RESIZE", SIDES)):
            if node[key] not in allowed:
                raise UserError(
                    f"MODEL.DISTILLER.PKD.{key}: {node[key]!r} is neither {allowed[0]!r} nor "
                    f"{allowed[1]!r}"
                )

    @classmethod
    def pairs_by_index(cls, node: CfgNode) -> bool:
        return node.PAIRING == "index"

    @classmethod
    def choose_levels(cls, head: Sequence[str], stages: Sequence[str]) -> List[str]:
        """The finest four, as the authors: p3-p6 for dense detectors, p2-p5 for R-CNN."""
        return list(head[:4])

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[Level]) -> "PKD":
        """
        Raises:
            UserError: a level has another number of channels in the teacher.
        """
        unequal = [
            f"{x.name} {x.student_channels}, the teacher's {x.teacher_name} {x.teacher_channels}"
            for x in levels
            if x.student_channels != x.teacher_channels
        ]
        if unequal:
            raise UserError(
                "MODEL.DISTILLER.METHOD PKD correlates channel with channel and needs equal "
                f"numbers of them: the student's {'; '.join(unequal)}. Set MODEL.FPN.OUT_CHANNELS "
                "to the teacher's, or choose other MODEL.DISTILLER.LEVELS or another method"
            )
        node = cls.node(cfg)
        return cls(levels, cls.weights_of(node), node.RESIZE)

    def forward(self, batch: Batch) -> Table:
        found: Table = {}
        for level in self.distilled:
            maps = batch.student[level.name], batch.teacher[level.name]
            found[level.name] = self.weigh({"pearson": pearson_term(*maps, self.resize)})
        return found
