"""Linear layers over tokens, in the shape in which a graph multiplies them.

Of more than two dimensions the exporter makes a MatMul by the transposed weight, which it computes
and stores as a nameless constant that nobody can account for.
"""

from torch import Tensor, nn


class TokenLinear(nn.Module):
    """`nn.Linear` whose parameter is (in, out)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.transposed = nn.Parameter(linear.weight.detach().T.contiguous())
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """(out, in), for layers that read it themselves."""
        return self.transposed.T

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        product = x @ self.transposed
        return product if self.bias is None else product + self.bias


def write_out_linears(model: nn.Module) -> None:
    """Replace every `nn.Linear` inside, in place."""
    for part in list(model.modules()):
        for name, child in part.named_children():
            if type(child) is nn.Linear:
                setattr(part, name, TokenLinear(child))
