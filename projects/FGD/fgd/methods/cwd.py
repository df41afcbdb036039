"""Channel-wise Knowledge Distillation (CWD, ICCV 2021, arXiv 2011.13256).

Each channel of a map is a distribution over its cells, a softmax, and the student's follows the
teacher's. What counts is where a channel responds most; adding a constant to a channel changes
nothing. Formula and weights are those of MMRazor, whose configs for detectors take FPN outputs.

Published, COCO box AP: GFL R-50 40.2 → 41.9 on the class logits of its head, which Detectron2 does
not have, at weights that are not told. For the detectors of this project none is published.

Beside the step it costs two softmaxes over each map, and until the backward pass one tensor of the
map's size in float32: the gradient, which is known with the value.
"""

from typing import FrozenSet, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..errors import UserError
from .batch import Batch, Level
from .gradients import with_gradient
from .method import METHOD_REGISTRY, Method, Table
from .parts import align_conv, small_dtype

ON = ("maps", "logits")
# Log of the least probability. Smaller ones become this, 1e-26, which no sum tells from 0. Where
# features are large they would be denormal numbers, with which CPUs are six times as slow.
NEGLIGIBLE = -60.0


def channel_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of the student's channels from the teacher's (the paper's only loss).

    p and q are softmaxes over the H*W cells of teacher and student divided by the temperature:

        L = temperature² / (C N) · sum over images, channels and cells of p (log p - log q)
        dL / d student = temperature / (C N) · (q - p)

    Args:
        student, teacher: (N, C, H, W). Gradient flows into ``student`` alone. Computed in float32,
            or in float64 if one of them is.
        temperature: > 0; its square keeps the size of gradients.
    Returns:
        Scalar >= 0 but for rounding: 0 for equal maps and for maps of one cell. Padded cells are
        cells like others, on both sides.
    Raises:
        ValueError: the maps differ in shape.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student map {tuple(student.shape)} and teacher map {tuple(teacher.shape)} need the "
            "same shape"
        )
    return with_gradient(student, *_divergence(student, teacher, temperature))


@torch.no_grad()
def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tuple[Tensor, Tensor]:
    """Value and gradient."""
    dtype, (n, channels) = small_dtype(student, teacher), student.shape[:2]
    log_q, log_p = (
        (x.to(dtype).flatten(2) / temperature).log_softmax(dim=2) for x in (student, teacher)
    )
    ratio, scale = log_p - log_q, temperature / (n * channels)
    q, p = (x.clamp_min_(NEGLIGIBLE).exp_() for x in (log_q, log_p))
    value = ratio.mul_(p).sum() * (temperature * scale)
    return value, q.sub_(p).mul_(scale).view_as(student)


@METHOD_REGISTRY.register()
class CWD(Method):
    """L = sum over levels of DIVERGENCE_WEIGHT · `channel_divergence`.

    On maps, those of other channels than the teacher's go through a trained 1x1 convolution first.
    Its levels are those of the student's head. For R-CNN that leaves out p6, which MMRazor's
    configs have: it is every second cell of p5, and nothing but the RPN reads it. On class logits
    each class of each anchor is a channel.

    Images without boxes are as others: nothing here is about boxes.

    Args:
        levels: [] on logits. temperature: of both softmaxes, > 0. on: one of `ON`.
    """

    terms = ("divergence",)
    boxless = terms

    def __init__(
        self,
        levels: Sequence[Level],
        weights: dict,
        temperature: float = 1.0,
        on: str = "maps",
    ):
        super().__init__(levels, weights)
        self.temperature, self.on = temperature, on
        convolutions = {x.name: align_conv(x.student_channels, x.teacher_channels) for x in levels}
        self.align = nn.ModuleDict({k: conv for k, conv in convolutions.items() if conv})

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        node.DIVERGENCE_WEIGHT = 10.0  # MMRazor's, of one level; a mean over channels and images
        # Of the softmax over cells. Where features are large, as without norms in the FPN, a
        # softmax at 1 sees little but the largest cell; 2 to 4 see more.
        node.TEMPERATURE = 1.0
        # "maps": of MODEL.DISTILLER.LEVELS. "logits": the class logits of the dense heads, on all
        # their levels.
        node.ON = "maps"

    @classmethod
    def check_config(cls, node: CfgNode, cfg: CfgNode) -> None:
        key = "MODEL.DISTILLER.CWD"
        if node.ON not in ON:
            raise UserError(f"{key}.ON: {node.ON!r} is neither 'maps' nor 'logits'")
        if not 0 < node.TEMPERATURE < float("inf"):
            raise UserError(f"{key}.TEMPERATURE: {node.TEMPERATURE} is not a number above 0")

    @classmethod
    def needs_of(cls, node: CfgNode) -> FrozenSet[str]:
        return frozenset({"teacher", "heads" if node.ON == "logits" else "maps"})

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[Level]) -> "CWD":
        node = cls.node(cfg)
        return cls(levels, cls.weights_of(node), node.TEMPERATURE, node.ON)

    def forward(self, batch: Batch) -> Table:
        """Level → "divergence", weighted.

        Raises:
            ValueError: the grids of a level differ; names the level.
        """
        found: Table = {}
        for name, student, teacher in self._pairs(batch):
            try:
                value = channel_divergence(student, teacher, self.temperature)
            except ValueError as error:
                raise ValueError(f"CWD level {name!r}: {error}") from None
            found[name] = self.weigh({"divergence": value})
        return found

    def _pairs(self, batch: Batch):
        """Level, student's and teacher's tensor, (N, C, H, W) with equal C."""
        if self.on == "logits":
            for name in batch.heads.levels:
                yield name, batch.heads.student[name].logits, batch.heads.teacher[name].logits
            return
        for level in self.distilled:
            student, teacher = batch.student[level.name], batch.teacher[level.name]
            if level.name in self.align:
                align = self.align[level.name]
                student = align(student.to(align.weight.dtype))
            yield level.name, student, teacher
