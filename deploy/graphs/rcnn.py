"""Faster R-CNN as a graph."""

from typing import Dict, List, Optional

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from torch import Tensor

from deploy.errors import UserError
from deploy.graphs.common import (
    ExportableDetector,
    anchors_at,
    clip,
    decode,
    dense,
    finish,
    nonempty,
    require,
    take,
)
from deploy.ops import INVALID, pyramid_roi_align, select_nms

MAX_CANDIDATES = 2048  # (proposal, class) pairs per image that enter the last NMS


class ExportableRCNN(ExportableDetector):
    """Detectron2's `GeneralizedRCNN` inference (FPN, box head) with fixed shapes.

    Proposals: per level the best anchors by objectness, decoded, clipped, empty ones invalid; NMS
    per level, the best R of all levels; missing ones are rows of zeros. Detections: softmax, the
    best `MAX_CANDIDATES` (proposal, class) pairs, decoded, clipped, thresholded; per-class NMS, the
    best K, empty boxes dropped last. The candidate limit is exact while no more pairs than that
    exceed the threshold, and also whenever K detections remain.

    Other kinds (C4, cascade, mask or keypoint heads, RoIPool) are refused.
    """

    threshold_path = "roi_heads.box_predictor.test_score_thresh"
    selections = ("rois",)

    def __init__(self, student):
        super().__init__(student)
        predictor = self.heads.box_predictor
        self.num_classes = self.heads.num_classes
        self.nms_threshold = predictor.test_nms_thresh
        self.max_detections = predictor.test_topk_per_image

    # Properties: a second attribute would register the weights under a second name.
    @property
    def rpn(self):
        return self.student.proposal_generator

    @property
    def heads(self):
        return self.student.roi_heads

    @staticmethod
    def check_kind(student):
        rpn, heads = student.proposal_generator, student.roi_heads
        require(rpn, RPN, "MODEL.PROPOSAL_GENERATOR.NAME")
        require(rpn.anchor_generator, DefaultAnchorGenerator, "MODEL.ANCHOR_GENERATOR.NAME")
        require(heads, StandardROIHeads, "MODEL.ROI_HEADS.NAME")
        require(heads.box_predictor, FastRCNNOutputLayers, "the box predictor")
        require(heads.box_pooler.level_poolers[0], ROIAlign, "MODEL.ROI_BOX_HEAD.POOLER_TYPE")
        if heads.mask_on or heads.keypoint_on:
            raise UserError("MODEL.MASK_ON and KEYPOINT_ON: only the box head can be exported")
        if getattr(heads.box_predictor, "use_sigmoid_ce", False):
            raise UserError("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE: only softmax can be exported")

    def network(
        self, images: Tensor, image_sizes: Tensor, rois: Optional[Tensor] = None
    ) -> Dict[str, Tensor]:
        """All raw predictions.

        Args:
            rois: (B, R, 4) to run the box head on instead of the proposals found, so that two
                implementations can be compared row by row.
        Returns:
            Per RPN level "objectness.p2": (B, A, H, W) and "rpn_deltas.p2": (B, A * 4, H, W);
            "rois": (B, R, 4), zeros where there is none; "class_logits": (B * R, classes + 1);
            "box_deltas": (B * R, classes * 4), or (B * R, 4) when class-agnostic.
        """
        features = self.student.backbone(self.normalize(images, image_sizes))
        levels = self.rpn.in_features
        objectness, deltas = self.rpn.rpn_head([features[level] for level in levels])
        if rois is None:
            rois = self._proposals(objectness, deltas, image_sizes)
        pooled = self._pool([features[level] for level in self.heads.box_in_features], rois)
        logits, box_deltas = self.heads.box_predictor(self.heads.box_head(pooled))
        return {
            **{f"objectness.{level}": x for level, x in zip(levels, objectness)},
            **{f"rpn_deltas.{level}": x for level, x in zip(levels, deltas)},
            "rois": rois,
            "class_logits": logits,
            "box_deltas": box_deltas,
        }

    def detect(self, raw: Dict[str, Tensor], image_sizes: Tensor):
        """The four outputs of `ExportableDetector` from what `network` returns."""
        rois, probs = raw["rois"], self._pair_scores(raw)
        scores, pair = probs.topk(min(MAX_CANDIDATES, probs.shape[1]), dim=1)
        row = pair // self.num_classes
        labels = pair - row * self.num_classes
        deltas = raw["box_deltas"].reshape(rois.shape[0], -1, 4)
        agnostic = raw["box_deltas"].shape[1] == 4
        transform = self.heads.box_predictor.box2box_transform
        boxes = decode(take(deltas, row if agnostic else pair), take(rois, row), transform)
        valid = (scores > self.score_threshold) & torch.isfinite(boxes).all(dim=-1)
        boxes, scores = clip(boxes, image_sizes), torch.where(valid, scores, INVALID)
        index = select_nms(
            boxes, scores, labels, self.nms_threshold, self.num_classes, self.max_detections
        )
        return finish(index, boxes, scores, labels, image_sizes)

    def cut_images(self, raw: Dict[str, Tensor], num_dets: Tensor) -> int:
        """Images with more candidates than `MAX_CANDIDATES` whose list of K is not full."""
        candidates = (self._pair_scores(raw) > self.score_threshold).sum(dim=1)
        cut = (candidates > MAX_CANDIDATES) & (num_dets[:, 0] < self.max_detections)
        return int(cut.sum())

    def _pair_scores(self, raw: Dict[str, Tensor]) -> Tensor:
        """(B, R * classes) probabilities, `INVALID` for proposals that are not there."""
        probs = raw["class_logits"].softmax(dim=-1)[:, :-1]
        probs = probs.reshape(*raw["rois"].shape[:2], self.num_classes)
        return torch.where(nonempty(raw["rois"])[..., None], probs, INVALID).flatten(1)

    def _proposals(self, objectness: List[Tensor], deltas: List[Tensor], image_sizes: Tensor):
        """(B, R, 4) proposals in descending order of objectness, then rows of zeros."""
        parts = [self._level(i, *x) for i, x in enumerate(zip(objectness, deltas))]
        boxes, scores, level = (torch.cat(tensors, dim=1) for tensors in zip(*parts))
        valid = torch.isfinite(boxes).all(dim=-1) & torch.isfinite(scores)
        boxes = clip(boxes, image_sizes)
        valid = valid & nonempty(boxes, self.rpn.min_box_size)
        scores = torch.where(valid, scores, INVALID)
        count = self.rpn.post_nms_topk[False]
        index = select_nms(boxes, scores, level, self.rpn.nms_thresh, len(parts), count)
        return torch.where((index >= 0)[..., None], take(boxes, index.clamp(min=0)), 0.0)

    def _level(self, i: int, objectness: Tensor, deltas: Tensor):
        """Decoded boxes (B, k, 4), logits and level number (B, k) of a level's best anchors."""
        width = objectness.shape[-1]
        logits = dense(objectness, 1).flatten(1)
        best, anchor = logits.topk(torch.sym_min(self.rpn.pre_nms_topk[False], logits.shape[1]))
        generator = self.rpn.anchor_generator
        anchors = anchors_at(
            anchor, width, list(generator.cell_anchors)[i], generator.strides[i], generator.offset
        )
        boxes = decode(take(dense(deltas, 4), anchor), anchors, self.rpn.box2box_transform)
        return boxes, best, torch.full_like(anchor, i)

    def _pool(self, features: List[Tensor], rois: Tensor) -> Tensor:
        """(B * R, C, size, size): every box pooled on the level that its size belongs to.

        Level bounds are compared as sizes: the graph's logarithm is not Detectron2's to the last
        bit, and boxes of exactly 112 or 224 pixels occur (a whole image, for one).
        """
        pooler = self.heads.box_pooler
        align = pooler.level_poolers[0]
        size = rois[..., 2:] - rois[..., :2]
        ratio = (size[..., 0] * size[..., 1]).sqrt() / pooler.canonical_box_size + 1e-8
        level = torch.zeros_like(ratio, dtype=torch.int64)
        for upper in range(pooler.min_level + 1, pooler.max_level + 1):
            level = level + (ratio >= 2.0 ** (upper - pooler.canonical_level)).to(torch.int64)
        scales, cells = [p.spatial_scale for p in pooler.level_poolers], pooler.output_size[0]
        return pyramid_roi_align(
            features, rois, level, scales, cells, align.sampling_ratio, align.aligned
        )
