"""Group normalisation whose weights stay in the file under their own names."""

from torch import Tensor, nn
from torch.nn import functional as F


class NamedGroupNorm(nn.Module):
    """`nn.GroupNorm` with weight and bias as (C, 1, 1).

    In the shape in which they are multiplied and added. The exporter would compute it from (C,) and
    store the result as a nameless constant, which nobody can account for.

    Each group's mean is subtracted first, summed row by row. ONNX Runtime's InstanceNormalization
    sums in one go and subtracts after scaling; where an image is flat, that rounding error is all
    that is left, and is scaled up by as much as 1/sqrt(eps).
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.weight = nn.Parameter(norm.weight.detach()[:, None, None].clone())
        self.bias = nn.Parameter(norm.bias.detach()[:, None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        grouped = x.unflatten(1, (self.num_groups, -1))
        rows = grouped.mean(dim=4, keepdim=True)
        x = (grouped - rows.mean(dim=(2, 3), keepdim=True)).flatten(1, 2)
        return F.group_norm(x, self.num_groups, eps=self.eps) * self.weight + self.bias


def name_group_norms(model: nn.Module) -> None:
    """Replace every `nn.GroupNorm` inside, in place."""
    for part in list(model.modules()):
        for name, child in part.named_children():
            if type(child) is nn.GroupNorm and child.affine:
                setattr(part, name, NamedGroupNorm(child))
