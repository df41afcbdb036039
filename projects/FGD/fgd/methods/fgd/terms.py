"""The four FGD terms of one feature level, and the module that owns their trainable weights.

Vocabulary: N images, C channels (the teacher's), H×W cells. Every term is a sum over everything
but the images, divided by N: the authors' reduction, and why their weights depend on input size.
Shapes of the arguments are the same throughout: ``student`` and ``teacher`` (N, C, H, W), spatial
attention and masks (N, H, W), channel attention (N, C). Gradients flow into ``student`` and the
GlobalContext modules; whoever calls detaches the teacher.
"""

from typing import Callable, Dict, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from ..parts import align_conv, small_dtype
from .attention import channel_attention, spatial_attention
from .fused import fused_terms

TERMS = ("foreground", "background", "attention", "relation")


class Weights(NamedTuple):
    """Weights of the four terms (the paper's alpha, beta, gamma, lambda); >= 0, no unit."""

    foreground: float
    background: float
    attention: float
    relation: float


def feature_term(
    student: Tensor, teacher: Tensor, spatial: Tensor, channel: Tensor, mask: Tensor
) -> Tensor:
    """Squared feature error under the teacher's attention inside one mask (FGD paper, L_fea).

    ``spatial`` and ``channel`` are the teacher's attention. A mask of zeros gives exactly 0 with
    a zero gradient. The weight of a cell is applied after the sum over channels, which spares a
    (N, C, H, W) weight tensor and equals the authors' product.
    """
    error = ((student - teacher).square() * channel[:, :, None, None]).sum(dim=1)
    return (error * spatial * mask).sum() / len(student)


def attention_term(
    student_maps: Tuple[Tensor, Tensor], teacher_maps: Tuple[Tensor, Tensor]
) -> Tensor:
    """L1 distance of (spatial, channel) attention of student and teacher (FGD paper, L_at).

    Sums over cells and channels without averaging, so at most 2*(H*W + C) per image.
    """
    spatial = (student_maps[0] - teacher_maps[0]).abs().sum()
    channel = (student_maps[1] - teacher_maps[1]).abs().sum()
    return (spatial + channel) / len(student_maps[0])


def relation_term(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error between the outputs of the two GlobalContext modules (FGD paper, L_global)."""
    return (student - teacher).square().sum() / len(student)


class GlobalContext(nn.Module):
    """GCNet context block: (N, C, H, W) → the same, plus a per-image vector of its global context.

    Reduction ratio 2, not GCNet's 16. The last convolution starts at zero, so that at first the
    block is the identity. ``mask_conv``'s bias shifts a softmax: it exists, as the authors' does,
    but its gradient is 0.
    """

    def __init__(self, channels: int):
        super().__init__()
        if channels < 2:
            raise ValueError(f"GlobalContext needs at least 2 channels, got {channels}")
        hidden = channels // 2
        self.mask_conv = nn.Conv2d(channels, 1, kernel_size=1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, kernel_size=1),
            nn.LayerNorm([hidden, 1, 1]),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, kernel_size=1),
        )
        nn.init.kaiming_normal_(self.mask_conv.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.mask_conv.bias)
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, features: Tensor) -> Tensor:
        attention = self.mask_conv(features).flatten(2).softmax(dim=2)  # (N, 1, H*W)
        context = torch.einsum("ncp,nop->nc", features.flatten(2), attention)
        return features + self.transform(context[:, :, None, None])


def composed_terms(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    background: Tensor,
    context_student: GlobalContext,
    context_teacher: GlobalContext,
    temperature: float,
) -> Dict[str, Tensor]:
    """Value of each of `TERMS`, unweighted: the definition, one function per term.

    `fused.fused_terms` computes the same in a fraction of the memory and time.

    Args:
        student, teacher: (N, C, H, W). Computed in float32, or in float64 if one of them is.
        foreground, background: (N, H, W) cell weights of masks. temperature: > 0.
    """
    dtype = small_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    student_maps, teacher_maps = (
        (spatial_attention(f, temperature), channel_attention(f, temperature))
        for f in (student, teacher)
    )
    related = context_student(student), context_teacher(teacher)
    return {
        "foreground": feature_term(student, teacher, *teacher_maps, foreground),
        "background": feature_term(student, teacher, *teacher_maps, background),
        "attention": attention_term(student_maps, teacher_maps),
        "relation": relation_term(*related),
    }


class FGDLevelLoss(nn.Module):
    """The four weighted terms of one feature level; owns what is trained beside the student.

    Needs no config, so that others can check it against the authors' figures: set the parameters
    of ``align`` and the two GlobalContext modules by name and call it.

    Args:
        student_channels, teacher_channels: when they differ, a 1x1 convolution ``align`` brings
            the student's features to the teacher's channels first.
        weights: of the four terms. temperature: of the attention softmax, > 0.
        terms: how the terms are computed: `fused.fused_terms` or `composed_terms`.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        weights: Weights,
        temperature: float = 0.5,
        terms: Callable[..., Dict[str, Tensor]] = fused_terms,
    ):
        super().__init__()
        self.weights, self.temperature, self.terms = weights, temperature, terms
        self.align = align_conv(student_channels, teacher_channels)
        self.context_student = GlobalContext(teacher_channels)
        self.context_teacher = GlobalContext(teacher_channels)

    def forward(
        self, student: Tensor, teacher: Tensor, foreground: Tensor, background: Tensor
    ) -> Dict[str, Tensor]:
        """Weighted scalar of each of `TERMS`.

        Computed in float32 (float64 if the features are) with autocast off: at half precision
        H*W times a softmax and the sums over a large map overflow.

        Args:
            student: (N, C_s, H, W). teacher: (N, C, H, W), used without its gradient.
            foreground, background: (N, H, W) cell weights of masks.
        Raises:
            ValueError: N is 0, or the two maps differ in N, H or W.
        """
        if (
            student.shape[2:] != teacher.shape[2:]
            or len(student) != len(teacher)
            or not len(student)
        ):
            raise ValueError(
                f"student map {tuple(student.shape)} and teacher map {tuple(teacher.shape)} need "
                "the same number of images, at least one, and the same height and width"
            )
        with torch.autocast(student.device.type, enabled=False):
            dtype = torch.promote_types(student.dtype, torch.float32)
            if self.align is not None:
                student = self.align(student.to(dtype))
            values = self.terms(
                student,
                teacher.detach(),
                foreground.to(dtype),
                background.to(dtype),
                self.context_student,
                self.context_teacher,
                self.temperature,
            )
        return {name: weight * values[name] for name, weight in self.weights._asdict().items()}
