"""Layers that average over a whole map, written out: group norms and squeeze-and-excitation.

The exporter makes an InstanceNormalization or one ReduceMean of them. ONNX Runtime sums a whole
map in one go, with several times PyTorch's rounding error, and where an image is flat nothing else
is left of a group. Here sums go row by row, and half precision is left for them.
"""

from typing import Callable, Optional, Tuple

import torch
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

# The layers between the mean and the product, in their order.
_SQUEEZES = {
    EffectiveSEModule: ("fc", "gate"),
    SEModule: ("fc1", "bn", "act", "fc2", "gate"),
    SqueezeExcite: ("conv_reduce", "act1", "conv_expand", "gate"),
}


class Mean(nn.Module):
    """A layer that averages over the cells of (B, C, H, W), each counted as `share` says.

    share: (B, C, H, W) -> (B, 1, H, W), 1 on average; None, or no share, counts all cells alike.
    """

    share: Optional[Callable[[Tensor], Optional[Tensor]]] = None

    def shares(self, x: Tensor) -> Optional[Tensor]:
        return None if self.share is None else self.share(x)


class NamedGroupNorm(Mean):
    """`nn.GroupNorm` with weight and bias as (C, 1, 1).

    In the shape in which they are multiplied and added. The exporter would compute it from (C,) and
    store the result as a nameless constant, which nobody can account for.
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.weight = nn.Parameter(norm.weight.detach()[:, None, None].clone())
        self.bias = nn.Parameter(norm.bias.detach()[:, None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape. The mean goes before anything is scaled."""
        shares = self.shares(x)
        if shares is not None:
            shares = shares[:, None]
        grouped = _wide(x).unflatten(1, (self.num_groups, -1))
        centred = grouped - _mean(grouped, shares, (2, 3))
        normed = centred * torch.rsqrt(_mean(centred * centred, shares, (2, 3)) + self.eps)
        return normed.flatten(1, 2).to(x.dtype) * self.weight + self.bias


class Squeeze(Mean):
    """One of timm's squeeze-and-excitation blocks, of which this takes over the layers."""

    def __init__(self, block: nn.Module):
        super().__init__()
        for name, layer in block.named_children():
            self.add_module(name, layer)
        self.between = [name for name in _SQUEEZES[type(block)] if hasattr(block, name)]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        gate = _mean(_wide(x), self.shares(x), (2,)).to(x.dtype)
        for name in self.between:
            gate = getattr(self, name)(gate)
        return x * gate


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x


def _mean(x: Tensor, shares: Optional[Tensor], dims: Tuple[int, ...]) -> Tensor:
    """Over the last dimension and `dims`, which become 1: of each row, then of these."""
    if shares is not None:
        x = x * shares
    return x.mean(dim=-1, keepdim=True).mean(dim=dims, keepdim=True)


def write_out_means(model: nn.Module) -> None:
    """Replace every `nn.GroupNorm` and squeeze-and-excitation block inside, in place."""
    for part in list(model.modules()):
        for name, child in part.named_children():
            if type(child) is nn.GroupNorm and child.affine:
                setattr(part, name, NamedGroupNorm(child))
            elif type(child) in _SQUEEZES and not getattr(child, "add_maxpool", False):
                setattr(part, name, Squeeze(child))
