"""Group normalisation whose weights stay in the file under their own names."""

import torch
from torch import Tensor, nn


class NamedGroupNorm(nn.Module):
    """`nn.GroupNorm` with weight and bias as (C, 1, 1).

    In the shape in which they are multiplied and added. The exporter would compute it from (C,) and
    store the result as a nameless constant, which nobody can account for.

    Written out, because the exporter makes an InstanceNormalization of it. ONNX Runtime's sums a
    whole group in one go and subtracts the mean after scaling: several times PyTorch's rounding
    error, and where an image is flat it is all that is left, scaled up by as much as 1/sqrt(eps).
    Here the mean goes first, sums go row by row, and half precision is left for both.
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.weight = nn.Parameter(norm.weight.detach()[:, None, None].clone())
        self.bias = nn.Parameter(norm.bias.detach()[:, None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        wide = x.float() if x.dtype == torch.float16 else x
        grouped = wide.unflatten(1, (self.num_groups, -1))
        centred = grouped - _mean(grouped)
        normed = centred * torch.rsqrt(_mean(centred * centred) + self.eps)
        return normed.flatten(1, 2).to(x.dtype) * self.weight + self.bias


def _mean(grouped: Tensor) -> Tensor:
    """(B, G, C / G, H, W) -> (B, G, 1, 1, 1): of each row, then of these."""
    return grouped.mean(dim=4, keepdim=True).mean(dim=(2, 3), keepdim=True)


def name_group_norms(model: nn.Module) -> None:
    """Replace every `nn.GroupNorm` inside, in place."""
    for part in list(model.modules()):
        for name, child in part.named_children():
            if type(child) is nn.GroupNorm and child.affine:
                setattr(part, name, NamedGroupNorm(child))
