"""The loss as the authors' code arranges it: the baseline that the benchmark compares with.

One Python loop over boxes paints the masks, the host waiting for each corner; attention, masked
features and context blocks exist as full-size maps; autograd keeps them all until the backward
pass. The same terms and parameter names as `fgd.FGD`, written apart from it, so that a faster
package does not make its own baseline faster.
"""

from typing import Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ..methods.batch import Batch, Level
from ..methods.fgd.terms import GlobalContext, Weights


class PerBoxFGD(nn.Module):
    """Called as `fgd.FGD` is; boxes are placed on the padded grid. Nothing may be empty
    but the boxes of an image."""

    def __init__(self, levels: Sequence[Level], weights: Weights, temperature: float):
        super().__init__()
        self.weights = weights
        self.levels = nn.ModuleDict({x.name: _PerBoxLevel(x, temperature) for x in levels})

    def forward(self, batch: Batch) -> Dict[str, Dict[str, Tensor]]:
        """Level → term → weighted value."""
        found = {}
        for name, level in self.levels.items():
            maps = batch.student[name], batch.teacher[name]
            terms = level(*maps, batch.boxes, batch.padded_size)
            found[name] = {k: weight * terms[k] for k, weight in self.weights._asdict().items()}
        return found


class _PerBoxLevel(nn.Module):
    """The four unweighted terms of one level, in float32 or float64."""

    def __init__(self, level: Level, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.align = None
        if level.student_channels != level.teacher_channels:
            self.align = nn.Conv2d(level.student_channels, level.teacher_channels, kernel_size=1)
        self.context_student = _FullSizeContext(level.teacher_channels)
        self.context_teacher = _FullSizeContext(level.teacher_channels)

    def forward(self, student, teacher, boxes, image_size) -> Dict[str, Tensor]:
        dtype = torch.promote_types(student.dtype, torch.float32)
        student, teacher = student.to(dtype), teacher.detach().to(dtype)
        if self.align is not None:
            student = self.align(student)
        (spatial_s, channel_s), (spatial_t, channel_t) = map(self._attention, (student, teacher))
        masks = paint_masks(boxes, student.shape[-2:], image_size, student)
        features = _feature_terms(student, teacher, spatial_t, channel_t, masks)
        attention = (channel_s - channel_t).abs().sum() + (spatial_s - spatial_t).abs().sum()
        relation = _squared_error(self.context_student(student), self.context_teacher(teacher))
        terms = (*features, attention / len(student), relation)
        return dict(zip(Weights._fields, terms, strict=True))

    def _attention(self, features: Tensor) -> Tuple[Tensor, Tensor]:
        n, channels, height, width = features.shape
        magnitude = features.abs()
        cells = (magnitude.mean(dim=1) / self.temperature).view(n, -1)
        spatial = height * width * cells.softmax(dim=1).view(n, height, width)
        responses = magnitude.mean(dim=3).mean(dim=2) / self.temperature
        return spatial, channels * responses.softmax(dim=1)


def _feature_terms(student, teacher, spatial, channel, masks) -> List[Tensor]:
    """Foreground and background, each from maps of its own: root of every weight times features."""
    attended = [
        x * spatial.sqrt()[:, None] * channel.sqrt()[:, :, None, None] for x in (student, teacher)
    ]
    return [_squared_error(*(x * mask.sqrt()[:, None] for x in attended)) for mask in masks]


def _squared_error(left: Tensor, right: Tensor) -> Tensor:
    # Divided at once: the sum that PyTorch returns keeps a whole map's memory while it lives.
    return mse_loss(left, right, reduction="sum") / len(left)


class _FullSizeContext(GlobalContext):
    """The context block, its output and attention kept as tensors of their own."""

    def forward(self, features: Tensor) -> Tensor:
        n, channels, height, width = features.shape
        cells = features.reshape(n, 1, channels, height * width)
        weights = self.mask_conv(features).view(n, 1, height * width).softmax(dim=2)
        context = torch.matmul(cells, weights[..., None])  # (N, 1, C, 1)
        return features + self.transform(context.view(n, channels, 1, 1))


def paint_masks(
    boxes: Sequence[Tensor], map_size: Tuple[int, int], image_size: Tuple[int, int], like: Tensor
) -> Tuple[Tensor, Tensor]:
    """Foreground and background (N, H, W), in ``like``'s dtype, one box after the other.

    Args:
        boxes: N tensors (R_i, 4), XYXY in pixels, finite and not inverted; R_i may be 0.
    """
    foreground = like.new_zeros(len(boxes), *map_size)
    background = torch.zeros_like(foreground)
    scale_y, scale_x = (cells / pixels for cells, pixels in zip(map_size, image_size))
    scale = torch.tensor([scale_x, scale_y] * 2, dtype=torch.float64, device=like.device)
    for n, image_boxes in enumerate(boxes):
        edges = image_boxes.double() * scale
        left, top = edges[:, 0].floor().int(), edges[:, 1].floor().int()
        right, bottom = edges[:, 2].ceil().int() + 1, edges[:, 3].ceil().int() + 1
        value = (1 / ((bottom - top) * (right - left)).double()).to(foreground.dtype)
        left, top, right, bottom = (edge.clamp(min=0) for edge in (left, top, right, bottom))
        for i in range(len(image_boxes)):
            # Tensors as bounds of a slice: the host waits for each of the eight.
            painted = foreground[n, top[i] : bottom[i], left[i] : right[i]]
            foreground[n, top[i] : bottom[i], left[i] : right[i]] = painted.maximum(value[i])
        background[n] = (foreground[n] == 0).to(foreground.dtype)
        if background[n].sum() > 0:
            background[n] /= background[n].sum()
    return foreground, background
