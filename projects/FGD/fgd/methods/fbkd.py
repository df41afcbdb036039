"""Feature-based distillation with attention and non-local blocks (FBKD, ICLR 2021: "Improve Object
Detection with Feature-based Knowledge Distillation").

Published, COCO box AP of the student without and with it: Faster R-CNN R-50 37.4 → 39.3 under
R-101 (39.4), by MMRazor, 1x.

N images, C channels, P = H·W cells; s and t are a level's maps of student and teacher. ‖·‖ is the
norm of all elements of the batch, neither squared nor divided, whose gradient at 0 is 0. On each
level, with trained 1x1 convolutions A and B, a linear layer L and a 3x3 convolution K of one
channel:

    feature     ‖√M · (A s − t)‖,   M = (m(s) + m(t)) / 2 of each cell, without gradient
                m(x) = P · softmax over the cells of mean_c |x| / τ
    channel     ‖L mean_hw s − mean_hw t‖
    spatial     ‖K mean_c s − mean_c t‖
    non_local   ‖B R_s(s) − R_t(t)‖,   R: `NonLocal`, one for each network, both trained

Gradients flow into the student's map and all of these modules. Boxes are not used, so images
without objects count as others do.

We follow MMRazor, which says that its constants are those of the authors' repository; that one was
not read. Also there: a channel mask is computed and not used, so there is none here. Sub-sampling
pools twice, over 2x2 cells and then over the stride that is configured; here POOLS is the product,
which gives the same values. Ours: a map smaller than its pool is pooled to one cell along that
side, where MMRazor stops; and channels may differ, which A, B and L can bridge.

The norms grow with the root of images, cells and channels, so the weights belong to a batch size
and an input size: MMDetection's default, two images a GPU at 1333x800.

Costs: at 256 channels 0.3 million parameters a level with reduction 4, 0.5 with 2. From forward to
backward 7 times the memory of the student's maps is held with reduction 4, 9 times with 2: two
differences, the input of both blocks' norms, the input of B, and of both blocks θ, φ, g and y. The
gradients of the trained modules and of the norms need them. "dot_product" never makes the matrix
of cells by positions; "embedded_gaussian" leaves that to PyTorch's attention.
"""

import math
from typing import Dict, List, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from .batch import Batch, Level
from .method import METHOD_REGISTRY, Method, Picture, Table
from .parts import BatchNorm, check_level_values, of_level, small_dtype

MODES = ("dot_product", "embedded_gaussian")


@torch.no_grad()
def cell_mask(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(N, H, W) M of two maps (N, C, H, W), whose channels may differ; sums to P per image."""

    def mask(features: Tensor) -> Tensor:
        response = features.abs().mean(dim=1).flatten(1) / temperature
        return response.shape[1] * response.softmax(dim=1)

    return ((mask(student) + mask(teacher)) / 2).view(len(student), *student.shape[2:])


def feature_term(adapted: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """‖√M · (A s − t)‖ of maps (N, C, H, W); the weight of a cell is applied to its own norm."""
    cells = torch.linalg.vector_norm(adapted - teacher, dim=1)
    return torch.linalg.vector_norm(mask.sqrt() * cells)


def pool(features: Tensor, size: int) -> Tensor:
    """Maximum over ``size`` x ``size`` cells, cut to the map where that is smaller.

    What is left over at the right and bottom edge is not used. (N, C, H, W) → (N, C, H', W').
    """
    return F.max_pool2d(features, [min(size, side) for side in features.shape[2:]])


class NonLocal(nn.Module):
    """The non-local block: (N, C, H, W) → the same, plus what each cell gathers from all of them.

    θ, φ and g are 1x1 convolutions to D = C // reduction channels, at least 1; φ and g are pooled
    to Q positions. y = R gᵀ, with

        "dot_product"        R = θᵀ φ / Q;  computed as θᵀ (φ gᵀ / Q), without R
        "embedded_gaussian"  R = softmax over positions of θᵀ φ / √D

    and the output is x + norm(W y), norm by batch statistics. The norm starts at 0: at first the
    output is x.
    """

    def __init__(self, channels: int, reduction: int, pool_size: int, mode: str):
        super().__init__()
        self.mode, self.pool_size = mode, pool_size
        hidden = max(channels // reduction, 1)
        self.theta, self.phi, self.g = (
            nn.Conv2d(channels, hidden, kernel_size=1) for _ in range(3)
        )
        for conv in (self.theta, self.phi, self.g):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        self.out = nn.Conv2d(hidden, channels, kernel_size=1, bias=False)
        self.norm = BatchNorm(channels)

    def forward(self, features: Tensor) -> Tensor:
        theta = self.theta(features)
        phi, g = (
            pool(conv(features), self.pool_size).flatten(2) for conv in (self.phi, self.g)
        )  # (N, D, Q)
        if self.mode == "dot_product":
            gathered = g @ phi.mT / g.shape[2] @ theta.flatten(2)  # (N, D, P)
        else:
            given = (x[:, None].mT for x in (theta.flatten(2), phi, g))  # one head each
            gathered = F.scaled_dot_product_attention(*given)[:, 0].mT
        return features + self.norm(self.out(gathered.reshape_as(theta)))


class FBKDLevel(nn.Module):
    """The four terms of one level, before their weights."""

    def __init__(
        self,
        student: int,
        teacher: int,
        reduction: int = 4,
        pool_size: int = 1,
        mode: str = "dot_product",
        temperature: float = 0.5,
    ):
        super().__init__()
        self.temperature = temperature
        self.adapt = nn.Conv2d(student, teacher, kernel_size=1)
        self.channel = nn.Linear(student, teacher)
        self.spatial = nn.Conv2d(1, 1, kernel_size=3, padding=1)
        self.adapt_non_local = nn.Conv2d(student, teacher, kernel_size=1)
        self.student = NonLocal(student, reduction, pool_size, mode)
        self.teacher = NonLocal(teacher, reduction, pool_size, mode)

    def forward(self, student: Tensor, teacher: Tensor) -> Dict[str, Tensor]:
        """(N, C_s, H, W) and (N, C_t, H, W) of one dtype → term → scalar."""
        norm = torch.linalg.vector_norm
        mask = cell_mask(student, teacher, self.temperature)
        means = [x.mean(dim=(2, 3)) for x in (student, teacher)]  # (N, C)
        responses = [x.mean(dim=1, keepdim=True) for x in (student, teacher)]  # (N, 1, H, W)
        related = self.adapt_non_local(self.student(student))
        return {
            "feature": feature_term(self.adapt(student), teacher, mask),
            "channel": norm(self.channel(means[0]) - means[1]),
            "spatial": norm(self.spatial(responses[0]) - responses[1]),
            "non_local": norm(related - self.teacher(teacher)),
        }


@METHOD_REGISTRY.register()
class FBKD(Method):
    """The module's four terms, of the finest four levels unless told.

    Args:
        reductions, pools: of `NonLocal`, of each level, finest first; the last one counts for all
            coarser levels. mode: of `NonLocal`. temperature: τ > 0.
    """

    terms = ("feature", "channel", "spatial", "non_local")
    boxless = terms

    def __init__(
        self,
        levels: Sequence[Level],
        weights: Mapping[str, float],
        reductions: Sequence[int] = (4, 4, 2, 2),
        pools: Sequence[int] = (16, 8, 4, 4),
        mode: str = "dot_product",
        temperature: float = 0.5,
    ):
        super().__init__(sorted(levels, key=lambda level: level.stride), weights)
        self.temperature = temperature
        self.levels = nn.ModuleDict()
        for i, level in enumerate(self.distilled):
            sizes = of_level(reductions, i), of_level(pools, i)
            channels = level.student_channels, level.teacher_channels
            self.levels[level.name] = FBKDLevel(*channels, *sizes, mode, temperature)

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Weights of the norms, no unit: MMRazor's, for two images a GPU at 1333x800.
        node.FEATURE_WEIGHT = 7e-5
        node.CHANNEL_WEIGHT = 4e-3
        node.SPATIAL_WEIGHT = 4e-3
        node.NON_LOCAL_WEIGHT = 7e-5
        # τ of the softmax over cells.
        node.TEMPERATURE = 0.5
        # How a cell weighs the others: "dot_product" or "embedded_gaussian".
        node.MODE = "dot_product"
        # Of each level, finest first; the last one counts for all coarser levels. Channels are
        # divided by REDUCTIONS inside the non-local block, which looks at the maxima over squares
        # of POOLS cells, 1 = all cells. MMRazor writes 8, 4, 2, 2 and pools 2x2 before.
        node.REDUCTIONS = [4, 4, 2, 2]
        node.POOLS = [16, 8, 4, 4]

    @classmethod
    def check_config(cls, node: CfgNode, cfg: CfgNode) -> None:
        key = "MODEL.DISTILLER.FBKD"
        if node.MODE not in MODES:
            raise UserError(f"{key}.MODE: {node.MODE!r} is none of {', '.join(MODES)}")
        if not 0 < node.TEMPERATURE < math.inf:
            raise UserError(f"{key}.TEMPERATURE: {node.TEMPERATURE} is not above 0 and finite")
        for name in ("REDUCTIONS", "POOLS"):
            check_level_values(f"{key}.{name}", node[name])

    @classmethod
    def choose_levels(cls, head: Sequence[str], stages: Sequence[str]) -> List[str]:
        return list(head)[:4]

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[Level]) -> "FBKD":
        node = cls.node(cfg)
        options = node.REDUCTIONS, node.POOLS, node.MODE, node.TEMPERATURE
        return cls(levels, cls.weights_of(node), *options)

    def forward(self, batch: Batch) -> Table:
        found: Table = {}
        for name, level in self.levels.items():
            maps = batch.student[name], batch.teacher[name]
            dtype = small_dtype(*maps)
            found[name] = self.weigh(level(*(x.to(dtype) for x in maps)))
        return found

    def pictures(self, batch: Batch, image: int) -> Dict[str, Dict[str, Picture]]:
        """What is drawn by default, and M."""
        found = super().pictures(batch, image)
        for name, own in found.items():
            maps = [x[name][image : image + 1].float() for x in (batch.student, batch.teacher)]
            mask = cell_mask(*maps, self.temperature)
            own["weight of cells"] = Picture(mask[0].cpu().numpy())
        return found
