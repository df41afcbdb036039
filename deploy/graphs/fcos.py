"""FCOS as a graph."""

from typing import Dict

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch.fcos import FCOSHead
from torch import Tensor

from deploy.graphs.common import dense, require
from deploy.graphs.retinanet import ExportableRetinaNet


class ExportableFCOS(ExportableRetinaNet):
    """Detectron2's own `FCOS`: as RetinaNet, but scored by the root of class score times
    centerness, and with boxes as distances from a cell's centre to the four sides."""

    predictions = ("logits", "deltas", "centerness")

    @staticmethod
    def check_kind(student):
        require(student.head, FCOSHead, "the FCOS head")
        require(student.anchor_generator, DefaultAnchorGenerator, "the FCOS anchor generator")
        require(student.box2box_transform, Box2BoxTransformLinear, "the FCOS box transform")

    def _ranked(self, i: int, raw: Dict[str, Tensor], image_sizes: Tensor) -> Tensor:
        """(B, H * W * classes) scores: centerness is part of them, so logits would not do."""
        logits = self._logits(i, raw, image_sizes)
        centerness = dense(raw[f"centerness.{self.levels[i]}"], 1)
        return torch.sqrt(logits.sigmoid() * centerness.sigmoid()).flatten(1)

    def _scores(self, ranked: Tensor) -> Tensor:
        return ranked

    def _decode(self, deltas: Tensor, anchors: Tensor, image_sizes: Tensor) -> Tensor:
        """Detectron2's `Box2BoxTransformLinear.apply_deltas`."""
        center = 0.5 * (anchors[..., :2] + anchors[..., 2:])
        deltas = deltas.relu()
        if self.student.box2box_transform.normalize_by_size:
            deltas = deltas * (anchors[..., 2:3] - anchors[..., :1])
        return torch.cat((center - deltas[..., :2], center + deltas[..., 2:]), dim=-1)
