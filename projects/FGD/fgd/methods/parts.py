"""What several methods use."""

from typing import Optional

import torch
from torch import Tensor, nn


def small_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Dtype of all sums and vectors: float32, or float64 if a map is."""
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def align_conv(student_channels: int, teacher_channels: int) -> Optional[nn.Conv2d]:
    """1x1 convolution from the student's channels to the teacher's; None where they are equal."""
    if student_channels == teacher_channels:
        return None
    return nn.Conv2d(student_channels, teacher_channels, kernel_size=1)
