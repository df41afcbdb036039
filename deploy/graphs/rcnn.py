"""Faster and Mask R-CNN as graphs."""

from typing import Dict, List, Tuple

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from torch import Tensor, nn

from deploy.errors import UserError
from deploy.graphs.area import extend
from deploy.graphs.common import (
    ExportableDetector,
    clip,
    decode,
    finish,
    name_features,
    nonempty,
    require,
    take,
)
from deploy.graphs.masks import check_mask_head, mask_logits, mask_probabilities, mask_size
from deploy.graphs.ops import INVALID, select_nms
from deploy.graphs.regions import pool, propose
from deploy.spec import OUTPUT_NAMES

MAX_CANDIDATES = 2048  # (proposal, class) pairs per image that enter the last NMS


class ExportableRCNN(ExportableDetector):
    """Detectron2's `GeneralizedRCNN` inference (FPN, box head, mask head) with fixed shapes.

    Proposals: per level the best anchors by objectness, decoded, clipped, empty ones invalid; NMS
    per level, the best R of all levels; missing ones are rows of zeros. Detections: softmax, the
    best `MAX_CANDIDATES` (proposal, class) pairs, decoded, clipped, thresholded; per-class NMS, the
    best K, empty boxes dropped last. The candidate limit is exact while no more pairs than that
    exceed the threshold, and also whenever K detections remain. Masks: of all K rows.

    Other kinds (C4, keypoint heads, RoIPool) are refused.
    """

    threshold_path = "roi_heads.box_predictor.test_score_thresh"
    heads_kind = StandardROIHeads

    def __init__(self, student):
        super().__init__(student)
        self.levels = list(self.rpn.in_features)
        _, predictor = self.stages(self.heads)[-1]
        self.num_classes = self.heads.num_classes
        self.nms_threshold = predictor.test_nms_thresh
        self.max_detections = predictor.test_topk_per_image
        self.mask_size = mask_size(self.heads) if self.heads.mask_on else 0
        self.proposals = self.rpn.post_nms_topk[False]
        self.suffixes = ["", *(f".stage{i + 2}" for i in range(len(self.stages(self.heads)) - 1))]
        self.selections = (*(f"rois{suffix}" for suffix in self.suffixes),)
        if self.mask_size:
            self.selections += ("boxes",)

    # Properties: a second attribute would register the weights under a second name.
    @property
    def rpn(self):
        return self.student.proposal_generator

    @property
    def dense_head(self):
        return self.rpn.rpn_head

    @property
    def heads(self):
        return self.student.roi_heads

    @staticmethod
    def stages(heads) -> List[Tuple[nn.Module, nn.Module]]:
        """(box head, predictor) of each stage; the boxes of one are the proposals of the next."""
        return [(heads.box_head, heads.box_predictor)]

    @classmethod
    def check_kind(cls, student):
        rpn, heads = student.proposal_generator, student.roi_heads
        require(rpn, RPN, "MODEL.PROPOSAL_GENERATOR.NAME")
        require(rpn.anchor_generator, DefaultAnchorGenerator, "MODEL.ANCHOR_GENERATOR.NAME")
        require(heads, cls.heads_kind, "MODEL.ROI_HEADS.NAME")
        require(heads.box_pooler.level_poolers[0], ROIAlign, "MODEL.ROI_BOX_HEAD.POOLER_TYPE")
        for _, predictor in cls.stages(heads):
            require(predictor, FastRCNNOutputLayers, "the box predictor")
            if getattr(predictor, "use_sigmoid_ce", False):
                raise UserError("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE: only softmax can be exported")
        if heads.keypoint_on:
            raise UserError("MODEL.KEYPOINT_ON: keypoints cannot be exported")
        if heads.mask_on:
            check_mask_head(heads)

    def network(self, images: Tensor, image_sizes: Tensor, **given: Tensor) -> Dict[str, Tensor]:
        """All raw predictions; with masks, the outputs that the mask head needs as well.

        Args:
            given: "rois" (B, R, 4), of later stages "rois.stage2" and so on, and "boxes" (B, K, 4),
                to be used instead of those found, so that two implementations can be compared row
                by row. All of `selections`, or none.
        Returns:
            Per level "features.p2": (B, C, H, W); per RPN level "objectness.p2": (B, A, H, W) and
            "rpn_deltas.p2": (B, A * 4, H, W); per stage "rois": (B, R, 4), zeros where there is
            none; "class_logits": (B * R, classes + 1); "box_deltas": (B * R, classes * 4), or
            (B * R, 4) when class-agnostic; with masks "mask_logits": (B * K, classes or 1, M, M).
        """
        features, (objectness, deltas) = self.on_maps(images, image_sizes)
        raw = {
            **name_features(features, {*self.levels, *self.heads.box_in_features}),
            **{f"objectness.{level}": x for level, x in zip(self.levels, objectness)},
            **{f"rpn_deltas.{level}": x for level, x in zip(self.levels, deltas)},
        }
        features = self._for_pooling(features, image_sizes)
        pyramid = [features[level] for level in self.heads.box_in_features]
        rois = None if given else self._propose(objectness, deltas, image_sizes)
        for i, suffix in enumerate(self.suffixes):
            if given:
                rois = given[f"rois{suffix}"]
            elif i:
                rois = self._refine(i - 1, raw, image_sizes)
            head, predictor = self.stages(self.heads)[i]
            logits, deltas = predictor(head(pool(self.heads.box_pooler, pyramid, rois)))
            raw[f"rois{suffix}"], raw[f"class_logits{suffix}"] = rois, logits
            raw[f"box_deltas{suffix}"] = deltas
        if self.mask_size:
            if not given:
                raw |= zip(OUTPUT_NAMES, self._select(raw, image_sizes))
            raw["mask_logits"] = mask_logits(self.heads, features, (given or raw)["boxes"])
        return raw

    def detect(self, raw: Dict[str, Tensor], image_sizes: Tensor):
        """The outputs of `ExportableDetector` from what `network` returns."""
        if not self.mask_size:
            return self._select(raw, image_sizes)
        found = tuple(raw[name] for name in OUTPUT_NAMES)
        return (*found, mask_probabilities(raw["mask_logits"], raw["labels"]))

    def cut_images(self, raw: Dict[str, Tensor], num_dets: Tensor) -> int:
        """Images with more candidates than `MAX_CANDIDATES` whose list of K is not full."""
        candidates = (self._pair_scores(raw) > self.score_threshold).sum(dim=1)
        cut = (candidates > MAX_CANDIDATES) & (num_dets[:, 0] < self.max_detections)
        return int(cut.sum())

    def _for_pooling(self, features: Dict[str, Tensor], image_sizes: Tensor) -> Dict[str, Tensor]:
        """What RoIAlign reads at the ends of the images as it does at the ends of maps."""
        if self.area.filled:
            return features
        shapes = self.student.backbone.output_shape()
        return features | {
            level: extend(features[level], image_sizes, self.area.step, shapes[level].stride)
            for level in self.heads.box_in_features
        }

    def _propose(self, objectness: List[Tensor], deltas: List[Tensor], image_sizes: Tensor):
        strides = self.rpn.anchor_generator.strides
        logits = [self.only_inside(x, s, image_sizes) for x, s in zip(objectness, strides)]
        return propose(self.rpn, logits, deltas, image_sizes, self.static)

    def _select(self, raw: Dict[str, Tensor], image_sizes: Tensor):
        """The four outputs of the box head."""
        probs, rois = self._pair_scores(raw), raw[f"rois{self.suffixes[-1]}"]
        scores, pair = probs.topk(min(MAX_CANDIDATES, probs.shape[1]), dim=1)
        row = pair // self.num_classes
        labels = pair - row * self.num_classes
        deltas = raw[f"box_deltas{self.suffixes[-1]}"]
        agnostic = deltas.shape[1] == 4
        deltas = take(deltas.reshape(rois.shape[0], -1, 4), row if agnostic else pair)
        boxes = decode(deltas, take(rois, row), self._transform(-1))
        valid = (scores > self.score_threshold) & torch.isfinite(boxes).all(dim=-1)
        boxes, scores = clip(boxes, image_sizes), torch.where(valid, scores, INVALID)
        index = select_nms(
            boxes, scores, labels, self.nms_threshold, self.num_classes, self.max_detections
        )
        return finish(index, boxes, scores, labels, image_sizes)

    def _pair_scores(self, raw: Dict[str, Tensor]) -> Tensor:
        """(B, R * classes) mean of the stages' probabilities, `INVALID` for proposals not there."""
        stages = [raw[f"class_logits{suffix}"].softmax(dim=-1)[:, :-1] for suffix in self.suffixes]
        probs = sum(stages[1:], stages[0])
        if len(stages) > 1:
            probs = probs * (1.0 / len(stages))
        probs = probs.reshape(*raw["rois"].shape[:2], self.num_classes)
        return torch.where(nonempty(raw["rois"])[..., None], probs, INVALID).flatten(1)

    def _refine(self, stage: int, raw: Dict[str, Tensor], image_sizes: Tensor) -> Tensor:
        """(B, R, 4) boxes of a class-agnostic stage, clipped; zeros where there is no proposal.

        Empty ones stay, as in Detectron2: the rows of all stages belong together.
        """
        rois = raw[f"rois{self.suffixes[stage]}"]
        deltas = raw[f"box_deltas{self.suffixes[stage]}"].reshape(rois.shape)
        boxes = clip(decode(deltas, rois, self._transform(stage)), image_sizes)
        usable = nonempty(raw["rois"]) & torch.isfinite(boxes).all(dim=-1)
        return torch.where(usable[..., None], boxes, 0.0)  # NaN would reach RoIAlign

    def _transform(self, stage: int):
        return self.stages(self.heads)[stage][1].box2box_transform
