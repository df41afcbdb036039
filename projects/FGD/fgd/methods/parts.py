"""What several methods use."""

from typing import Callable, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import UserError


def small_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Dtype of all sums and vectors: float32, or float64 if a map is."""
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def align_conv(student_channels: int, teacher_channels: int) -> Optional[nn.Conv2d]:
    """1x1 convolution from the student's channels to the teacher's; None where they are equal."""
    if student_channels == teacher_channels:
        return None
    return nn.Conv2d(student_channels, teacher_channels, kernel_size=1)


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


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple:
        (gradient,) = ctx.saved_tensors
        return (upstream * gradient).to(ctx.dtype), None, None


def with_gradient(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value``, a scalar function of ``x``, whose gradient in x is known with it.

    Until the backward pass nothing is held but ``gradient``, of x's shape. It stays in its own
    dtype until the upstream gradient has scaled it, for a float16 one would be rounded to 0.
    """
    return _Known.apply(x, value, gradient)


def held(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, a scalar, whose gradient is computed at once; see `with_gradient`.

    x is given to it in float32, or float64 if it is. For functions of many small steps, each of
    which autograd would keep.
    """
    with torch.enable_grad():
        leaf = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
        value = function(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
    return with_gradient(x, value.detach(), gradient)


def mean_over(values: Tensor, rows: Tensor) -> Tensor:
    """Mean of values (R,) over the rows that a bool (R,) chooses.

    Of no row it is 0, and so is its gradient. The host waits for no count.
    """
    return (values * rows).sum() / rows.sum().clamp(min=1)
