"""The pixel relation of DRKD: a graph over the cells of a map, and how far two networks' differ."""

import math

import torch
from torch import Tensor, nn

from ..parts import BatchNorm


def distance(student: Tensor, teacher: Tensor, form: str) -> Tensor:
    """Of all elements: the squared norm of the difference ("paper"), or the norm ("code")."""
    if form == "paper":
        return (student - teacher).square().sum()
    return torch.linalg.vector_norm(student - teacher)  # its gradient at 0 is 0


class GraphReasoning(nn.Module):
    """The GloRe unit: (N, C, H, W) → the same, plus what a graph of M nodes says of each cell.

    With x (C, P) of an image, B = projection(x) (M, P), X = state(x) (2M, P):

        V = X Bᵀ (2M, M);   y = extend(Z B) (C, P);   output x + norm(y)
        form "paper": V / P instead of V, and Z = W (V − V A)
        form "code":  Z = W relu(V + V A + a), V undivided

    A (M, M), W (2M, 2M) and a (M) are trained. The norm starts at 0: at first the output is x.
    X and Z B, of 2M channels, are never made: V = state(x Bᵀ) and y = (extend Z) B are the same.
    """

    def __init__(self, channels: int, nodes: int, form: str, norm: str = "BN"):
        super().__init__()
        self.form = form
        self.projection = nn.Conv2d(channels, nodes, kernel_size=1)
        self.state = nn.Linear(channels, 2 * nodes)
        self.nodes = nn.Linear(nodes, nodes, bias=form == "code")
        self.states = nn.Linear(2 * nodes, 2 * nodes, bias=False)
        self.extend = nn.Linear(2 * nodes, channels, bias=False)
        if norm == "BN":
            self.norm = BatchNorm(channels, eps=1e-4)
        else:
            groups = math.gcd(32, channels) if channels > 32 else 1  # never of a single channel
            self.norm = nn.GroupNorm(groups, channels, eps=1e-4)
            nn.init.zeros_(self.norm.weight)

    def forward(self, features: Tensor) -> Tensor:
        projected = self.projection(features).flatten(2)  # (N, M, P)
        gathered = features.flatten(2) @ projected.mT  # (N, C, M)
        graph = self.state.weight @ gathered
        graph = graph + self.state.bias[:, None] * projected.sum(dim=2)[:, None]  # (N, 2M, M)
        if self.form == "paper":
            graph = graph / projected.shape[2]
            reasoned = graph - self.nodes(graph)
        else:
            reasoned = (graph + self.nodes(graph)).relu()
        reasoned = self.extend.weight @ (self.states.weight @ reasoned)  # (N, C, M)
        return features + self.norm((reasoned @ projected).view_as(features))


class PixelRelation(nn.Module):
    """One level's term, before weight and 1/k."""

    def __init__(self, student: int, teacher: int, nodes: int, form: str, norm: str = "BN"):
        super().__init__()
        self.form = form
        self.student = GraphReasoning(student, nodes, form, norm)
        self.teacher = GraphReasoning(teacher, nodes, form, norm)
        self.adapt = nn.Conv2d(student, teacher, kernel_size=1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(N, C_s, H, W) and (N, C_t, H, W) → scalar; the gradient reaches ``student``."""
        reasoned = self.adapt(self.student(student)), self.teacher(teacher)
        value = distance(*reasoned, self.form)
        return value / len(student) if self.form == "paper" else value
