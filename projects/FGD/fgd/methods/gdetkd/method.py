"""G-DetKD: General Distillation Framework for Object Detectors via Contrastive and Semantic-guided
Feature Imitation (ICCV 2021, arXiv 2108.07482), with third-party constants.

Published, COCO box AP: under Faster R-CNN X-101 with InstaBoost, 2x with multi-scale training,
Faster R-CNN R-50 44.0, RetinaNet 43.3, FCOS 43.1; R-18 under R-50 without and with SGFI and CKD:
Faster R-CNN 34.0 → 37.6 (37.9 with all), RetinaNet 32.6 → 36.3, FCOS 30.3 → 35.6, most of it by
SGFI.

The authors published no code. The formulas are the paper's, as two readings of it agree. Its
weights, gamma and queue size were not found; all constants are third-party constants, those of a
re-implementation with training configs (LutingWang/HEAD and LutingWang/todd, "T" below), so call
results "G-DetKD, third-party constants". Where we differ from T, and why:

- T takes the softmax of SGFI over the regions, not the levels, which is a fault; we take the
  levels, as the paper.
- T leaves a region's own positive out of the denominator, since a box overlaps itself; we keep it,
  as InfoNCE does, so the term cannot be below 0.
- f_embed has a ReLU between its two convolutions, as the paper; T has none.
- T counts the present step among the 10 of its memory; we keep 10 before the present one.
- T's FCOS config has SGFI alone. The paper reports both, and so do we by default.
- As T, and unlike the paper as read, the student's vectors alone are projected.

Class-aware localisation, for two-stage pairs of equal heads (not in T, hence off by default; its
weight in the paper was not found): R regions, K classes, p_t the teacher's class probabilities and
reg box deltas, L_reg = mean_i | sum_c p_t^c (reg_t^c - reg_s^c) |, the sum of the absolute values
of the four coordinates; background, which has no deltas, is no class of the sum. Gradients flow
into the student's deltas. L_cls, a cross-entropy with the teacher's classes, is left out: its
exact form was not found. That the student's head starts from the teacher's is
MODEL.DISTILLER.INHERIT.

Regions are the student's own: the proposals that its second stage samples, or of a dense student
those of `fgd.distillation.dense_regions`. Those of a dense student are noise at first; warm up by
MODEL.DISTILLER.SCHEDULE.

Cost: the teacher's forward with its box head on the student's regions; RoIAlign and f_adap on
every level, twice (`SGFI`); a product of all regions with all vectors in memory, twice. The memory
is 10 times the regions of all GPUs, 4 KB each: 40 MB at 1024 regions, 320 MB at 16 images of 512,
on each GPU and in each checkpoint that a run is resumed from. Processes wait for each other to
exchange vectors, once a step.
"""

from typing import FrozenSet, Mapping, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor

from ...errors import UserError
from ..batch import Batch, Level, Regions, RegionSizes
from ..boxes import pyramid
from ..method import METHOD_REGISTRY, Method, Table
from ..parts import small_dtype
from .ckd import Memory, Projections, directions, info_nce, of_all_processes, overlapping
from .sgfi import SGFI


def localisation_term(student: Tensor, teacher: Tensor, logits: Tensor) -> Tensor:
    """L_reg of the module; exactly 0 without a region.

    Args:
        student, teacher: deltas (R, 4K) on one scale. logits: the teacher's (R, K+1).
    """
    weight = logits.softmax(dim=1)[:, :-1, None]
    error = (weight * (teacher - student).unflatten(1, (-1, 4))).sum(dim=1)
    return error.abs().sum() / max(1, len(error))


@METHOD_REGISTRY.register()
class GDetKD(Method):
    """L = w_sgfi L_sgfi + w_ckd L_ckd + w_reg L_reg, see the modules of this folder.

    A term with weight 0 is not computed, and has no modules.

    Args:
        levels: of the student, on which SGFI offers RoI features. weights: of `terms`.
        gamma: the temperature of CKD, > 0. steps: that its memory holds, >= 0.
    """

    terms = ("sgfi", "ckd", "reg")
    needs = frozenset({"teacher", "student_maps", "regions", "region_embeddings", "region_deltas"})

    def __init__(
        self,
        levels: Sequence[Level],
        weights: Mapping[str, float],
        regions: RegionSizes,
        gamma: float,
        steps: int,
    ):
        super().__init__(pyramid(levels), weights)
        self.gamma, self.sgfi, self.projections, self.memory = gamma, None, None, None
        if weights["sgfi"]:
            self.sgfi = SGFI(_channels(levels), regions.channels, regions.cells)
        if weights["ckd"]:
            sizes = regions.student_width, regions.teacher_width, regions.anchors
            self.projections = Projections(*sizes)
            self.memory = Memory(steps, regions.teacher_width)

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        node.SGFI_WEIGHT = 1.0
        node.CKD_WEIGHT = 0.5
        # For two-stage pairs of the same classes with box deltas for each; 1 is the paper's sum as
        # far as it was read.
        node.REG_WEIGHT = 0.0
        node.GAMMA = 0.07  # the temperature of CKD
        node.MEMORY_STEPS = 10  # steps before the present one, whose regions are negatives too

    @classmethod
    def check_config(cls, node: CfgNode, cfg: CfgNode) -> None:
        if not 0 < node.GAMMA < float("inf"):
            raise UserError(f"MODEL.DISTILLER.GDETKD.GAMMA: {node.GAMMA} is not above 0 and finite")
        if node.MEMORY_STEPS < 0:
            raise UserError(
                f"MODEL.DISTILLER.GDETKD.MEMORY_STEPS: {node.MEMORY_STEPS} is below 0; 0 keeps no "
                "memory"
            )

    @classmethod
    def needs_of(cls, node: CfgNode) -> FrozenSet[str]:
        own = {
            "student_maps": node.SGFI_WEIGHT,
            "region_embeddings": node.CKD_WEIGHT,
            "region_deltas": node.REG_WEIGHT,
        }
        return cls.needs - {need for need, weight in own.items() if not weight}

    @classmethod
    def from_pair(
        cls, cfg: CfgNode, levels: Sequence[Level], regions: Optional[RegionSizes]
    ) -> "GDetKD":
        node = cls.node(cfg)
        return cls(levels, cls.weights_of(node), regions, node.GAMMA, node.MEMORY_STEPS)

    def forward(self, batch: Batch) -> Table:
        """The terms whose weight is not 0, under "regions"; changes the memory of CKD."""
        regions, values = batch.regions, {}
        if self.sgfi is not None:
            values["sgfi"] = self._sgfi(batch)
        if self.projections is not None:
            values["ckd"] = self._ckd(regions)
        if self.weights["reg"]:
            own, taught = regions.student.deltas, regions.teacher.deltas
            dtype = small_dtype(own, taught)
            given = (x.to(dtype) for x in (own, taught.detach(), regions.teacher.logits.detach()))
            values["reg"] = localisation_term(*given)
        return {"regions": self.weigh(values)}

    def _sgfi(self, batch: Batch) -> Tensor:
        maps = [batch.student[level.name] for level in self.distilled]
        teacher = batch.regions.teacher.features.detach()
        dtype = small_dtype(maps[0], teacher)
        strides = [level.stride for level in self.distilled]
        maps = [x.to(dtype) for x in maps]
        return self.sgfi(maps, strides, batch.regions.boxes, teacher.to(dtype))

    def _ckd(self, regions: Regions) -> Tensor:
        own, teacher = regions.student.embedding, regions.teacher.embedding.detach()
        dtype = small_dtype(own, teacher)
        anchors = regions.anchors
        if anchors is None:
            anchors = regions.labels.new_zeros(len(own))
        own = directions(self.projections(own.to(dtype), anchors))
        ranks = of_all_processes(directions(teacher.to(dtype)))
        present = comm.get_rank() if len(ranks) > 1 else 0
        others = [x for rank, x in enumerate(ranks) if rank != present] + self.memory.sets()
        ignored = overlapping(regions.boxes)
        value = info_nce(own, ranks[present], ignored, others, self.gamma)
        self.memory.push(torch.cat(ranks))
        return value


def _channels(levels: Sequence[Level]) -> int:
    """The student's, of all levels.

    Raises:
        UserError: they differ, or a level is a stage of the backbone.
    """
    for level in levels:
        if level.stage or level.student_channels != levels[0].student_channels:
            raise UserError(
                f"MODEL.DISTILLER.LEVELS: {level.name!r} is a stage of the backbone, or has other "
                f"channels than {levels[0].name!r}; G-DetKD's one convolution for all levels wants "
                "levels of one pyramid"
            )
    return levels[0].student_channels
