"""What several methods use."""

from typing import Optional, Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError


def small_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Dtype of all sums and vectors: float32, or float64 if a map is."""
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def align_conv(student_channels: int, teacher_channels: int) -> Optional[nn.Conv2d]:
    """1x1 convolution from the student's channels to the teacher's; None where they are equal."""
    if student_channels == teacher_channels:
        return None
    return nn.Conv2d(student_channels, teacher_channels, kernel_size=1)


def adapt_conv(student_channels: int, teacher_channels: int) -> nn.Conv2d:
    """3x3 convolution from the student's channels to the teacher's, nearly 0 at first.

    The weights start at 1e-4 times fmod(N(0, 1), 2), as DeFeat's; the bias at torch's default.
    """
    conv = nn.Conv2d(student_channels, teacher_channels, kernel_size=3, padding=1)
    nn.init.normal_(conv.weight)
    with torch.no_grad():
        conv.weight.fmod_(2).mul_(1e-4)
    return conv


# Rows of RoI logits.


def of_level(values: Sequence[int], index: int) -> int:
    """The value of a level, 0 = the finest; the last one counts for all coarser levels."""
    return values[min(index, len(values) - 1)]


def check_level_values(key: str, values: Sequence[int]) -> None:
    """Raise UserError unless a config key lists whole numbers >= 1, at least one."""
    if not values or not all(isinstance(x, int) and x >= 1 for x in values):
        raise UserError(
            f"{key}: {list(values)} is not a list of whole numbers of at least 1, one for each "
            "level, finest first; the last one counts for all coarser levels"
        )


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the statistics of the present batch, also in eval mode.

    Its weight starts at 0, so that the residual branch it ends adds nothing at first. It keeps no
    running statistics and reads this process' images only. A channel of one value (one image, one
    cell) gives the bias, where PyTorch's own raises.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(channels, eps, track_running_stats=False)
        nn.init.zeros_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        fast = torch.backends.cudnn.enabled
        options = None, None, True, 0.0, self.eps, fast
        return torch.batch_norm(features, self.weight, self.bias, *options)


def mean_over(values: Tensor, rows: Tensor) -> Tensor:
    """Mean of values (R,) over the rows that a bool (R,) chooses.

    Of no row it is 0, and so is its gradient. The host waits for no count.
    """
    return (values * rows).sum() / rows.sum().clamp(min=1)


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """(R, K+1) logits → (R,): tau^2 sum_k q_t(k) log(q_t(k) / q_s(k)), q = softmax(logits / tau).

    >= 0; 0 where both say the same. Gradients flow into both.
    """
    own, taught = ((x / temperature).log_softmax(1) for x in (student, teacher))
    return temperature**2 * (taught.exp() * (taught - own)).sum(1)


# Cells of ground-truth boxes. Nothing of this carries a gradient, loops over boxes or makes the
# host wait for a GPU.
