"""Terms whose gradient is known with their value, so that nothing else is held for it."""

from typing import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
