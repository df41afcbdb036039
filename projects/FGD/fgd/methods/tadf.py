"""TADF, partly reconstructed: Distilling Object Detectors with Task Adaptive Regularization
(arXiv 2006.13108).

Published, COCO box AP without and with it: Faster R-CNN R-50 36.3 → 39.0, under R-101 (38.5). The
authors' code is not public. Known are the principle, to transfer only where the teacher is better,
the Gaussian mask, the comparison that the box term makes, and the decay. Reconstructed here, so
call results TADF-style: the divisor of the feature term, which is DeFeat's; which background the
class term takes; that the class and box terms are means over the rows that they take, of KL and of
smooth L1; and all weights.

The decay of all terms to 0, per epoch in the paper, is MODEL.DISTILLER.SCHEDULE.DECAY "linear".

Cost: a 3x3 convolution a level, forward and backward, and one map of the teacher's size that is
held for the backward pass; the teacher's box head on the student's proposals.
"""

from typing import Dict, FrozenSet, List, Mapping, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures.boxes import Boxes, matched_pairwise_iou
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from .batch import Batch, Level, Regions, Size
from .boxes import Cells, cells_on_levels, half_mean_square, pyramid
from .method import METHOD_REGISTRY, Method, Picture, Table
from .parts import adapt_conv, divergence, mean_over, small_dtype

# Boxes whose masks are multiplied out at once.
_BLOCK = 32


def gaussian_mask(cells: Cells, map_size: Size, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, H, W) in [0, 1]: the largest over the boxes of a bell in each, 0 outside all.

    exp(-((x - w/2) / (w/2))^2 / 2) exp(-((y - h/2) / (h/2))^2 / 2), x = 0..w-1 and y = 0..h-1 the
    cells of a box from its start on; so 1 is met only where w and h are even, and the first cell
    has exp(-1). A box with a single cell for want of an inner has 1 there.
    """
    columns, rows = (_bell(cells, axis, map_size[1 - axis]).to(dtype) for axis in (0, 1))
    best = rows.new_zeros(len(rows), *map_size)
    for i in range(0, rows.shape[1], _BLOCK):
        own, across = rows[:, i : i + _BLOCK, :, None], columns[:, i : i + _BLOCK, None]
        best = torch.maximum(best, (own * across).amax(dim=1))
    return best


def _bell(cells: Cells, axis: int, size: int) -> Tensor:
    """(N, R, size): one factor of each box's mask."""
    offset, inside = cells.along(axis, size)
    half = ((cells.end - cells.start)[..., axis, None] / 2).clamp(min=0.5)
    bell = torch.where(cells.thin[..., None], 1, (-0.5 * ((offset - half) / half).square()).exp())
    return torch.where(inside, bell, 0)


def feature_term(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """L_feat of one level = sum M (A - T)^2 / max(1, 2 sum M), over images, channels and cells.

    Args:
        student: A, (N, C, H, W), adapted to the teacher's channels. Receives gradient.
        teacher: T, the same shape. mask: M, (N, H, W); where it is 0 all over the term is 0.
    """
    return half_mean_square((student - teacher).square().sum(1), mask, student.shape[1])


def class_term(student: Tensor, teacher: Tensor, labels: Tensor, positive: Tensor) -> Tensor:
    """Mean of KL(teacher‖student) over all objects, and background that the student gets worse.

    Worse: -log softmax(s)[K] is above -log softmax(t)[K]. Without a row that is taken exactly 0.

    Args:
        student, teacher: logits s and t (R, K+1), K background; gradient into s.
        labels: (R,). positive: (R,) bool.
    """
    own, taught = (x.detach().log_softmax(1)[:, -1] for x in (student, teacher))
    worse = (labels == student.shape[1] - 1) & (own < taught)
    return mean_over(divergence(student, teacher), positive | worse)


def box_term(student: Tensor, teacher: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the rows chosen of the smooth L1 distance of box deltas, summed over the four.

    Args:
        student, teacher: (R, 4) deltas of each row's class, see `deltas_of_class`.
        chosen: (R,) bool, see `where_teacher_improves`. Without one the term is exactly 0.
    """
    return mean_over(F.smooth_l1_loss(student, teacher, reduction="none").sum(1), chosen)


def deltas_of_class(deltas: Tensor, labels: Tensor) -> Tensor:
    """(R, 4K) → (R, 4): those of each row's label; of background and ignored rows some class's."""
    last = deltas.shape[1] // 4 - 1
    columns = 4 * labels.clamp(0, last)[:, None] + torch.arange(4, device=deltas.device)
    return deltas.gather(1, columns)


@torch.no_grad()
def where_teacher_improves(regions: Regions, deltas: Tensor) -> Tensor:
    """(R,) bool: objects whose IoU with the teacher's refined box is above the proposal's own.

    Args:
        deltas: (R, 4) the teacher's for each row's class.
    """
    proposals = torch.cat(regions.boxes)
    refined = Box2BoxTransform(regions.delta_weights).apply_deltas(deltas, proposals)
    before, after = (
        matched_pairwise_iou(Boxes(x), Boxes(regions.targets)) for x in (proposals, refined)
    )
    return regions.positive & (after > before)


@METHOD_REGISTRY.register()
class TADF(Method):
    """L = w_feat sum over levels of L_feat + w_cls L_cls + w_box L_box; see the functions above.

    Gradients flow into the student's maps, logits and deltas and into the convolutions.

    Args:
        levels: of the pyramid. weights: of `terms`.
    """

    terms = ("feature", "class", "box")
    needs = frozenset({"teacher", "maps", "region_logits", "region_deltas"})

    def __init__(self, levels: Sequence[Level], weights: Mapping[str, float]):
        super().__init__(levels, weights)
        self.neck = pyramid(levels)
        self.adapters = nn.ModuleDict(
            {x.name: adapt_conv(x.student_channels, x.teacher_channels) for x in self.neck}
        )

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Ours, in the scale of its neighbours; none were published.
        node.FEATURE_WEIGHT = 1.0
        node.CLASS_WEIGHT = 1.0
        node.BOX_WEIGHT = 1.0

    @classmethod
    def needs_of(cls, node: CfgNode) -> FrozenSet[str]:
        unused = {"region_logits": node.CLASS_WEIGHT == 0, "region_deltas": node.BOX_WEIGHT == 0}
        return cls.needs - {need for need, off in unused.items() if off}

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[Level]) -> "TADF":
        stages = [level.name for level in levels if level.stage]
        if stages:
            raise UserError(
                f"MODEL.DISTILLER.LEVELS: {stages[0]!r} is a stage of the backbone; TADF compares "
                "levels of the pyramid, each with the boxes of its size"
            )
        return super().from_config(cfg, levels)

    def forward(self, batch: Batch) -> Table:
        """Each level its feature term, "regions" the other two; a weight of 0 leaves those out."""
        found: Table = {}
        for name, mask in self.masks(batch).items():
            own, teacher = batch.student[name], batch.teacher[name].detach()
            dtype = small_dtype(own, teacher)
            own = self.adapters[name](own.to(dtype))
            found[name] = self.weigh({"feature": feature_term(own, teacher.to(dtype), mask)})
        values = {}
        if self.weights["class"]:
            values["class"] = self._class(batch.regions)
        if self.weights["box"]:
            values["box"] = self._box(batch.regions)
        return {**found, "regions": self.weigh(values)} if values else found

    def masks(self, batch: Batch) -> Dict[str, Tensor]:
        """Level → (N, H, W), the bells of the boxes that belong to it."""
        maps = {level.name: batch.student[level.name] for level in self.neck}
        sizes: List[Size] = [tuple(x.shape[-2:]) for x in maps.values()]
        cells = cells_on_levels(batch.boxes, [level.stride for level in self.neck], sizes)
        dtypes = [small_dtype(x, batch.teacher[name]) for name, x in maps.items()]
        return dict(zip(maps, map(gaussian_mask, cells, sizes, dtypes), strict=True))

    def _class(self, regions: Regions) -> Tensor:
        own, taught = _same_dtype(regions.student.logits, regions.teacher.logits)
        return class_term(own, taught, regions.labels, regions.positive)

    def _box(self, regions: Regions) -> Tensor:
        own, taught = (
            deltas_of_class(x, regions.labels)
            for x in _same_dtype(regions.student.deltas, regions.teacher.deltas)
        )
        return box_term(own, taught, where_teacher_improves(regions, taught))

    @torch.no_grad()
    def pictures(self, batch: Batch, image: int) -> Dict[str, Dict[str, Picture]]:
        """The masks, and where maps respond."""
        masks = self.masks(batch)
        return {
            level: {"objects": Picture(masks[level][image].cpu().numpy()), **own}
            for level, own in super().pictures(batch, image).items()
        }


def _same_dtype(student: Tensor, teacher: Tensor) -> Tuple[Tensor, Tensor]:
    dtype = small_dtype(student, teacher)
    return student.to(dtype), teacher.detach().to(dtype)
