"""RetinaNet as a graph."""

from typing import Dict, List

import torch
from detectron2.layers import CycleBatchNormList
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn

from deploy.graphs.common import (
    TIE,
    ExportableDetector,
    anchors_at,
    decode,
    dense,
    finish,
    name_features,
    require,
    take,
)
from deploy.graphs.ops import INVALID, select_nms


class ExportableRetinaNet(ExportableDetector):
    """Detectron2's `RetinaNet` inference with fixed shapes.

    Per level the best `topk` (anchor, class) pairs by logit, decoded; pairs at or under the score
    threshold become invalid rows; per-class NMS; the best K. The order of the steps is
    Detectron2's: threshold and top-k per level, NMS on unclipped boxes, clip and drop empty last.
    """

    threshold_path = "test_score_thresh"
    predictions = ("logits", "deltas")  # of the head, in its order
    delta_dims = 4  # values of "deltas" per anchor

    def __init__(self, student):
        super().__init__(student)
        student = self.student
        for subnet in (x for x in student.head.children() if isinstance(x, nn.Sequential)):
            for i, layer in enumerate(subnet):
                if isinstance(layer, CycleBatchNormList):
                    subnet[i] = LevelBatchNorm(layer)
        self.levels = list(student.head_in_features)
        self.num_classes = student.num_classes
        self.topk = student.test_topk_candidates
        self.nms_threshold = student.test_nms_thresh
        self.max_detections = student.max_detections_per_image

    @staticmethod
    def check_kind(student):
        require(student.head, RetinaNetHead, "the RetinaNet head")
        require(student.anchor_generator, DefaultAnchorGenerator, "MODEL.ANCHOR_GENERATOR.NAME")

    def network(self, images: Tensor, image_sizes: Tensor) -> Dict[str, Tensor]:
        """Per level "features.p3": (B, C, H, W), "logits.p3": (B, A * classes, H, W),
        "deltas.p3": (B, A * delta_dims, H, W) and what else is in `predictions`."""
        features, predictions = self.on_maps(images, image_sizes)
        return name_features(features, self.levels) | {
            f"{kind}.{level}": x
            for kind, levels in zip(self.predictions, predictions)
            for level, x in zip(self.levels, levels)
        }

    def detect(self, raw: Dict[str, Tensor], image_sizes: Tensor):
        """The four outputs of `ExportableDetector` from what `network` returns."""
        parts = [self._candidates(i, raw, image_sizes) for i in range(len(self.levels))]
        deltas, anchors, best, labels = (torch.cat(tensors, dim=1) for tensors in zip(*parts))
        boxes, scores = self._decode(deltas, anchors, image_sizes), self._scores(best)
        scores = torch.where(scores > self.score_threshold, scores, INVALID)
        index = select_nms(
            boxes, scores, labels, self.nms_threshold, self.num_classes, self.max_detections
        )
        return finish(index, boxes, scores, labels, image_sizes)

    def _candidates(self, i: int, raw: Dict[str, Tensor], image_sizes: Tensor):
        """Deltas (B, k, delta_dims), anchors (B, k, 4), what `_ranked` gave and classes (B, k) of
        the best pairs of a level, k = min(topk, all pairs)."""
        deltas, width = raw[f"deltas.{self.levels[i]}"], raw[f"logits.{self.levels[i]}"].shape[-1]
        ranked = self._ranked(i, raw, image_sizes)
        best, pair = ranked.topk(torch.sym_min(self.topk, ranked.shape[1]), dim=1)
        anchor = pair // self.num_classes
        generator = self.student.anchor_generator
        anchors = anchors_at(
            anchor, width, list(generator.cell_anchors)[i], generator.strides[i], generator.offset
        )
        deltas = take(dense(deltas, self.delta_dims), anchor)
        return deltas, anchors, best, pair - anchor * self.num_classes

    def cut_scores(self, raw: Dict[str, Tensor], image_sizes: Tensor) -> List[List[float]]:
        """See `ExportableDetector`: where a level has more pairs than its `topk`."""
        cuts = super().cut_scores(raw, image_sizes)
        for i in range(len(self.levels)):
            ranked = self._ranked(i, raw, image_sizes)
            if ranked.shape[1] > self.topk:
                kept, dropped = self._scores(ranked.topk(self.topk + 1).values)[:, -2:].unbind(1)
                for image in (kept - dropped <= TIE).nonzero()[:, 0].tolist():
                    cuts[image].append(kept[image].item())
        return cuts

    def _ranked(self, i: int, raw: Dict[str, Tensor], image_sizes: Tensor) -> Tensor:
        """(B, H * W * A * classes) what decides about a level's best pairs: logits."""
        return self._logits(i, raw, image_sizes).flatten(1)

    def _logits(self, i: int, raw: Dict[str, Tensor], image_sizes: Tensor) -> Tensor:
        """(B, H * W * A, classes)."""
        stride = self.student.anchor_generator.strides[i]
        logits = self.only_inside(raw[f"logits.{self.levels[i]}"], stride, image_sizes)
        return dense(logits, self.num_classes)

    def _scores(self, ranked: Tensor) -> Tensor:
        """Scores in 0..1 of what `_ranked` gave."""
        return ranked.sigmoid()

    def _decode(self, deltas: Tensor, anchors: Tensor, image_sizes: Tensor) -> Tensor:
        """(B, k, 4) boxes that enter NMS."""
        return decode(deltas, anchors, self.student.box2box_transform)


class LevelBatchNorm(nn.Module):
    """Eval mode of Detectron2's `CycleBatchNormList`: statistics per level, one shared affine.

    Each call belongs to the next level. One BatchNormalization per level in place of a plain one,
    a product and a sum, so that the runtime can fold it into the convolution before it.
    """

    def __init__(self, cycle: CycleBatchNormList):
        super().__init__()
        self.cycle, self.position = cycle, 0

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        norm = self.cycle[self.position]
        self.position = (self.position + 1) % len(self.cycle)
        return nn.functional.batch_norm(
            x, norm.running_mean, norm.running_var, self.cycle.weight, self.cycle.bias, eps=norm.eps
        )
