"""The four FGD terms of one level as one differentiable operation, lean in memory and time.

Same values and gradients as `terms.composed_terms`, the definition. Between forward and
backward only the two maps and vectors per cell and per channel are kept (some 2% of a map at
256 channels), and no temporary has the size of a map.
"""

from types import ModuleType
from typing import Dict, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..parts import small_dtype
from . import sweep as torch_sweep
from .sweep import Slopes


def fused_terms(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    background: Tensor,
    context_student: nn.Module,
    context_teacher: nn.Module,
    temperature: float,
    kernels: ModuleType = torch_sweep,
) -> Dict[str, Tensor]:
    """Arguments and result of `terms.composed_terms`.

    The maps may be of any floating dtype; sums are float32 (float64 if a map is), the student's
    gradient has the student's dtype. Differentiable once.

    Args:
        kernels: module with ``forward_sweep`` and ``backward_sweep``, see `sweep`.
    """
    convs = context_student.mask_conv, context_teacher.mask_conv
    foreground_term, background_term, attention, *contexts, mean, squared = _LevelTerms.apply(
        student,
        teacher,
        *(parameter for conv in convs for parameter in (conv.weight, conv.bias)),
        (foreground, background),
        temperature,
        kernels,
    )
    offset = _added(context_student, contexts[0]) - _added(context_teacher, contexts[1])
    # Sum over cells of (D + offset)^2 in its variance form: both parts are positive.
    cells = student.shape[2] * student.shape[3]
    related = squared.sum() + cells * (offset + mean).square().sum()
    return {
        "foreground": foreground_term,
        "background": background_term,
        "attention": attention,
        "relation": related / len(student),
    }


def _added(context: nn.Module, vector: Tensor) -> Tensor:
    """(N, C) → (N, C): what a GlobalContext adds to its features, for a context vector."""
    return context.transform(vector[:, :, None, None])[:, :, 0, 0]


class _Kept(NamedTuple):
    """What waits for the backward beside the two maps: vectors only."""

    mask_student: Tensor  # (C,)
    mask_teacher: Tensor  # (C,)
    foreground: Tensor  # (N, P) cell weight times the teacher's spatial attention
    background: Tensor  # (N, P)
    channel_attention: Tensor  # (N, C) the teacher's
    by_spatial: Tensor  # (N, P) slope of the attention term by |S|, the part per cell
    by_channel: Tensor  # (N, C) and the part per channel
    student_attention: Tensor  # (N, P) softmax of GlobalContext's logits
    teacher_attention: Tensor  # (N, P)
    student_context: Tensor  # (N, C)
    teacher_context: Tensor  # (N, C)
    mean: Tensor  # (N, C) mean over cells of S - T


class _LevelTerms(torch.autograd.Function):
    """Both maps and the mask convolutions' parameters → what the four terms are made of.

    Returns the foreground, background and attention terms; (N, C) context vectors of student and
    teacher; (N, C) mean over cells of D = S - T; (N,) sum of D's squares around that mean.
    """

    @staticmethod
    def forward(
        ctx,
        student,
        teacher,
        student_weight,
        student_bias,
        teacher_weight,
        teacher_bias,
        cell_weights,
        temperature,
        kernels,
    ):
        dtype = small_dtype(student, teacher)
        masks = [weight.flatten().to(dtype) for weight in (student_weight, teacher_weight)]
        cell_weights = [x.flatten(1).to(dtype) for x in cell_weights]
        found = kernels.forward_sweep(student, teacher, *masks, *cell_weights, temperature)
        n, channels, height, width = student.shape
        spatial = _Attention(found.student_cells, found.teacher_cells, channels * temperature)
        channel = _Attention(
            found.student_channels, found.teacher_channels, height * width * temperature
        )
        kept = _Kept(
            *masks,
            *(x * spatial.teacher for x in cell_weights),
            channel.teacher,
            spatial.slope / n,
            channel.slope / n,
            found.student_logits.softmax(dim=1),
            found.teacher_logits.softmax(dim=1),
            found.student_context,
            found.teacher_context,
            found.error / (height * width),
        )
        ctx.save_for_backward(student, teacher, *kept)
        ctx.kernels = kernels
        return (
            (found.foreground * channel.teacher).sum() / n,
            (found.background * channel.teacher).sum() / n,
            (spatial.distance + channel.distance) / n,
            kept.student_context.clone(),
            kept.teacher_context.clone(),
            kept.mean.clone(),
            found.squared.sum(dim=1),
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx, foreground, background, attention, student_context, teacher_context, mean, squared
    ):
        student, teacher, *kept = ctx.saved_tensors
        kept = _Kept(*kept)
        n, cells = kept.foreground.shape
        slopes = Slopes(
            error_cells=(foreground * kept.foreground + background * kept.background) * (2 / n),
            error_channels=kept.channel_attention,
            error_all=2 * squared,
            constant=mean / cells - 2 * squared[:, None] * kept.mean,
            sign_cells=attention * kept.by_spatial,
            sign_channels=attention * kept.by_channel,
            student_attention=kept.student_attention,
            teacher_attention=kept.teacher_attention,
            student_context=student_context,
            teacher_context=teacher_context,
            student_dot=(student_context * kept.student_context).sum(dim=1),
            teacher_dot=(teacher_context * kept.teacher_context).sum(dim=1),
        )
        masks = kept.mask_student, kept.mask_teacher
        of_map, *of_masks = ctx.kernels.backward_sweep(student, teacher, *masks, slopes)
        of_masks = [x[None, :, None, None] for x in of_masks]
        no_slope = torch.zeros_like(of_masks[0][:, 0, 0, 0])  # of a bias: it shifts a softmax
        return of_map, None, of_masks[0], no_slope, of_masks[1], no_slope, None, None, None


class _Attention:
    """One kind of attention of student and teacher, of responses (N, K) summed over ``scale``.

    Attributes:
        teacher: (N, K) attention, mean 1. distance: scalar, sum over all of |student - teacher|.
        slope: (N, K) gradient of the distance by one |S| within the student's response.
    """

    def __init__(self, student_response: Tensor, teacher_response: Tensor, scale: float):
        count = student_response.shape[1]
        student, self.teacher = (
            count * (x / scale).softmax(dim=1) for x in (student_response, teacher_response)
        )
        error = student - self.teacher
        self.distance = error.abs().sum()
        sign = error.sign()
        self.slope = student * (sign - (sign * student).mean(dim=1, keepdim=True)) / scale
