"""DeFeat: Distilling Object Detectors via Decoupled Features (CVPR 2021, arXiv 2103.14475).

Published, COCO box AP without and with it: Faster R-CNN R-50 37.4 → 40.9, RetinaNet R-50 36.5 →
39.7; the teacher is an R-152-FPN as far as is known. The authors released configs for VOC alone
(weights 3 and 12, of the neck) and named COCO's neck weights, 4 and 16, in a comment; for the 40.9
they add backbone stages and the second stage's classification, whose weights nobody published.

Objects and background are distilled apart, the background more: its mean is over many easy cells.
Where the authors' code and ours differ: their background class is the largest label of the batch,
ours is always K; they stop with an error for a box that starts on the right or lower border, we
take the last cell; boxes on stages are cut to the map; regions are those that the student sampled
(theirs by default are the teacher's, with the labels of the student's).

Cost: a 3x3 convolution a level, forward and backward, and one map of the teacher's size that is
held for the backward pass; of a stage such as res5 that convolution has 38 million parameters. With
a head weight also the teacher's box head on the student's proposals.
"""

from typing import Dict, FrozenSet, Mapping, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from .batch import Batch, Level, Size
from .boxes import (
    cells_of_boxes,
    cells_on_levels,
    half_mean_square,
    object_mask,
    pyramid,
    stack_boxes,
)
from .method import METHOD_REGISTRY, Method, Picture, Table
from .parts import adapt_conv, divergence, mean_over, small_dtype

# Of stages the mask is made at the first stride of the RPN, and resized.
STAGE_MASK_STRIDE = 4


def decoupled_terms(student: Tensor, teacher: Tensor, mask: Tensor) -> Tuple[Tensor, Tensor]:
    """L_obj = sum M (A - T)^2 / max(1, 2 sum M), and L_bg, the same under 1 - M.

    Sums are over images, channels and cells, M broadcast over channels; so each is half the mean
    squared error over its region. A region without cells gives 0.

    Args:
        student: A, (N, C, H, W), adapted to the teacher's channels. Receives gradient.
        teacher: T, the same shape. mask: M, (N, H, W), 1 on objects, else 0.
    """
    error = (student - teacher).square().sum(1)
    channels = student.shape[1]
    return tuple(half_mean_square(error, x, channels) for x in (mask, 1 - mask))


def stage_mask(boxes: Sequence[Tensor], padded: Size, size: Size) -> Tensor:
    """(N, H, W) of a stage: all boxes at stride 4, resized to the nearest cell.

    Args:
        boxes: of each image, (R_i, 4) XYXY in pixels of the padded batch. padded: its size in
            pixels. size: (H, W) of the stage.
    """
    fine = tuple(-(-x // STAGE_MASK_STRIDE) for x in padded)
    mask = object_mask(cells_of_boxes(*stack_boxes(boxes), STAGE_MASK_STRIDE, fine), fine)
    return F.interpolate(mask[:, None], size=size, mode="nearest")[:, 0]


@METHOD_REGISTRY.register()
class DeFeat(Method):
    """Neck: mean over levels of w_obj L_obj + w_bg L_bg with A = conv(S). Stages: the same with
    A = relu(conv(S)) and weights of their own. Head: w_pos KL(objects) + w_neg KL(background).

    KL is the mean of `parts.divergence` over rows of RoI logits. Gradients flow into the student's
    maps and logits and into the convolutions.

    Args:
        levels: of the pyramid and stages; each kind is averaged by itself. weights: of `terms`.
        adapt: False: A = S. temperature: tau of KL, > 0.
    """

    terms = ("object", "background", "stage_object", "stage_background", "positive", "negative")

    def __init__(
        self, levels: Sequence[Level], weights: Mapping[str, float], adapt: bool, temperature: float
    ):
        super().__init__(levels, weights)
        self.temperature = temperature
        self.neck, self.stages = pyramid(levels), [level for level in levels if level.stage]
        adapted = levels if adapt else ()
        self.adapters = nn.ModuleDict(
            {x.name: adapt_conv(x.student_channels, x.teacher_channels) for x in adapted}
        )

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # The authors' for COCO; for VOC they take 3 and 12.
        node.OBJECT_WEIGHT = 4.0
        node.BACKGROUND_WEIGHT = 16.0
        # Where LEVELS names stages of the backbone; unpublished, so the neck's.
        node.STAGE_OBJECT_WEIGHT = 4.0
        node.STAGE_BACKGROUND_WEIGHT = 16.0
        # Of the RoI logits of objects and of background; off, as in the released configs, which
        # hold 2 and 2 without using them.
        node.POSITIVE_WEIGHT = 0.0
        node.NEGATIVE_WEIGHT = 0.0
        node.TEMPERATURE = 1.0  # of these logits
        # A 3x3 convolution brings the student's maps to the teacher's. Without it both need equal
        # channels.
        node.ADAPT = True

    @classmethod
    def check_config(cls, node: CfgNode, cfg: CfgNode) -> None:
        if not 0 < node.TEMPERATURE < float("inf"):
            raise UserError(
                f"MODEL.DISTILLER.DEFEAT.TEMPERATURE: {node.TEMPERATURE} is not above 0 and finite"
            )

    @classmethod
    def needs_of(cls, node: CfgNode) -> FrozenSet[str]:
        head = node.POSITIVE_WEIGHT or node.NEGATIVE_WEIGHT
        return cls.needs | {"region_logits"} if head else cls.needs

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[Level]) -> "DeFeat":
        node = cls.node(cfg)
        for level in levels:
            channels = level.student_channels, level.teacher_channels
            if not node.ADAPT and channels[0] != channels[1]:
                raise UserError(
                    "MODEL.DISTILLER.DEFEAT.ADAPT False needs equal channels: the student's "
                    f"{level.name!r} has {channels[0]}, the teacher's {level.teacher_name!r} "
                    f"{channels[1]}"
                )
        return cls(levels, cls.weights_of(node), node.ADAPT, node.TEMPERATURE)

    def forward(self, batch: Batch) -> Table:
        """Each level its two terms over the number of levels; "regions" those of the head."""
        found: Table = {}
        masks = self.masks(batch)
        for group, prefix in ((self.neck, ""), (self.stages, "stage_")):
            for name in (level.name for level in group):
                values = self._compare(batch, name, masks[name], relu=bool(prefix))
                terms = zip((f"{prefix}object", f"{prefix}background"), values)
                found[name] = self.weigh({term: x / len(group) for term, x in terms})
        if self.weights["positive"] or self.weights["negative"]:
            found["regions"] = self._head(batch)
        return found

    def masks(self, batch: Batch) -> Dict[str, Tensor]:
        """Level → (N, H, W), 1 on objects."""
        size = {k: tuple(x.shape[-2:]) for k, x in batch.student.items()}
        names = [level.name for level in self.neck]
        sizes = [size[k] for k in names]
        cells = cells_on_levels(batch.boxes, [level.stride for level in self.neck], sizes)
        found = {k: object_mask(own, size[k]) for k, own in zip(names, cells, strict=True)}
        for level in self.stages:
            found[level.name] = stage_mask(batch.boxes, batch.padded_size, size[level.name])
        return found

    def _compare(self, batch: Batch, name: str, mask: Tensor, relu: bool) -> Tuple[Tensor, Tensor]:
        own, teacher = batch.student[name], batch.teacher[name].detach()
        dtype = small_dtype(own, teacher)
        own = own.to(dtype)
        if name in self.adapters:
            own = self.adapters[name](own)
            own = own.relu() if relu else own
        return decoupled_terms(own, teacher.to(dtype), mask.to(dtype))

    def _head(self, batch: Batch) -> Dict[str, Tensor]:
        regions = batch.regions
        own, taught = regions.student.logits, regions.teacher.logits.detach()
        dtype = small_dtype(own, taught)
        rows = divergence(own.to(dtype), taught.to(dtype), self.temperature)
        background = regions.labels == regions.num_classes
        return self.weigh(
            {
                "positive": mean_over(rows, regions.positive),
                "negative": mean_over(rows, background),
            }
        )

    @torch.no_grad()
    def pictures(self, batch: Batch, image: int) -> Dict[str, Dict[str, Picture]]:
        """The cells of objects, and where maps respond."""
        masks = self.masks(batch)
        return {
            level: {"objects": Picture(masks[level][image].cpu().numpy()), **own}
            for level, own in super().pictures(batch, image).items()
        }
